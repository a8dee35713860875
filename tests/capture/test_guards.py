"""A call in which a guard does not hold is done again without the graph."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn.functional import one_hot
from torch.testing import assert_close

from pyro_kd import freeze
from pyro_kd.errors import PlateMismatchError
from tests.support.captured import MARKS
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def masked(loc, which):
    def program(*masks):
        with pyro.plate("rows", 3), poutine.mask(mask=masks[which]):
            pyro.sample("x", dist.Normal(loc, 1.0))

    return program


def test_a_call_whose_masks_differ_raises_and_the_next_runs_the_graph():
    loc, mask = torch.zeros((), requires_grad=True), torch.tensor([True, True, False])
    captured = SurrogateKD(["x"])(masked(loc, 0), masked(2.0, 1))
    captured.compile(backend=None)
    assert captured(mask, mask.clone()).item() == pytest.approx(4.0)
    with pytest.raises(PlateMismatchError, match="mask of site 'x' differs"):
        captured(mask, ~mask)
    assert captured(~mask, ~mask).item() == pytest.approx(2.0)


class OfClasses(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.net, self.options = nn.Linear(3, 1), options

    def forward(self, labels):
        classes = one_hot(labels, **self.options) if self.options else one_hot(labels, 3)
        with pyro.plate("rows", len(labels)):
            pyro.sample("x", dist.Normal(self.net(classes.float()).squeeze(-1), 1.0))


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}])
@pytest.mark.parametrize("wrong", [[0, 1, 3], [0, 1, -1]])
def test_labels_out_of_range_are_an_error_as_without_a_graph(options, wrong, num_graphs):
    student, frozen = OfClasses(**options), freeze(OfClasses(**options))
    eager, captured = SurrogateKD(["x"])(student, frozen), SurrogateKD(["x"])(student, frozen)
    captured.compile(backend=None)
    for labels in ([0, 1, 2], [2, 2, 1]):
        assert_close(captured(torch.tensor(labels)), eager(torch.tensor(labels)))
    for module in (eager, captured):
        with pytest.raises(RuntimeError, match="Class values must be"):
            module(torch.tensor(wrong))
    assert_close(captured(torch.tensor([0, 0, 2])), eager(torch.tensor([0, 0, 2])))
    assert num_graphs() == 1


def test_labels_that_one_hot_does_not_take_are_an_error_as_without_a_graph():
    captured = SurrogateKD(["x"])(OfClasses(), freeze(OfClasses()))
    captured.compile(backend=None)
    with pytest.raises(RuntimeError, match="one_hot is only applicable to index tensor of type"):
        captured(torch.tensor([0, 1, 2], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
        captured(torch.tensor([0, 1, 3]))


def test_a_call_with_infinite_logits_has_the_eager_value_and_gradient():
    def program(loc):
        def run(shift):
            with pyro.plate("rows", 3):
                pyro.sample("x", dist.Bernoulli(logits=loc + shift))

        return run

    loc = torch.tensor(0.3, requires_grad=True)
    loss, student, teacher = SurrogateKD(["x"]), program(loc), program(-0.5)
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None)
    usual, certain = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, torch.inf, 2.0])
    for shift in (usual, certain, usual):
        values = [module(shift) for module in (captured, eager)]
        assert values[0].isfinite()
        assert_close(*values)
        assert_close(*[torch.autograd.grad(value, loc) for value in values])


def test_a_guard_that_fails_three_times_ends_the_graph():
    loc, mask = torch.zeros((), requires_grad=True), torch.tensor([True, True, False])
    captured = SurrogateKD(["x"])(masked(loc, 0), masked(2.0, 1))
    captured.compile(backend=None)
    captured(mask, mask.clone())

    for _ in range(2):
        with pytest.raises(PlateMismatchError):
            captured(mask, ~mask)
    with pytest.warns(UserWarning, match="branch on the values of tensors"), pytest.raises(PlateMismatchError):
        captured(mask, ~mask)
    with pytest.raises(PlateMismatchError):
        captured(mask, ~mask)
    assert captured(mask, mask).item() == pytest.approx(4.0)


class Certain(nn.Module):
    """A student whose logits are infinite where ``shift`` is."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, inputs, shift):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(self.norm(inputs).squeeze(-1), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z + shift))


def test_a_call_whose_guard_fails_has_the_effects_of_an_eager_call():
    """The graph has run already when it is known that it does not hold: what it did is taken back."""
    usual, certain = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, torch.inf, 2.0])
    inputs, results = torch.tensor([[0.0], [1.0], [3.0]]), []
    teacher = freeze(Certain())
    for is_captured in (True, False):
        student = Certain()
        module = SurrogateKD(["x"])(student, teacher)
        if is_captured:
            module.compile(backend=None)
        torch.manual_seed(3)
        losses = [module(inputs, shift).detach() for shift in (usual, certain, usual)]
        results.append((losses, list(student.buffers())))
    assert_close(*results)
