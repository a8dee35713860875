"""A student whose layers are fitted to its teacher's: against conditions of the least-squares problem that autograd checks."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from models.helmholtz import HelmholtzMachine
from models.hierarchical_vae import HierarchicalVAE
from models.vrnn import VRNN
from pyro_kd import SurrogateKD, freeze, record_noise, replay_noise
from pyro_kd.errors import InvalidProgramError, WeightSelectionError
from pyro_kd.training import fit_layers, select_weights


def program(net, size=()):
    """Draws x, the input of a network, and y around its output."""

    def model(rows):
        pyro.module("net", net)
        with pyro.plate("rows", rows):
            x = pyro.sample("x", dist.Normal(torch.zeros(size, dtype=next(net.parameters()).dtype), 1.0).to_event(len(size)))
            mean = net(x)
            return pyro.sample("y", dist.Normal(mean, 0.1).to_event(mean.dim() - 1))

    return model


def perceptron(width):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def images(width):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False),
        nn.SiLU(),
        nn.Conv2d(width, 1, 1),
    )


def lines(width):
    return nn.Sequential(nn.Conv1d(2, width, 5, stride=2, padding=1, dilation=2), nn.ReLU(), nn.Conv1d(width, 2, 1))


NETWORKS = {"perceptron": (perceptron, (3,)), "images": (images, (2, 8, 6)), "lines": (lines, (2, 16))}


def pair(kind, wide=8, narrow=4):
    make, size = NETWORKS[kind]
    torch.manual_seed(0)
    large, small = make(wide).double(), make(narrow).double()
    return large, small, program(large, size), program(small, size)


def recorded(net, name, run):
    """Inputs and outputs of a layer in a run."""
    found = []
    handle = net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append((args[0], output)))
    with torch.no_grad():
        run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize("kind", NETWORKS)
def test_each_layer_solves_its_least_squares_problem(kind):
    """At the solution the gradient of the squared distance, by autograd, is that of the ridge."""
    large, small, teacher, student = pair(kind)
    large.eval()
    small.eval()
    start = copy.deepcopy(small)
    select_weights(start, large)
    ridge, rows = 0.01, 50
    torch.manual_seed(1)
    shares = fit_layers(small, large, student, teacher, rows, ridge=ridge)
    torch.manual_seed(1)
    with record_noise() as noise:
        trace = poutine.trace(teacher).get_trace(rows)
    given = poutine.condition(student, data={"x": trace.nodes["x"]["value"]})
    for name, share in shares.items():
        _, wanted = recorded(large, name, lambda: replay_noise(teacher, noise=noise)(rows))
        inputs, made = recorded(small, name, lambda: given(rows))
        units = torch.arange(0, wanted.shape[1], wanted.shape[1] // made.shape[1])
        wanted = wanted.index_select(1, units)
        assert share == pytest.approx(((wanted - made).square().sum() / wanted.square().sum()).item(), abs=1e-9)
        layer = copy.deepcopy(small.get_submodule(name))
        (layer(inputs) - wanted).square().sum().backward()
        # The ridge holds each weight in proportion to the squares of its input, over all the rows that a unit sums.
        squares = copy.deepcopy(layer).requires_grad_(False)
        moved = layer.weight.detach() - start.get_submodule(name).weight
        ones = torch.zeros_like(layer.weight).requires_grad_()
        squares._parameters.pop("weight")
        squares.weight = ones
        squares.bias = None
        weights = torch.autograd.grad(squares(inputs.square())[:, 0].sum(), ones)[0][:1]
        expected = -2 * ridge * weights * moved
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-6, atol=1e-8)
        is_moved = not torch.equal(layer.weight, start.get_submodule(name).weight)
        assert is_moved == (name != "0")  # whose inputs are those of the teacher


def test_a_layer_with_enough_units_is_fitted_perfectly():
    """The teacher's units are copies of each other, so that half of them say all."""
    large, small, teacher, student = pair("perceptron", 8, 4)
    with torch.no_grad():
        for layer in (large[0], large[2]):
            layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]
    # One of each pair, whichever.
    shares = fit_layers(
        small, large, student, teacher, 200, ridge=1e-9, units=lambda name, dim, size, wanted: torch.arange(4)
    )
    assert list(shares) == ["0", "2", "4"]
    assert max(shares.values()) < 1e-7
    x = torch.randn(50, 3).double()
    torch.testing.assert_close(small(x), large(x), rtol=1e-3, atol=1e-3)


