"""torch.export of a module that replays noise: the exported graph is the same function of the noise and draws nothing."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import record_noise, replay_noise
from pyro_kd.noise.record import NoiseRecord

ROWS = 8

LAWS = {
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "Gumbel": lambda: dist.Gumbel(0.0, 1.0),
    "Exponential": lambda: dist.Exponential(2.0),
    "Cauchy": lambda: dist.Cauchy(0.0, 1.0),
    "Gamma": lambda: dist.Gamma(0.5, 1.0),
    "Beta": lambda: dist.Beta(2.0, 0.5),
    "StudentT": lambda: dist.StudentT(3.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0])),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "VonMises": lambda: dist.VonMises(0.5, 3.0),
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "Categorical": lambda: dist.Categorical(torch.tensor([0.2, 0.3, 0.5])),
    "OneHotCategorical": lambda: dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])),
    "Poisson": lambda: dist.Poisson(3.0),
    "Geometric": lambda: dist.Geometric(0.3),
    "mixture": lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-2.0, 2.0]), 0.3)),
    "a flow": lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SoftplusTransform()]),
}


class Sampler(torch.nn.Module):
    """A program as a function of its noise."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.record = self.draw()

    def draw(self):
        with torch.no_grad(), record_noise() as record:
            self.program()
        return record

    def noise(self):
        record = self.draw()
        return tuple(draw.noise for draws in (*record.values(), *record.between.values()) for draw in draws)

    def forward(self, *noise):
        given = iter(noise)
        record = NoiseRecord()
        for mine, theirs in ((record._draws, self.record), (record.between, self.record.between)):
            for site, draws in theirs.items():
                mine[site] = tuple(dataclasses.replace(draw, noise=next(given)) for draw in draws)
        trace = poutine.trace(replay_noise(self.program, noise=record)).get_trace()
        return trace.nodes["x"]["value"]


def exported(program):
    sampler = Sampler(program)
    with pyro.validation_enabled(False):  # which reads values
        graph = torch.export.export(sampler, sampler.noise(), strict=False)
    return sampler, graph


def random_operations(graph):
    return [
        node.target for node in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]


@pytest.mark.parametrize("name", LAWS)
def test_the_exported_sampler_is_the_same_function_of_the_noise(name):
    pyro.set_rng_seed(0)

    def program():
        with pyro.plate("rows", ROWS):
            z = pyro.sample("z", LAWS[name]())
            pyro.sample("x", dist.Normal(z.float().reshape(ROWS, -1).sum(-1), 0.1))

    sampler, graph = exported(program)
    assert not random_operations(graph)
    other = sampler.noise()
    torch.testing.assert_close(graph.module()(*other), sampler(*other))


def test_noise_between_sites_is_an_input_too():
    pyro.set_rng_seed(0)

    def program():
        hidden = dist.Gamma(torch.ones(ROWS), 1.0)() + torch.randn(ROWS)
        with pyro.plate("rows", ROWS):
            pyro.sample("x", dist.Normal(hidden, torch.rand(ROWS)))

    sampler, graph = exported(program)
    assert not random_operations(graph)
    other = sampler.noise()
    assert len(other) == 4
    torch.testing.assert_close(graph.module()(*other), sampler(*other))
