"""Item response theory with two parameters an item: persons have abilities, items a difficulty and a discrimination.

Exercises two crossed plates, LogNormal latents, and answers missing at random by ``poutine.mask``.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

from tests.programs import Program, trained


def model(answers, answered):
    persons, items = answers.shape
    spread = pyro.param("spread", lambda: 0.5 + torch.rand(()), constraint=constraints.positive)
    hardness = pyro.param("hardness", lambda: torch.randn(items))
    sharpness = pyro.param("sharpness", lambda: 0.5 * torch.randn(items))
    by_person, by_item = pyro.plate("persons", persons, dim=-2), pyro.plate("items", items, dim=-1)
    with by_person:
        ability = pyro.sample("ability", dist.Normal(0.0, spread))
    with by_item:
        difficulty = pyro.sample("difficulty", dist.Normal(hardness, 0.3))
        discrimination = pyro.sample("discrimination", dist.LogNormal(sharpness, 0.2))
    with by_person, by_item, poutine.mask(mask=answered):
        pyro.sample("answer", dist.Bernoulli(logits=discrimination * (ability - difficulty)), obs=answers)


def program():
    args = (dist.Bernoulli(0.5).sample((20, 6)), torch.rand(20, 6) < 0.8)
    return Program(trained(model, *args), model, args)
