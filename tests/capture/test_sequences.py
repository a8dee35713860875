"""Long graphs of recurrent networks are shortened."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from models.vrnn import VRNN
from pyro_kd import freeze
from pyro_kd.capture.passes.sequences import shorten
from tests.support.captured import MARKS
from tests.support.losses import SurrogateKD

pytestmark = MARKS


@pytest.mark.parametrize("rows", [1, 5])
def test_a_shortened_graph_has_the_same_gradients(rows, monkeypatch):
    """Weight gradients as long products, weights in order: the same gradients, of a recurrent student with a frozen recurrent teacher."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 100)
    monkeypatch.setattr("pyro_kd.capture.passes.sequences._LEAST_PACKED", 100)
    monkeypatch.setattr("pyro_kd.capture.passes.sequences._ROWS", 4 * rows)  # four steps of twelve: three products
    torch.manual_seed(0)
    teacher, student = freeze(VRNN(6, 8, latents=3).model), VRNN(5, 7, latents=3)
    targets = [f"{kind}{t}" for t in range(1, 13) for kind in ("pen", "move")]
    eager = SurrogateKD(targets)(student.model, teacher)
    captured = SurrogateKD(targets)(student.model, teacher)
    captured.compile()
    params = list(student.generative.parameters())

    def grads(module):
        torch.manual_seed(1)
        return torch.autograd.grad(module(rows, 12), params)

    for _ in range(2):
        for mine, theirs in zip(grads(captured), grads(eager), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for param in params:
                param.mul_(1.1)
    graph = captured.loss._pairs._pairs[0].captured._capture._cache._entries()[0].graph
    assert graph.num_operations > 100
    packed = [name for name in graph._run.args[0]._buffers if name.endswith("packed")]
    assert bool(packed) == (rows > 1 and torch.backends.mkl.is_available())


def test_weights_that_are_products_have_the_same_gradients():
    """The gradient of one is a part of the gradient of its factors."""

    def run(lefts, right, x):
        for _ in range(8):
            x = sum(nn.functional.linear(x, left @ right).tanh() for left in lefts)
        return torch.autograd.grad(x.sum(), [right, *lefts])

    torch.manual_seed(0)
    inputs = (
        [torch.randn(5, 2, requires_grad=True) for _ in range(8)],
        torch.randn(2, 5, requires_grad=True),
        torch.randn(3, 5),
    )
    graph = make_fx(run)(*inputs)
    expected = graph(*inputs)
    shorten(graph)
    for mine, theirs in zip(graph(*inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: torch.addmm(torch.ones(2), x, w, beta=2, alpha=3),
        lambda x, w: torch.addmm(x[:, :1].expand(-1, 2), x, w),
        lambda x, w: torch.addmm(torch.ones(1), x, w),
        lambda x, w: torch.addmm(torch.ones(2), x, w),
    ],
    ids=["scaled", "matrix", "number", "bias"],
)
def test_each_form_of_a_product_has_the_same_gradient(product, monkeypatch):
    """Each form of a product gets its matrix in order, or is left alone."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 1)
    monkeypatch.setattr("pyro_kd.capture.passes.sequences._LEAST_PACKED", 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(0.1 * torch.arange(6.0).view(3, 2))

        def forward(self):
            x = torch.arange(12.0).view(4, 3) / 12
            means = [product(x + i, self.w) for i in range(12)]
            pyro.sample("x", dist.Normal(torch.stack(means), 1.0).to_event(3))

    student, teacher, loss = Net(), freeze(Net()), SurrogateKD(["x"])
    captured = loss(student, teacher)
    captured.compile()
    with torch.no_grad():
        student.w.mul_(2)
    for _ in range(2):
        (mine,) = torch.autograd.grad(captured(), [student.w])
        (theirs,) = torch.autograd.grad(loss(student, teacher)(), [student.w])
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().min() > 0.1
