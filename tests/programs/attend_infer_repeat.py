"""Attend, infer, repeat: scenes with an unknown number of objects, drawn one after the other until no scene has another.

Exercises a loop whose length the draws decide, masks by those draws, and targets by a predicate: that an object is there is
a target as much as the scene, so that both programs count alike.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

from tests.programs import Program, trained

PIXELS, WHAT, MOST = 12, 2, 4


def make(width):
    decoder = nn.Sequential(nn.Linear(WHAT, width), nn.ReLU(), nn.Linear(width, PIXELS), nn.Sigmoid())

    def add_object(t, present, canvas):
        probability = pyro.param("another", lambda: 0.3 + 0.4 * torch.rand(()), constraint=constraints.unit_interval)
        loc = pyro.param("where_loc", lambda: 2 * torch.randn(()))
        scale = pyro.param("where_scale", lambda: 0.5 + torch.rand(()), constraint=constraints.positive)
        present = pyro.sample(f"present_{t}", dist.Bernoulli(probability * present))
        with poutine.mask(mask=present.bool()):
            where = pyro.sample(f"where_{t}", dist.Normal(loc, scale).expand([len(canvas)]))
            what = pyro.sample(f"what_{t}", dist.Normal(torch.zeros(WHAT), 1.0).to_event(1))
        window = (-(torch.linspace(-3, 3, PIXELS) - where[:, None]).square()).exp()
        return present, canvas + present[:, None] * window * decoder(what)

    def model(images):
        pyro.module("decoder", decoder)
        scenes = len(images)
        with pyro.plate("scenes", scenes):
            present, canvas, t = torch.ones(scenes), torch.zeros(scenes, PIXELS), 0
            while present.any() and t < MOST:
                present, canvas = add_object(t, present, canvas)
                t += 1
            pyro.sample("image", dist.Normal(canvas, 0.3).to_event(1), obs=images)

    return model


def is_target(site):
    return site["name"] == "image" or site["name"].startswith("present")


def program():
    images = torch.rand(16, PIXELS)
    return Program(trained(make(16), images), make(5), (images,), {"targets": is_target})
