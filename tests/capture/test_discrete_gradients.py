"""Gradients through discrete latents in a captured loss are those of an eager one on the same random stream."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, outcome
from tests.support.losses import SurrogateKD

pytestmark = [*MARKS, pytest.mark.usefixtures("float64")]

PARTICLES = {
    "one": {},
    "loop": {"num_particles": 2},
    "vectorised": {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1},
}


class Layers(nn.Module):
    """Two layers of two units, batch norm, and a target."""

    def __init__(self, seed, family):
        super().__init__()
        torch.manual_seed(seed)
        self.family = family
        self.start = nn.Parameter(torch.randn(2))
        self.link, self.last = nn.Linear(2, 2), nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", self.family(self.start).to_event(1))
            x = pyro.sample("x", self.family(self.link(z)).to_event(1))
            x = self.norm(x.reshape(-1, 2)).reshape(x.shape)
            pyro.sample("y", dist.Normal(self.last(x).squeeze(-1), 1.0))


FAMILIES = {
    "bernoulli": lambda logits: dist.Bernoulli(logits=logits),
    "binomial": lambda logits: dist.Binomial(3, logits=logits),
    "poisson": lambda logits: dist.Poisson(logits.clamp(-2, 2).exp()),
    "geometric": lambda logits: dist.Geometric(logits=logits.clamp(-1, 1)),
    "negative binomial": lambda logits: dist.NegativeBinomial(2.0, logits=logits.clamp(-2, 1)),
}


@pytest.mark.parametrize(
    ("name", "kind", "particles"),
    [
        *((name, "implicit", "one") for name in FAMILIES),
        *(("bernoulli", kind, particles) for kind in ("boundary", "score") for particles in PARTICLES),
        ("bernoulli", "boundary_all", "one"),
        ("binomial", "boundary", "one"),
        ("geometric", "score", "one"),
    ],
)
def test_captured_gradients_are_equal(name, kind, particles, num_graphs):
    student, teacher = Layers(1, FAMILIES[name]), freeze(Layers(0, FAMILIES[name]))
    loss = SurrogateKD(["y"], discrete_gradient=kind, **PARTICLES[particles])
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None)
    for seed in (3, 4):
        state = {key: value.clone() for key, value in student.state_dict().items()}
        expected = outcome(eager, 6, seed=seed)
        student.load_state_dict(state)
        assert_close(outcome(captured, 6, seed=seed), expected)
    assert num_graphs() == 1


@pytest.mark.parametrize("kind", ["boundary", "score"])
def test_categories_are_captured(kind, num_graphs):
    class Categories(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.logits, self.means = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

        def forward(self, rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Categorical(logits=self.logits))
                pyro.sample("y", dist.Normal(self.means[z], 1.0))

    student, teacher = Categories(1), freeze(Categories(0))
    loss = SurrogateKD(["y"], discrete_gradient=kind)
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None)
    assert_close(outcome(captured, 6), outcome(eager, 6))
    assert num_graphs() == 1
