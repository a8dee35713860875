"""Exported samplers: the same function of noise and arguments as the program, for any number of rows, without a random operation."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from models.bottleneck import Bottleneck
from models.vae import VAE
from pyro_kd import freeze, record_noise
from pyro_kd.errors import NoTargetsError, UnknownTargetError, UnsupportedExportError
from pyro_kd.export import export_density, export_sampler

RANDOM = torch.Tag.nondeterministic_seeded
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def random_operations(exported):
    graphs = [module.graph for module in exported.program.graph_module.modules() if hasattr(module, "graph")]
    return [node.target for graph in graphs for node in graph.nodes if RANDOM in getattr(node.target, "tags", ())]


def check_equal_to_pyro(exported, program, rows, *args):
    """Run the program, and the export on the noise that the program drew."""
    arguments = {name: tensor for name, tensor in args if isinstance(tensor, torch.Tensor)}
    with torch.no_grad(), record_noise() as noise:
        trace = poutine.trace(program).get_trace(*[value for _, value in args])
    left = {site: [draw.noise for draw in draws] for site, draws in noise.items()}
    feed = {item.name: left[item.site].pop(0) for item in exported.description.noise}
    feed |= {name: arguments[name] for name in (item.name for item in exported.description.inputs)}
    found = exported(feed)
    assert set(found) == {item.name for item in exported.description.outputs}
    for name, value in found.items():
        expected = trace.nodes[name]["value"]
        assert value.shape[0] == rows
        torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE.get(value.dtype, 0))


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    program = VAE(12, 3, [8])
    return program, export_sampler(program.model, 6, targets=["x"], latents=["z"])


def test_the_sampler_is_the_program_for_any_number_of_rows(vae):
    program, exported = vae
    assert not random_operations(exported)
    assert [(item.name, item.shape, item.dtype) for item in exported.description.noise] == [
        ("z/normal", ("rows", 3), "float32"),
        ("x/uniform", ("rows", 12), "float64"),
    ]
    for rows in (1, 2, 6, 50):
        check_equal_to_pyro(exported, program.model, rows, ("num_rows", rows))


def test_weights_are_weights_of_the_state_dict(vae):
    _, exported = vae
    assert set(exported.program.state_dict) == {f"vae_decoder.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    feed = {"z/normal": torch.zeros(4, 3), "x/uniform": torch.full((4, 12), 0.5, dtype=torch.float64)}
    before, bias = exported(feed)["x"], exported.program.state_dict["vae_decoder.2.bias"]
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.fill_(100.0)
    assert exported(feed)["x"].eq(1).all()
    assert not before.eq(1).all()
    with torch.no_grad():
        bias.copy_(kept)
    assert exported(feed)["x"].equal(before)


def test_a_sampler_is_a_copy_of_the_student(vae):
    program, exported = vae
    feed = {"z/normal": torch.zeros(4, 3), "x/uniform": torch.full((4, 12), 0.5, dtype=torch.float64)}
    before, kept = exported(feed)["x"], program.decoder[2].bias.detach().clone()
    with torch.no_grad():
        program.decoder[2].bias.fill_(100.0)
    assert exported(feed)["x"].equal(before)
    with torch.no_grad():
        program.decoder[2].bias.copy_(kept)


def test_draws_have_the_law_of_the_program(vae):
    program, exported = vae
    n = 20_000
    drawn = exported.sample(n, seed=0)
    means = drawn["x"].mean(0)
    with torch.no_grad():
        expected = poutine.trace(program.model).get_trace(n).nodes["x"]["value"].mean(0)
    error = (2 * expected * (1 - expected) / n).sqrt()
    assert ((means - expected).abs() / error).max() < 4.5
    assert exported.sample(5, seed=1)["z"].equal(exported.sample(5, seed=1)["z"])
    assert not exported.sample(5, seed=1)["z"].equal(exported.sample(5, seed=2)["z"])


def test_the_report_says_what_was_exported(vae):
    text = str(vae[1])
    for part in (
        "sampler of VAE.model",
        "z/normal",
        "(rows, 12)",
        "float64",
        "largest difference",
        "rows a second",
        "bytes",
    ):
        assert part in text
    assert vae[1].report.parameters == sum(p.numel() for p in vae[0].decoder.parameters())
    assert vae[1].report.largest_difference == 0


def test_arguments_are_inputs_and_observed_data_are_not():
    program = Bottleneck(4, 2, 3, (5,))
    x, label = torch.rand(6, 4), torch.zeros(6)
    exported = export_sampler(program.classify, x, label)
    assert [item.name for item in exported.description.inputs] == ["x"]
    assert [item.name for item in exported.description.outputs] == ["label"]
    assert [item.name for item in exported.description.noise] == ["z/normal", "label/exponential"]
    check_equal_to_pyro(exported, program.classify, 9, ("x", torch.rand(9, 4)))


def test_every_parameter_of_a_function_is_a_parameter():
    """Those of pyro.param with a constraint, of a module, and a tensor that is held by neither."""
    linear, bare = nn.Linear(2, 2), torch.randn(2, requires_grad=True)
    norm, constant = nn.BatchNorm1d(2), torch.tensor([1.0, 2.0])
    norm.running_mean.copy_(torch.tensor([0.5, -0.5]))

    def model(num_rows):
        scale = pyro.param("scale", torch.tensor([0.5, 2.0]), constraint=dist.constraints.positive)
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(norm(linear(z)) * constant + bare, scale).to_event(1))

    norm.eval()
    exported = export_sampler(model, 5, targets=["y"])
    state = exported.program.state_dict
    assert {name for name, tensor in state.items() if isinstance(tensor, nn.Parameter)} == {
        "scale",
        "linear.weight",
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "bare",
    }
    assert {"norm.running_mean", "norm.running_var", "constant"} < set(state)
    torch.testing.assert_close(state["scale"].detach(), torch.tensor([0.5, 2.0]).log())
    check_equal_to_pyro(exported, model, 7, ("num_rows", 7))


def test_float64_agrees_to_ten_digits(float64):
    def model(num_rows, loc):
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z", dist.Gamma(loc.exp(), 2.0))
            pyro.sample("y", dist.StudentT(3.0, z.log(), 0.5))

    exported = export_sampler(model, 4, torch.randn(4), targets=["y"], latents=["z"])
    assert {item.dtype for item in exported.description.outputs} == {"float64"}
    check_equal_to_pyro(exported, model, 11, ("num_rows", 11), ("loc", torch.randn(11)))


def test_noise_of_sites_outside_the_rows_has_fixed_shapes_and_unused_noise_is_left_out():
    def model(num_rows):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", num_rows):
            pyro.sample("idle", dist.Normal(0.0, 1.0))
            shift = torch.randn(num_rows)
            pyro.sample("y", dist.Normal(shift, scale))

    exported = export_sampler(model, 6, targets=["y"])
    assert [(item.name, item.shape) for item in exported.description.noise] == [
        ("scale/normal", ()),
        ("y/normal", ("rows",)),
        ("after idle/normal", ("rows",)),
    ]
    feed = {
        "scale/normal": torch.tensor(-2.0),
        "y/normal": torch.tensor([1.0, 0.0]),
        "after idle/normal": torch.tensor([0.0, 3.0]),
    }
    assert exported(feed)["y"].tolist() == [2.0, 3.0]


def test_frozen_programs_and_partials_are_exported():
    def model(scale, num_rows):
        with pyro.plate("rows", num_rows):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(3.0)), scale))

    model(1.0, 2)
    exported = export_sampler(functools.partial(freeze(model), 0.5), 4, targets=["y"])
    assert list(exported.program.state_dict) == ["loc"]
    assert exported({"y/normal": torch.tensor([2.0, 4.0])})["y"].tolist() == [4.0, 5.0]


def test_targets_are_the_observed_sites_or_are_named():
    def model(num_rows):
        with pyro.plate("rows", num_rows):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(
        NoTargetsError, match=r"observes no site in this call, .*'y'.* export_sampler\(\.\.\., targets=\[\.\.\.\]\)"
    ):
        export_sampler(model, 4)
    with pytest.raises(UnknownTargetError, match="'yy' is not a sample site of the program, .*Did you mean 'y'"):
        export_sampler(model, 4, targets=["yy"])
    with pytest.raises(UnknownTargetError, match="'w' is not a sample site"):
        export_sampler(model, 4, targets=["y"], latents=["w"])


def test_plates_and_factors_are_no_sites_that_come_out():
    def model(num_rows):
        pyro.factor("penalty", torch.tensor(0.0))
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(pyro.deterministic("double", 2 * z), 1.0))

    with pytest.raises(
        UnknownTargetError, match=r"'rows' is not a sample site of the program, which has 'z', 'double', 'y'\."
    ):
        export_sampler(model, 4, targets=["y", "rows"])
    with pytest.raises(NoTargetsError, match=r"Its sites are 'z', 'double', 'y'\."):
        export_sampler(model, 4)
    found = export_sampler(model, 4, targets=["y"], latents="*").description.outputs
    assert [item.name for item in found] == ["y", "z", "double"]


def plain(num_rows):
    with pyro.plate("rows", num_rows):
        pyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("rows", [-1, 0, 2.5, "7", True])
def test_a_number_of_rows_that_is_none_is_refused(rows):
    with pytest.raises(UnsupportedExportError, match=f"whole number of at least 1, not {rows!r}"):
        export_sampler(plain, 4, targets=["y"]).sample(rows)


def test_an_array_as_an_input_is_named():
    with pytest.raises(
        UnsupportedExportError, match=r"input 'y/normal' is a ndarray, and should be a tensor: torch.as_tensor"
    ):
        export_sampler(plain, 4, targets=["y"])({"y/normal": torch.zeros(3).numpy()})


def test_a_density_draws_nothing():
    with pytest.raises(UnsupportedExportError, match="a density has no rows to draw: call it on values"):
        export_density(plain, 4).sample(3)
