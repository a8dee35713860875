"""Plain numbers keep their digits in float64 graphs of ONNX."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd.export import export_sampler, load, load_onnx
from pyro_kd.export.exact_numbers import with_exact_numbers
from pyro_kd.export.graph import quietly

OPERATIONS = {
    "add": lambda x: x + 0.1,
    "divide": lambda x: 0.1 / x + x / 0.3,
    "subtract": lambda x: 0.1 - x,
    "power": lambda x: x**0.3 + 0.3**x,
    "clamp": lambda x: x.clamp(0.1, 0.7) + x.clamp(min=1e-300) + x.clamp(max=0.3),
    "where": lambda x: torch.where(x > 0.5, 0.1, x) + torch.where(x > 0.5, x, 0.1),
    "compare": lambda x: (x < 0.4 + 1e-12).double() + (x > 0.4 - 1e-12).double(),
    "fill": lambda x: torch.full_like(x, 0.1) + torch.full((3,), 0.7, dtype=torch.float64) + x.new_full((3,), 0.3),
    "mask": lambda x: x.masked_fill(x > 0.5, 0.1),
    "interpolate": lambda x: torch.lerp(x, 2 * x, 0.1),
}


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def exported(function, x):
    with quietly():
        return torch.export.export(Module(function), (x,), strict=False).run_decompositions({})


def value(program, x):
    with quietly():
        return program.module()(x)


def rounded_numbers(program):
    numbers = [number for node in program.graph.nodes for number in node.args if type(number) is float]
    return [number for number in numbers if float(torch.tensor(number)) != number]


@pytest.mark.parametrize("name", OPERATIONS)
def test_numbers_become_tensors_and_values_stay(name):
    x = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    program = exported(OPERATIONS[name], x)
    kept = value(program, x)
    exact = with_exact_numbers(program)
    assert rounded_numbers(program)
    assert not rounded_numbers(exact)
    assert value(exact, x).equal(kept)
    assert kept.equal(OPERATIONS[name](x))


def test_float32_and_numbers_without_rounding_are_left_alone():
    for program in (exported(lambda x: x * 0.1, torch.ones(3)), exported(lambda x: x * 0.5 + 1, torch.ones(3).double())):
        assert with_exact_numbers(program) is program


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_onnx_runtime_gives_all_digits(name, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

    def model(num_rows):
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z", dist.Exponential(torch.ones((), dtype=torch.float64)).expand([3]).to_event(1))
            pyro.sample("y", dist.Normal(OPERATIONS[name](z), 0.7).to_event(1))

    report = export_sampler(model, 4, targets=["y"]).save(tmp_path / "a.onnx", tolerance=1e-13)
    assert report.largest_difference < 1e-13


def test_a_float64_program_is_the_same_in_both_files(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

    def model(num_rows):
        with pyro.plate("rows", num_rows):
            w = pyro.sample("w", dist.Dirichlet(torch.full((3,), 0.3, dtype=torch.float64)))
            pyro.sample("y", dist.Normal(0.1 * w[..., 0] + w[..., 1] / 0.3, torch.tensor(0.7, dtype=torch.float64)))

    sampler = export_sampler(model, 4, targets=["y"], latents=["w"], path=tmp_path / "a.pt2")
    sampler.save(tmp_path / "a.onnx")
    one, two = load(tmp_path / "a.pt2").sample(50, seed=0), load_onnx(tmp_path / "a.onnx").sample(50, seed=0)
    for name in ("w", "y"):
        torch.testing.assert_close(torch.from_numpy(two[name]), one[name], rtol=1e-10, atol=1e-10)