def test_the_cell_of_an_lstm_has_the_gates_of_the_teachers_units():
    large, small = VRNN(24, 32), VRNN(12, 8)
    pyro.set_rng_seed(0)
    selected = copy.deepcopy(small)
    select_weights(selected.generative, large.generative)
    shares = fit_layers(small.generative, large.generative, small.model, large.model, 64, 8)
    assert shares.keys() >= {"cell", "prior.4", "decoder.4", "points.0"}
    # Both run on the teacher's values; the hidden states of the same units are compared.
    pyro.set_rng_seed(1)
    trace = poutine.trace(large.model).get_trace(200, 8)
    values = {name: site["value"] for name, site in trace.nodes.items() if name[0] in "zpm" and site["type"] == "sample"}
    distances = []
    for machine in (selected, small):
        hidden = {}
        for key, net, run in (("large", large, large.model), ("own", machine, machine.model)):
            seen = hidden[key] = []
            handle = net.generative["cell"].register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output[0])
            )
            with torch.no_grad():
                poutine.condition(run, data=values)(200, 8)
            handle.remove()
        wanted = torch.stack(hidden["large"])[..., ::4]
        distances.append((wanted - torch.stack(hidden["own"])).square().mean().item())
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_students_are_nearer_than_with_selected_weights_alone(offset):
    """In nats, on noise that neither has seen."""
    pyro.set_rng_seed(0)
    large = HelmholtzMachine(16)
    with torch.no_grad():  # a teacher with something to say
        for parameter in large.generative.parameters():
            parameter.mul_(3)
    losses = {}
    for name in ("selected", "fitted"):
        small = HelmholtzMachine(4)
        if name == "selected":
            select_weights(small.generative, large.generative, offset=offset)
        else:
            fit_layers(small.generative, large.generative, small.model, large.model, 1000, offset=offset)
        pyro.set_rng_seed(1)
        losses[name] = SurrogateKD(["y1", "y2"]).loss(small.model, freeze(large.model), 2000) / 2000
    assert losses["fitted"] < 0.5 * losses["selected"]


def test_a_hierarchical_vae():
    pyro.set_rng_seed(0)
    large, small = HierarchicalVAE(32, 8), HierarchicalVAE(32, 4)
    shares = fit_layers(small.top_down, large.top_down, small.model, large.model, 4)
    assert len(shares) == 30
    assert all(0 <= share <= 1 for share in shares.values())


def test_nothing_but_the_student_changes():
    large, small, teacher, student = pair("images")
    large.train(), small.eval()
    before = copy.deepcopy(large.state_dict())
    pyro.param("net$$$0.bias", torch.ones(3))
    fit_layers(small, large, student, teacher, 20)
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())
    assert [module.training for module in (large, large[1], small, small[1])] == [True, True, False, False]
    assert list(pyro.get_param_store().keys()) == ["net$$$0.bias"]
    assert torch.equal(pyro.param("net$$$0.bias"), torch.ones(3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in (large, small) for module in net.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in small.parameters())


def test_sites_of_other_shapes_keep_the_shared_noise():
    """A wider latent of the teacher is not given to the student."""

    class Decoder(nn.Module):
        def __init__(self, latents, width):
            super().__init__()
            self.latents = latents
            self.hidden, self.out = nn.Linear(latents, width), nn.Linear(width, 2)

        def forward(self, rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(self.latents), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.out(self.hidden(z).relu()), 1.0).to_event(1))

    torch.manual_seed(0)
    large, small = Decoder(6, 16), Decoder(3, 8)
    shares = fit_layers(small, large, small, large, 500)
    assert list(shares) == ["hidden", "out"]
    assert shares["hidden"] > 0.1


