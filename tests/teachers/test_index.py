"""The index of a draw: its law, its noise, and rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2

from pyro_kd import posterior_predictive, record_noise, replay_noise
from pyro_kd.divergences import kl
from pyro_kd.errors import InvalidProgramError
from pyro_kd.teachers import UniformIndex


@pytest.mark.parametrize("n", [1, 3, 5000])
def test_all_numbers_are_equally_likely(n):
    pyro.set_rng_seed(0)
    cells = min(n, 10)
    drawn = UniformIndex(n).sample((20_000,))
    assert drawn.min() >= 0
    assert drawn.max() < n
    counts = (drawn * cells // n).bincount(minlength=cells)
    statistic = ((counts - 20_000 / cells) ** 2 / (20_000 / cells)).sum()
    assert statistic <= chi2.ppf(1 - 1e-6, max(cells - 1, 1))


def test_densities_and_shapes():
    index = UniformIndex(8).expand([3, 2])
    assert index.sample((5,)).shape == (5, 3, 2)
    assert index.sample().dtype == torch.int64
    torch.testing.assert_close(index.log_prob(index.sample()).exp(), torch.full((3, 2), 1 / 8))
    assert index.enumerate_support().shape == (8, 3, 2)
    assert index.enumerate_support(expand=False).shape == (8, 1, 1)
    assert kl(UniformIndex(8), UniformIndex(8), torch.tensor(3)) == 0
    with pytest.raises(ValueError, match="support"):
        UniformIndex(8, validate_args=True).log_prob(torch.tensor(8))


def test_indices_of_different_ranges_share_noise_at_the_same_fraction():
    def program(n):
        with pyro.plate("rows", 500):
            return pyro.sample("draw", UniformIndex(n))

    with record_noise() as noise:
        large = program(1000)
    small = replay_noise(program, noise=noise)(10)
    assert (large // 100 == small).all()


def test_a_normal_latent_of_a_student_can_be_a_counterpart():
    def teacher():
        with pyro.plate("rows", 100):
            return pyro.sample("draw", UniformIndex(4))

    def student():
        with pyro.plate("rows", 100):
            return pyro.sample("draw", dist.Normal(0.0, 1.0))

    with record_noise() as noise:
        index = teacher()
    value = replay_noise(student, noise=noise)()
    assert ((dist.Normal(0.0, 1.0).cdf(value) * 4).long() == index).all()


def model(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0))


@pytest.mark.parametrize("rows", [lambda x: 0, lambda x: 2.5, lambda x: True, lambda x: x])
def test_rows_that_are_no_number_are_refused(rows):
    teacher = posterior_predictive(model, {"slope": torch.zeros(3)}, rows=rows)
    with pytest.raises(InvalidProgramError, match="rows must return the number of rows of a call.*rows=len.*rows=int"):
        teacher(torch.ones(4))


def test_rows_that_are_no_function_are_refused():
    with pytest.raises(InvalidProgramError, match="rows must be a function.*not 100.*rows=len"):
        posterior_predictive(model, {"slope": torch.zeros(3)}, rows=100)
