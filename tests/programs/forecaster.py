"""Structural time series: a local level that drifts, a weekly season, regression on covariates, and heavy-tailed noise.

Exercises a plate over time with ``cumsum`` and ``periodic_repeat``, and plates by dimension for series and time.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.tensor_utils import periodic_repeat
from torch.distributions import constraints

from tests.programs import Program, trained


def positive(name, low=0.1):
    return pyro.param(name, lambda: low + 0.4 * torch.rand(()), constraint=constraints.positive)


def model(data, covariates):
    series, duration = data.shape
    trend = pyro.param("trend", lambda: 0.2 * torch.randn(()))
    season_loc = pyro.param("season_loc", lambda: torch.randn(7))
    weight_loc = pyro.param("weight_loc", lambda: torch.randn(covariates.shape[-1]))
    weight = pyro.sample("weight", dist.Normal(weight_loc, positive("weight_scale")).to_event(1))
    by_series, by_time = pyro.plate("series", series, dim=-2), pyro.plate("time", duration, dim=-1)
    with by_series:
        start = pyro.sample("start", dist.Normal(0.0, positive("start_scale", 0.5)))
    with by_series, pyro.plate("weekday", 7, dim=-1):
        season = pyro.sample("season", dist.Normal(season_loc, positive("season_scale")))
    with by_series, by_time:
        drift = pyro.sample("drift", dist.Normal(trend, positive("drift_scale")))
    level = start + drift.cumsum(-1)
    prediction = level + periodic_repeat(season, duration, dim=-1) + covariates @ weight
    df = pyro.param("df", lambda: 3 + 4 * torch.rand(()), constraint=constraints.greater_than(2.0))
    with by_series, by_time:
        pyro.sample("data", dist.StudentT(df, prediction, positive("noise")), obs=data)


def program():
    args = (torch.randn(3, 21), torch.randn(21, 2))
    return Program(trained(model, *args), model, args)
