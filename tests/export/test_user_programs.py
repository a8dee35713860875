"""Programs as users write them: their files load again, weights are there once, and what cannot be right is refused."""

import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd.errors import ExportMismatchError, UnsupportedExportError
from pyro_kd.export import export_density, export_sampler, load, load_onnx


def program(make):
    """Rows of z, and of y whose law ``make(z, n)`` returns for n rows."""

    def model(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", make(z, n))

    return model


LAWS = {
    "log-normal": lambda z, n: dist.LogNormal(z, 1.0),
    "a vector": lambda z, n: dist.MultivariateNormal(torch.stack([z, z], -1), torch.eye(2)),
    "Student's t": lambda z, n: dist.StudentT(3.0, z, 1.0),
    "masked": lambda z, n: dist.Normal(z, 1.0).mask(False),
    "a root of the rows": lambda z, n: dist.Normal(z / z.shape[0] ** 0.5, 1.0),
    "a power by the rows": lambda z, n: dist.Normal(z * 0.9 ** z.shape[0], 1.0),
    "pairs of rows": lambda z, n: dist.Normal(z + (z[:, None] * z[None]).flatten().sum(), 1.0),
    "an ellipsis": lambda z, n: dist.Normal(torch.einsum("...i,i->...", z[:, None], torch.ones(1)), 1.0),
    "a number of a tensor": lambda z, n: dist.Normal(z + z.mean().item(), 1.0),
    "chosen rows": lambda z, n: dist.Normal(z + z[z > 0].sum(), 1.0),
}


@pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)
def test_a_file_that_was_saved_is_loaded(make, tmp_path):
    sampler = export_sampler(program(make), 4, targets=["y"], path=tmp_path / "y.pt2")
    again = load(tmp_path / "y.pt2")
    for rows in (1, 3, 9):
        assert torch.equal(again.sample(rows, seed=0)["y"], sampler.sample(rows, seed=0)["y"])


def of_a_generator():
    return torch.randn(3, generator=torch.Generator().manual_seed(0))


def of_a_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(3)


@pytest.mark.parametrize("draw", [of_a_generator, of_a_seed])
def test_noise_that_is_the_same_in_every_run_is_no_input(draw):
    with pytest.raises(
        UnsupportedExportError, match=r"sets torch's random stream, or draws from a torch\.Generator of its own"
    ):
        export_sampler(program(lambda z, n: dist.Normal(z + draw().sum(), 1.0)), 4, targets=["y"])


def test_a_branch_for_a_single_row_is_found():
    def standardised(z, n):
        return dist.Normal((z - z.mean()) / z.std() if z.shape[0] > 1 else z, 0.1)

    with pytest.raises(ExportMismatchError, match="with 1 rows"):
        export_sampler(program(standardised), 5, targets=["y"])


@dataclass
class Batch:
    x: object


@pytest.mark.parametrize("value", [Batch(torch.ones(4)), Batch(np.ones(4)), np.ones(4)])
def test_an_object_around_tensors_is_refused_as_an_argument(value):
    def model(batch, n):
        with pyro.plate("rows", n):
            pyro.sample("y", dist.Normal(torch.as_tensor(getattr(batch, "x", batch)).mean().float(), 1.0))

    with pytest.raises(UnsupportedExportError, match="argument 'batch' is or holds an array or tensor inside of a"):
        export_sampler(model, value, 4, targets=["y"])


def test_arguments_that_a_program_writes_to_stay_as_they_were():
    def model(x):
        x[:] = x + 1
        with pyro.plate("rows", x.shape[0]):
            pyro.sample("y", dist.Normal(x, 1.0))

    example, given = torch.ones(4), torch.zeros(3)
    sampler = export_sampler(model, example, targets=["y"])
    assert sampler({"x": given, "y/normal": torch.zeros(3)})["y"].tolist() == [1.0, 1.0, 1.0]
    assert example.tolist() == [1.0] * 4
    assert given.tolist() == [0.0] * 3


@pytest.mark.parametrize("export", [export_sampler, export_density])
def test_an_export_leaves_the_random_stream_as_it_was(export):
    options = {"targets": ["y"]} if export is export_sampler else {}
    torch.manual_seed(0)
    expected = torch.randn(())
    torch.manual_seed(0)
    export(program(lambda z, n: dist.Normal(z, 1.0)), 5, **options)
    assert torch.randn(()) == expected


NETWORKS = {
    "GRU": (lambda: nn.GRU(4, 4, batch_first=True), True),
    "LSTM": (lambda: nn.LSTM(4, 4, batch_first=True), True),
    "RNN": (lambda: nn.RNN(4, 4, batch_first=True), True),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), False),
}


