"""Compartments of an epidemic: susceptible, infectious and recovered people, with binomial transitions and reports.

Exercises counts that bound later counts: the transitions are targets beside the reports, since a student that had infected
fewer people than the teacher reports would give them probability 0.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

POPULATION, DAYS = 200.0, 8


def model(reports):
    log_rate = pyro.param("log_rate", lambda: 0.5 * torch.randn(()))
    period = pyro.param("period", lambda: 3 + 4 * torch.rand(()), constraint=constraints.greater_than(1.0))
    shapes = pyro.param("shapes", lambda: 2 + 4 * torch.rand(2), constraint=constraints.positive)
    rate = pyro.sample("rate", dist.LogNormal(log_rate, 0.2))
    rho = pyro.sample("rho", dist.Beta(shapes[0], shapes[1]))
    susceptible, infectious = torch.tensor(POPULATION - 20), torch.tensor(20.0)
    for t in pyro.markov(range(DAYS)):
        infected = pyro.sample(f"infected_{t}", dist.Binomial(susceptible, -torch.expm1(-rate * infectious / POPULATION)))
        recovered = pyro.sample(f"recovered_{t}", dist.Binomial(infectious, 1 / period))
        susceptible, infectious = susceptible - infected, infectious + infected - recovered
        pyro.sample(f"report_{t}", dist.Binomial(infected, rho), obs=reports[t])


def is_target(site):
    return site["name"].startswith(("infected", "recovered", "report"))


def program():
    reports = torch.full((DAYS,), 2.0)
    return Program(trained(model, reports), model, (reports,), {"targets": is_target})
