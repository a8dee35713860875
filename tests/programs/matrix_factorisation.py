"""Probabilistic matrix factorisation of ratings, of which some are missing.

Exercises ``obs_mask``: known ratings are observed and the others are latents of the same law, at one ``pyro.sample``
statement.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

USERS, FILMS, RANK = 12, 9, 2


def model(ratings, known):
    taste = pyro.param("taste", lambda: torch.randn(USERS, RANK))
    style = pyro.param("style", lambda: torch.randn(FILMS, RANK))
    noise = pyro.param("noise", lambda: 0.3 + torch.rand(()), constraint=constraints.positive)
    by_user, by_film = pyro.plate("users", USERS, dim=-2), pyro.plate("films", FILMS, dim=-1)
    with by_user:
        u = pyro.sample("u", dist.Normal(taste[:, None], 0.3).to_event(1))
    with by_film:
        v = pyro.sample("v", dist.Normal(style, 0.3).to_event(1))
    with by_user, by_film:
        return pyro.sample("rating", dist.Normal((u * v).sum(-1), noise), obs=ratings, obs_mask=known)


def program():
    args = (torch.randn(USERS, FILMS), torch.rand(USERS, FILMS) < 0.7)
    return Program(trained(model, *args), model, args)