@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_that_may_drop_out_and_does_not_is_exported(make, tmp_path):
    network, is_pair = NETWORKS[make][0](), NETWORKS[make][1]

    def model(x):
        hidden = network(x)[0] if is_pair else network(x)
        with pyro.plate("rows", x.shape[0]):
            pyro.sample("y", dist.Normal(hidden, 1.0).to_event(2))

    sampler = export_sampler(model, torch.randn(6, 5, 4), targets=["y"], path=tmp_path / "y.pt2")
    x = torch.randn(3, 5, 4)
    expected = sampler.sample(seed=0, x=x)["y"]
    assert torch.equal(load(tmp_path / "y.pt2").sample(seed=0, x=x)["y"], expected)
    pytest.importorskip("onnxscript")
    sampler.save(tmp_path / "y.onnx")
    found = load_onnx(tmp_path / "y.onnx").sample(seed=0, x=x.numpy())["y"]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_a_weight_that_is_used_at_each_step_is_there_once(tmp_path):
    cell, tied = nn.GRUCell(3, 8), nn.Linear(8, 8)

    def model(x):
        hidden = torch.zeros(x.shape[0], 8)
        for step in range(6):
            hidden = tied(tied(cell(x[:, step], hidden)))
        with pyro.plate("rows", x.shape[0]):
            pyro.sample("y", dist.Normal(hidden, 1.0).to_event(1))

    sampler = export_sampler(model, torch.randn(4, 6, 3), targets=["y"], path=tmp_path / "y.pt2")
    state = load(tmp_path / "y.pt2").program.state_dict
    for found in (sampler.program.state_dict, state):
        assert sum(value.numel() for value in found.values()) == sum(
            p.numel() for net in (cell, tied) for p in net.parameters()
        )
    assert sorted(state) == sorted(
        f"{part}.{name}" for part, net in (("cell", cell), ("tied", tied)) for name, _ in net.named_parameters()
    )


def far_out(x):
    with pyro.plate("rows", x.shape[0]):
        pyro.sample("y", dist.Bernoulli(logits=x))


def by_sums(x):
    with pyro.plate("rows", x.shape[0]):
        scale = torch.logaddexp(x, torch.zeros(())) + nn.functional.softplus(x) - nn.functional.logsigmoid(x) + 1
        pyro.sample("y", dist.Normal(0.0, scale))


@pytest.mark.parametrize("model", [far_out, by_sums])
def test_an_onnx_density_is_right_far_from_the_example(model, tmp_path):
    """The converter's own sigmoid is 0 in float32 from -18 on, and its sum of exponentials infinite from 89 on."""
    pytest.importorskip("onnxscript")
    density = export_density(model, torch.tensor([1.0, 2.0, 3.0]))
    density.save(tmp_path / "y.onnx")
    program = load_onnx(tmp_path / "y.onnx")
    x = torch.tensor([-120.0, -50.0, -18.0, -15.0, -10.0, -5.0, 0.0, 5.0, 15.0, 30.0, 95.0, 120.0])
    for y in (torch.zeros_like(x), torch.ones_like(x)):
        found = program({"x": x.numpy(), "y": y.numpy()})["log_prob"]
        np.testing.assert_allclose(found, density({"x": x, "y": y})["log_prob"].numpy(), rtol=1e-5, atol=1e-6)
        assert np.isfinite(found).all()


def test_an_onnx_program_has_as_many_rows_as_its_inputs(tmp_path):
    pytest.importorskip("onnxscript")

    def guide(x):
        with pyro.plate("rows", x.shape[0]):
            pyro.sample("z", dist.Bernoulli(logits=x[:, 0]))

    sampler = export_sampler(guide, torch.randn(4, 3), targets=["z"])
    sampler.save(tmp_path / "z.onnx")
    program, x = load_onnx(tmp_path / "z.onnx"), np.zeros((40, 3), dtype=np.float32)
    found = program.sample(seed=0, x=x)["z"]
    assert found.shape == (40,)
    assert 0 < found.mean() < 1
    with pytest.raises(UnsupportedExportError, match=r"different numbers of rows: \[1, 40\]"):
        program({"x": x, "z/uniform": np.full(1, 0.5)})
    assert math.isclose(found.mean(), sampler.sample(seed=0, x=torch.from_numpy(x))["z"].mean().item())


def test_a_bound_that_an_argument_gives_is_not_that_of_the_example():
    def model(total):
        with pyro.plate("rows", total.shape[0]):
            pyro.sample("k", dist.Binomial(total, torch.tensor(0.5)))

    density = export_density(model, torch.full((4,), 10.0))
    k, total = torch.tensor([15.0, 3.0]), torch.tensor([20.0, 10.0])
    found = density({"k": k, "total": total})["log_prob"]
    torch.testing.assert_close(found, dist.Binomial(total, torch.tensor(0.5)).log_prob(k))


def test_a_bound_that_is_a_constant_is_checked():
    density = export_density(program(lambda z, n: dist.Binomial(10, torch.sigmoid(z))), 4)
    with pytest.raises(UnsupportedExportError, match="whole numbers from 0 to 10"):
        density({"z": torch.zeros(2), "y": torch.tensor([3.0, 11.0])})


class WithCache(nn.Module):
    """Makes its positions anew when the number of rows changes."""

    def __init__(self):
        super().__init__()
        self.positions = torch.zeros(0)

    def forward(self, z):
        if self.positions.shape[0] != z.shape[0]:
            self.positions = torch.arange(z.shape[0]) / 10
        return z * self.positions


@pytest.mark.parametrize("export", [export_sampler, export_density])
def test_a_network_that_keeps_what_it_has_computed_works_after_an_export(export):
    """Which is refused: how it goes on depends on the number of rows of the call before."""
    network = WithCache()
    model, options = (
        program(lambda z, n: dist.Normal(network(z), 1.0)),
        {"targets": ["y"]} if export is export_sampler else {},
    )
    model(5)
    with pytest.raises((UnsupportedExportError, ExportMismatchError)):
        export(model, 5, **options)
    assert type(network.positions) is torch.Tensor
    model(5)
    model(4)
