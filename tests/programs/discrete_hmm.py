"""Hidden Markov model with discrete states and binary tones, for sequences of unequal lengths.

Exercises ``pyro.markov`` over a loop, ``poutine.mask`` for padding, nested plates, parallel enumeration, and parameters
on the simplex and the unit interval.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

from tests.programs import Program, trained

STATES, TONES = 4, 5


def model(sequences, lengths):
    probs_x = pyro.param("probs_x", lambda: torch.randn(STATES, STATES).softmax(-1), constraint=constraints.simplex)
    probs_y = pyro.param("probs_y", lambda: 0.1 + 0.8 * torch.rand(STATES, TONES), constraint=constraints.unit_interval)
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2):
        x = torch.zeros(len(sequences), 1, dtype=torch.long)
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[:, t])


def program():
    lengths = torch.tensor([5, 5, 4, 4, 3, 3, 2, 1])
    args = (dist.Bernoulli(0.5).sample((8, 5, TONES)), lengths)
    return Program(trained(model, *args), model, args, lr=0.05)
