"""What an export refuses says why, and what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch.nn import functional

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export import export_density, export_sampler, load


def rows_of(shift):
    """Rows of z, three numbers, and of y, which depends on ``shift(z, n)``."""

    def model(n):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(shift(z, n).sum(-1), 1.0))

    return model


class Counter:
    """Depends on how often it has run: on the remainder by ``period``."""

    def __init__(self, period):
        self.period, self.runs = period, 0

    def __call__(self, z, n):
        self.runs += 1
        return z + self.runs % self.period


REFUSED = {
    "dropout": (
        lambda z, n: functional.dropout(z, 0.5),
        r"inside of one of torch's own functions.*bernoulli_ at .*Make the draw",
    ),
    "Gumbel softmax": (lambda z, n: functional.gumbel_softmax(z), "inside of one of torch's own functions.*exponential_ at"),
    "a slice": (lambda z, n: z + z[:5].mean(), "something else for other numbers of rows.*hold for 5 <= rows alone"),
    "a range": (
        lambda z, n: z + torch.tensor([float(i) for i in range(n)])[:, None],
        "the number of rows into a plain number",
    ),
    "a switch": (Counter(2), "'y' another value when it runs again on the same noise"),
    "a counter": (Counter(10**6), "'y' another value when it runs again on the same noise"),
}


@pytest.mark.parametrize(("shift", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_of_a_sampler_names_the_reason(shift, reason):
    with pytest.raises(UnsupportedExportError, match=reason):
        export_sampler(rows_of(shift), 5, targets=["y"])


def in_turn(n):
    for i in pyro.plate("rows", n):
        pyro.sample(f"y{i}", dist.Normal(0.0, 1.0))


def subsampled(x):
    with pyro.plate("rows", len(x), subsample_size=4) as chosen:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[chosen])


@pytest.mark.parametrize(
    ("program", "example", "reason"),
    [
        (in_turn, 4, "not every run has 'y1', 'y2', 'y3'.*as a context"),
        (subsampled, torch.zeros(8), "plate 'rows' takes a subsample.*Leave out subsample_size"),
        (rows_of(Counter(2)), 5, "another value when it runs again"),
    ],
)
def test_a_refusal_of_a_density_names_the_reason(program, example, reason):
    with pytest.raises(UnsupportedExportError, match=reason):
        export_density(program, example)


def test_a_program_without_inputs_is_refused():
    def model():
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))

    guide = AutoDelta(model)
    guide()
    with pytest.raises(UnsupportedExportError, match="AutoDelta takes no noise and no arguments"):
        export_sampler(guide, targets=["z"])


@pytest.mark.parametrize("family", [dist.Normal, dist.Uniform, dist.Laplace])
def test_a_program_in_bfloat16_takes_noise_in_float32(family, tmp_path):
    one = torch.ones((), dtype=torch.bfloat16)

    def model(n):
        with pyro.plate("rows", n):
            pyro.sample("y", family(one, 2 * one))

    export_sampler(model, 5, targets=["y"], path=tmp_path / "y.pt2")
    sampler = load(tmp_path / "y.pt2")
    assert [item.dtype for item in sampler.description.noise] == ["float32"]
    y = sampler.sample(4000, seed=0)["y"]
    assert y.dtype is torch.bfloat16
    assert y.isfinite().all()
    law = family(1.0, 2.0)
    assert abs(y.double().mean() - law.mean) < 5 * law.stddev / 4000**0.5
