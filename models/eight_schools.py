"""The eight schools: a hierarchical model of eight estimated effects with known standard errors, and two laws to imitate it with.

    mu, tau -> theta of each school -> the estimated effect of each school

Data and model: Rubin, Estimation in Parallel Randomized Experiments, 1981; Gelman et al., Bayesian Data Analysis, section 5.5.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["EFFECTS", "ERRORS", "EightSchools", "GaussianSchools"]

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


class EightSchools(nn.Module):
    """The Bayesian model, non-centred.

    Sites: ``mu``, the mean effect; ``tau``, the spread of the schools; ``eta`` of event shape (8,), the standardised effects; and
    ``effects`` of event shape (8,), the estimated effects.
    """

    effects: Tensor
    errors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("effects", torch.tensor(EFFECTS))
        self.register_buffer("errors", torch.tensor(ERRORS))

    def forward(self, effects: Tensor | None = None) -> None:
        """Draw parameters and estimated effects, or score effects of shape (8,)."""
        zero = torch.zeros_like(self.errors)
        mu = pyro.sample("mu", dist.Normal(zero[0], 10.0))
        tau = pyro.sample("tau", dist.HalfNormal(zero[0] + 10.0))
        eta = pyro.sample("eta", dist.Normal(zero, 1.0).to_event(1))
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * eta
        pyro.sample("effects", dist.Normal(theta, self.errors).to_event(1), obs=effects)


class GaussianSchools(nn.Module):
    """A Gaussian law of the eight estimates, the site ``effects`` of event shape (8,).

    Args:
        rank: rank of the covariance between schools; 0 for schools that are independent.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.mean = nn.Parameter(torch.zeros(8))
        self.log_spread = nn.Parameter(torch.full((8,), 2.5))
        self.loadings = nn.Parameter(torch.randn(8, rank))

    def law(self) -> dist.TorchDistribution:
        """The distribution, of event shape (8,)."""
        spread = self.log_spread.exp()
        if not self.rank:
            return dist.Normal(self.mean, spread).to_event(1)
        return dist.LowRankMultivariateNormal(self.mean, self.loadings, spread.square())

    def forward(self) -> None:
        """Draw the estimates."""
        pyro.module("schools", self)
        pyro.sample("effects", self.law())
