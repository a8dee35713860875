"""Operations that ONNX lacks or expresses less well, as plain ones: equal to torch's."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.export import export_sampler, load_onnx
from pyro_kd.export.stable_operations import STABLE

aten = torch.ops.aten

EDGES = torch.cat([torch.logspace(-16, -1, 200, dtype=torch.float64), torch.zeros(1).double()])
UNIT = torch.cat([torch.linspace(-1, 1, 2001).double(), 1 - EDGES, EDGES - 1])
REAL = torch.cat(
    [torch.logspace(-20, 200, 500, dtype=torch.float64), -torch.logspace(-20, 200, 500, dtype=torch.float64), EDGES]
)


@pytest.mark.parametrize(("name", "x"), [("acos", UNIT), ("asin", UNIT), ("atan", REAL)])
def test_angles_in_float64_are_those_of_torch(name, x):
    operation = getattr(aten, name).default
    torch.testing.assert_close(STABLE[operation](x), operation(x), rtol=1e-15, atol=5e-16)
    assert STABLE[operation](x.float()) is NotImplemented


def test_the_cosine_of_no_angle_is_no_number():
    assert STABLE[aten.acos.default](torch.tensor([2.0, -1.5]).double()).isnan().all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_products_are_those_of_torch(size, dim):
    torch.manual_seed(0)
    x = torch.randn(size, size, size, dtype=torch.float64)
    torch.testing.assert_close(STABLE[aten.prod.dim_int](x, dim), x.prod(dim))
    torch.testing.assert_close(STABLE[aten.prod.dim_int](x, dim, True), x.prod(dim, keepdim=True))
    torch.testing.assert_close(STABLE[aten.cumprod.default](x, dim), x.cumprod(dim))


def stick_breaking(n):
    with pyro.plate("rows", n):
        beta = pyro.sample("beta", dist.Beta(torch.ones(4), 2.0).to_event(1))
        weights = (1 - beta).cumprod(-1)
        pyro.sample("y", dist.Normal(weights.sum(-1), weights.prod(-1) + 0.1))


def angles(n):
    with pyro.plate("rows", n):
        z = pyro.sample("z", dist.VonMises(torch.zeros(()), 2.0))
        pyro.sample("y", dist.Normal((z.double() / 4).acos() + z.double().atan(), torch.ones(()).double()))


@pytest.mark.parametrize("program", [stick_breaking, angles])
def test_they_are_in_an_onnx_file(program, tmp_path):
    pytest.importorskip("onnxruntime")
    export_sampler(program, 5, targets=["y"], path=tmp_path / "y.onnx")  # which compares it with the program
    assert load_onnx(tmp_path / "y.onnx").sample(3, seed=0)["y"].shape == (3,)
