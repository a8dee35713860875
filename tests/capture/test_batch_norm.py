"""Batch norm's sums in two stages: the same values and gradients, and nothing else is touched."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_kd.capture.passes.batch_norm import DECLARED, expand, split_sums

aten = torch.ops.aten


def traced(net, x):
    """The gradient of a loss of ``net(x)`` with respect to x and the parameters, and the buffers after it, as a graph."""
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def run(x, params, buffers):
        loss = torch.func.functional_call(net, (params, buffers), (x,)).sin().sum()
        return [loss, *torch.autograd.grad(loss, [x, *params.values()]), *buffers.values()]

    return make_fx(run, decomposition_table=DECLARED)(x, params, buffers), (params, buffers)


def count(module, *targets):
    return sum(node.target in targets for node in module.graph.nodes)


SPLIT = (aten.var_mean.correction, aten.native_batch_norm_backward.default)


@pytest.mark.parametrize(
    ("net", "shape", "number"),
    [
        (nn.BatchNorm2d(3), (4, 3, 8, 8), 1),
        (nn.BatchNorm2d(3, affine=False), (4, 3, 8, 8), 1),
        (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 9, 8), 1),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), (4, 3, 9, 8), 1),
        (nn.BatchNorm1d(3), (4, 3, 64), 1),
        (nn.BatchNorm3d(3), (1, 3, 4, 4, 4), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)), (2, 3, 16, 16), 3),
    ],
    ids=["affine", "plain", "batch", "batch in eval", "1d", "3d", "two"],
)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rewritten_batch_norm_has_the_same_values_and_gradients(net, shape, number, memory_format, offset):
    torch.manual_seed(0)
    net.double()
    x = torch.randn(shape, dtype=torch.float64) + offset
    if memory_format == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    module, (params, buffers) = traced(net, x)

    @torch.no_grad()
    def outcome():
        copies = {name: value.clone() for name, value in buffers.items()}
        return module(x, params, copies)

    expected = outcome()
    expand(module)
    for mine, theirs in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)
    assert count(module, *SPLIT) == 2 * number
    split_sums(module)
    assert count(module, aten.native_batch_norm_backward.default) == 0
    for mine, theirs in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.BatchNorm2d(3).eval(), (4, 3, 8, 8)),
        (nn.BatchNorm2d(3), (4, 3, 7, 9)),
        (nn.BatchNorm1d(3), (64, 3)),
        (nn.GroupNorm(1, 3), (4, 3, 8, 8)),
    ],
    ids=["eval", "small", "rows", "group"],
)
def test_norms_that_need_no_split_are_left_alone(net, shape):
    x = torch.randn(shape, requires_grad=True)
    module, _ = traced(net, x)
    before = [node.target for node in module.graph.nodes]
    split_sums(module)
    assert [node.target for node in module.graph.nodes] == before


def test_variances_that_are_not_batch_norms_are_left_alone():
    x = torch.randn(4, 3, 8, 8)
    module = make_fx(lambda x: (*torch.var_mean(x, (0, 2, 3)), *torch.var_mean(x, (2, 3), correction=0)))(x)
    split_sums(module)
    assert count(module, aten.var_mean.correction) == 2


class Turning(nn.Module):
    """Batch norm of a view, whose gradient comes transposed."""

    def __init__(self):
        super().__init__()
        self.before, self.norm, self.after = (
            nn.Linear(3, 4 * 64),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.Linear(4, 5),
        )

    def forward(self, x):
        return self.after(self.norm(self.before(x).view(-1, 4, 64)).transpose(1, 2))


def test_the_gradient_has_the_strides_of_the_input():
    torch.manual_seed(0)
    module, inputs = traced(Turning(), x := torch.randn(6, 3, requires_grad=True))
    expected = module(x, *inputs)
    split_sums(module)
    for mine, theirs in zip(module(x, *inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
