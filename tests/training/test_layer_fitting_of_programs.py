"""What programs and networks may do while layers are fitted: write in place, share weights, freeze parts, mix scales."""

import copy
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_kd.errors import WeightSelectionError
from pyro_kd.training import fit_layers, select_weights


class Net(nn.Module):
    """Two layers around an operation; ``first`` is a module that student and teacher may share."""

    def __init__(self, width, between=torch.relu, inputs=3):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.between = between

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.between(self.a(x)))))


def program(net, draw=lambda x: x, inputs=3, scale=1.0):
    def model(rows):
        with pyro.plate("rows", rows):
            x = pyro.sample("x", dist.Normal(torch.zeros(inputs), scale).to_event(1))
            pyro.sample("y", dist.Normal(net(draw(x)), 0.1).to_event(1))

    return model


def distance(student, teacher, inputs=3, scale=1.0):
    """The mean square of the difference of two networks, on new inputs."""
    x = torch.randn(5000, inputs, generator=torch.Generator().manual_seed(1)) * scale
    with torch.no_grad():
        return (student(x) - teacher(x)).square().mean().item()


def nets(*args, **kwargs):
    torch.manual_seed(0)
    return Net(8, *args, **kwargs), Net(4, *args, **kwargs)


def in_place(h):
    h.clamp_(min=0)
    return h


def test_a_program_may_write_to_the_output_of_a_layer():
    """All units of the layer are the student's as well, and the target is what the layer made."""

    class Same(Net):
        def __init__(self, width, between):
            super().__init__(width, between)
            self.a = nn.Linear(3, 6)
            self.b = nn.Linear(6, width)

    found = []
    for between in (torch.relu, in_place):
        torch.manual_seed(0)
        large, small = Same(8, between), Same(4, between)
        pyro.set_rng_seed(0)
        shares = fit_layers(small, large, program(small), program(large), 500)
        found.append((shares, distance(small, large)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_a_program_may_write_to_what_it_draws():
    found = []
    for draw in (lambda x: 2 * x, lambda x: x.mul_(2)):
        large, small = nets()
        pyro.set_rng_seed(0)
        found.append(fit_layers(small, large, program(small, draw), program(large, draw), 500))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_weights_that_two_modules_share_stay_as_selected():
    class Tied(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.words, self.out, self.hidden = (
                nn.Embedding(10, width),
                nn.Linear(width, 10, bias=False),
                nn.Linear(width, width),
            )
            self.out.weight = self.words.weight

        def forward(self, index):
            return self.out(torch.relu(self.hidden(self.words(index))))

    def model(net):
        def run(rows):
            with pyro.plate("rows", rows):
                word = pyro.sample("word", dist.Categorical(torch.ones(10)))
                pyro.sample("next", dist.Categorical(logits=net(word)))

        return run

    torch.manual_seed(0)
    large, small = Tied(8), Tied(4)
    selected = copy.deepcopy(small)
    select_weights(selected, large)
    assert list(fit_layers(small, large, model(small), model(large), 500)) == ["hidden"]
    assert small.out.weight is small.words.weight
    assert torch.equal(small.words.weight, selected.words.weight)


def test_the_teachers_own_modules_and_frozen_ones_stay_as_they_are():
    large, small = nets()
    small.a = large.a = nn.Linear(3, 8)  # the teacher's own, in both
    small.b = nn.Linear(8, 4)
    small.c.requires_grad_(False)
    before = copy.deepcopy(large.state_dict())
    assert list(fit_layers(small, large, program(small), program(large), 500)) == ["b"]
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_inputs_of_different_scales_are_fitted_alike():
    """A feature of 10,000 beside others of 1: against the least-squares solution."""

    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.c = nn.Linear(3, width), nn.Linear(width + 1, 2)

        def forward(self, x):
            return self.c(torch.cat([torch.tanh(self.a(x)), 1e4 * x[:, :1]], -1))

    torch.manual_seed(0)
    large, small = Wide(8), Wide(4)
    with torch.no_grad():
        large.c.weight[:, -1] /= 1e4
    chosen = {8: torch.arange(0, 8, 2), 9: torch.tensor([0, 2, 4, 6, 8])}
    fit_layers(
        small, large, program(small), program(large), 2000, ridge=1e-6, units=lambda name, dim, size, wanted: chosen[size]
    )
    x = torch.randn(5000, 3)
    with torch.no_grad():
        inputs = torch.cat([torch.tanh(small.a(x)), 1e4 * x[:, :1], torch.ones(5000, 1)], -1).double()
        wanted = large(x).double()
        best = torch.linalg.lstsq(inputs, wanted).solution
        least = (inputs @ best - wanted).square().mean().item()
        assert (small(x) - wanted).square().mean().item() < 1.05 * least


def test_random_numbers_of_python_are_refused():
    large, small = nets()

    def rows_of(net):
        def model(rows):
            with pyro.plate("rows", rows):
                x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(net(x[random.sample(range(rows), rows)]), 0.1).to_event(1))

        return model

    before = copy.deepcopy(small.state_dict())
    with pytest.raises(WeightSelectionError, match="random numbers of Python or NumPy"):
        fit_layers(small, large, rows_of(small), rows_of(large), 10)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_layers_of_pyro_modules_are_fitted():
    torch.manual_seed(0)
    large, small = (
        PyroModule[nn.Sequential](PyroModule[nn.Linear](3, w), nn.ReLU(), PyroModule[nn.Linear](w, 2)) for w in (8, 4)
    )
    assert list(fit_layers(small, large, program(small), program(large), 500)) == ["0", "2"]


def test_a_layer_that_is_wider_than_the_teachers_stays_as_it_is():
    large, small = nets()
    small.b = nn.Linear(4, 12)
    small.c = nn.Linear(12, 2)
    shares = fit_layers(small, large, program(small), program(large), 500, strict=False)
    assert list(shares) == ["a", "c"]


def test_a_program_that_differentiates_inside():
    """An energy, whose gradient is the mean."""

    def of(net):
        def model(rows):
            with pyro.plate("rows", rows):
                x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)).requires_grad_()
                (mean,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
                pyro.sample("y", dist.Normal(mean, 0.1).to_event(1))

        return model

    large, small = nets()
    shares = fit_layers(small, large, of(small), of(large), 500)
    assert list(shares) == ["a", "b", "c"]
    assert all(parameter.grad is None and parameter.is_leaf for parameter in small.parameters())
