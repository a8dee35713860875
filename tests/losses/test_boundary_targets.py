"""The boundary gradient at a discrete latent that depends on an earlier target: that target keeps its value in the runs on changed noise."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import SurrogateKD
from pyro_kd.errors import UnsupportedGradientError

THEIRS, OWN = torch.tensor([-0.5, 0.7]).double(), torch.tensor([0.4, 0.2]).double()
ROWS = 20_000


def of_a_normal(weights, y):
    return torch.sigmoid(weights[0] + weights[1] * y)


def program(weights, law, rows, x=lambda z: dist.Normal(z, 1.0)):
    """Target y, then a bit z that depends on it, then target x."""
    with pyro.plate("rows", rows):
        y = pyro.sample("y", law)
        z = pyro.sample("z", dist.Bernoulli(of_a_normal(weights, y)))
        pyro.sample("x", x(z))


def exact_gradient(points, probabilities):
    """Of the mean over y of |p - p'| / 2, the probability that the two bits differ times (1 - 0)^2 / 2."""
    own = OWN.clone().requires_grad_()
    gap = (of_a_normal(own, points) - of_a_normal(THEIRS, points)).abs() / 2
    (gradient,) = torch.autograd.grad((probabilities * gap).sum(), own)
    return gradient


GRID = torch.linspace(-8, 8, 4001).double()
LAWS = {
    "normal": (
        dist.Normal(torch.zeros(()).double(), 1.0),
        GRID,
        (-GRID * GRID / 2).exp() / math.sqrt(2 * math.pi) * 16 / 4000,
    ),
    "bit": (
        dist.Bernoulli(torch.tensor(0.5).double()),
        torch.tensor([0.0, 1.0]).double(),
        torch.tensor([0.5, 0.5]).double(),
    ),
}


@pytest.mark.parametrize("kind", ["score", "boundary", "boundary_all"])
@pytest.mark.parametrize(("law", "points", "probabilities"), LAWS.values(), ids=LAWS)
def test_the_gradient_through_a_latent_after_a_target_is_exact(law, points, probabilities, kind):
    own = OWN.clone().requires_grad_()
    pyro.set_rng_seed(0)
    loss = SurrogateKD(["y", "x"], discrete_gradient=kind)
    value = loss(lambda: program(own, law, ROWS), lambda: program(THEIRS, law, ROWS))() / ROWS
    (gradient,) = torch.autograd.grad(value, own)
    assert gradient.tolist() == pytest.approx(exact_gradient(points, probabilities).tolist(), abs=0.006)


class NoMap(dist.Normal):
    """A family whose noise is not torch's."""

    has_rsample = False

    def sample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scale * torch.as_tensor(np.random.default_rng(0).standard_normal(shape), dtype=self.loc.dtype)


def test_a_target_whose_noise_cannot_be_recorded_is_refused():
    law = NoMap(torch.zeros(()), 1.0)
    own = OWN.float().requires_grad_()
    loss = SurrogateKD(["y", "x"], discrete_gradient="boundary")
    with pytest.raises(UnsupportedGradientError, match="'y', which comes before it, cannot be recorded"):
        loss(lambda: program(own, law, 1), lambda: program(THEIRS.float(), law, 1))()


def test_a_later_target_may_be_of_any_family():
    own = OWN.clone().requires_grad_()
    law, _, _ = LAWS["bit"]
    loss = SurrogateKD(["y", "x"], discrete_gradient="boundary")
    programs = (lambda weights: lambda: program(weights, law, 1, lambda z: NoMap(z + 3.0, 1.0)) for _ in range(2))
    loss(*(make(weights) for make, weights in zip(programs, (own, THEIRS), strict=True)))().backward()
    assert own.grad.isfinite().all()