class Twice(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.times, self.layer = times, nn.Linear(1, 1)

    def forward(self, rows):
        with pyro.plate("rows", rows):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            for _ in range(self.times):
                x = self.layer(x.unsqueeze(-1)).squeeze(-1)
            pyro.sample("y", dist.Normal(x, 1.0))


def other_rows(large, small, teacher, student):
    def some(rows):
        with pyro.plate("rows", rows):
            x = pyro.sample("x", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            small(x[:5])

    fit_layers(small, large, some, teacher, 10)


ERRORS = {
    "a frozen teacher": (
        lambda large, small, teacher, student: fit_layers(small, large, student, freeze(teacher), 10),
        WeightSelectionError,
        "the teacher runs no layer of its network.*freeze",
    ),
    "the programs swapped": (
        lambda large, small, teacher, student: fit_layers(small, large, teacher, student, 10),
        WeightSelectionError,
        "the teacher runs no layer of its network",
    ),
    "a student of a different network": (
        lambda large, small, teacher, student: fit_layers(small, large, teacher, teacher, 10),
        WeightSelectionError,
        "layer '0' 0 times, and the teacher 1 times",
    ),
    "other rows": (other_rows, WeightSelectionError, "layer '0' on 5 rows of 4 units, in the teacher on 10 rows of 4 units"),
    "no ridge": (
        lambda large, small, teacher, student: fit_layers(small, large, student, teacher, 10, ridge=0.0),
        ValueError,
        "ridge must be above 0",
    ),
    "no sweep": (
        lambda large, small, teacher, student: fit_layers(small, large, student, teacher, 10, sweeps=0),
        ValueError,
        "sweeps must be a whole number of at least 1",
    ),
    "no network": (
        lambda large, small, teacher, student: fit_layers(student, large, student, teacher, 10),
        TypeError,
        "student must be the nn.Module",
    ),
    "no rows": (
        lambda large, small, teacher, student: fit_layers(small, large, small, large, torch.zeros(0, 3).double()),
        WeightSelectionError,
        "layer '0' on no rows",
    ),
    "no program": (
        lambda large, small, teacher, student: fit_layers(small, large, dist.Normal(0.0, 1.0), teacher, 10),
        InvalidProgramError,
        r"the student \(third argument\)",
    ),
    "an error of the program": (
        lambda large, small, teacher, student: fit_layers(small, large, student, teacher, "ten"),
        (TypeError, ValueError, RuntimeError),
        ".",
    ),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors_leave_the_student_as_it_was(case):
    run, error, message = case
    networks = pair("perceptron")
    before = copy.deepcopy(networks[1].state_dict())
    with pytest.raises(error, match=message):
        run(*networks)
    assert all(torch.equal(value, before[name]) for name, value in networks[1].state_dict().items())


def test_a_layer_that_runs_more_often_in_one_program_is_an_error():
    for times, message in (((3, 2), "more often than the teacher"), ((2, 3), "2 times, and the teacher 3 times")):
        small, large = Twice(times[0]), Twice(times[1])
        with pytest.raises(WeightSelectionError, match=message):
            fit_layers(small, large, small, large, 10)


def test_values_that_are_not_finite_are_an_error():
    large, small, teacher, _ = pair("perceptron")

    def broken(rows):
        with pyro.plate("rows", rows):
            x = pyro.sample("x", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            small(x * float("inf"))

    before = copy.deepcopy(small.state_dict())
    with pytest.raises(WeightSelectionError, match="layer '0' are not all finite"):
        fit_layers(small, large, broken, teacher, 10)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_a_network_without_such_layers_is_an_error():
    large, small = (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)) for _ in range(2))
    with pytest.raises(WeightSelectionError, match="no layer that can be fitted.*select_weights alone"):
        fit_layers(small, large, program(small, (4, 5, 5)), program(large, (4, 5, 5)), 3)
