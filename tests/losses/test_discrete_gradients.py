"""Gradients through discrete latents, held to enumeration."""

import pytest
import torch

from tests.support.coupled_chains import BINOMIALS, BITS, CATEGORIES, GEOMETRIC, POISSON

pytestmark = pytest.mark.usefixtures("float64")

CHAINS = {"bits": BITS, "binomials": BINOMIALS, "poisson": POISSON, "geometric": GEOMETRIC, "categories": CATEGORIES}


def deviations(estimates, truth):
    """The errors of a mean in units of its standard errors, one for each weight. Estimates without any spread must be exact."""
    error, spread = estimates.mean(0) - truth, estimates.std(0) / len(estimates) ** 0.5
    fixed = spread < 1e-12
    assert torch.allclose(error[fixed], torch.zeros(()), atol=1e-9)
    return (error / spread)[~fixed]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "score") for name in CHAINS),
        *((name, "boundary") for name in CHAINS if name != "categories"),
        ("bits", "boundary_all"),
        ("binomials", "boundary_all"),
    ],
)
def test_boundary_and_score_are_unbiased(name, kind):
    chain = CHAINS[name]
    assert deviations(chain.gradients(kind), chain.exact_gradient()).abs().max() < 5


@pytest.mark.parametrize("name", CHAINS)
def test_a_cut_gradient_is_not(name):
    """So the test above has power."""
    chain = CHAINS[name]
    estimates, truth = chain.gradients("cut"), chain.exact_gradient()
    error, spread = estimates.mean(0) - truth, estimates.std(0) / len(estimates) ** 0.5
    assert (error.abs() > 15 * spread + 1e-3).any()
