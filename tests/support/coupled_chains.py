"""Chains of discrete latents, with the exact loss of a student by enumeration: every pair of values that the two draw on shared noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_kd.noise.steps import log_coupling
from tests.support.losses import SurrogateKD

LATENT_WEIGHT = 0.7


def overlap(student, value, teacher, teacher_value, size):
    """The probability that quantile functions of the two laws take these values at one uniform number, by sums of their masses."""
    values = torch.arange(size, dtype=torch.float64).reshape(-1, *[1] * value.dim())
    ends = []
    for fn, at in ((student, value), (teacher, teacher_value)):
        mass = fn.log_prob(values).exp()
        total = torch.cat([torch.zeros_like(mass[:1]), mass.cumsum(0)]).expand(-1, *at.shape)
        index = at.long().unsqueeze(0)
        ends.append((total.gather(0, index)[0], total.gather(0, index + 1)[0]))
    (low, high), (teacher_low, teacher_high) = ends
    return (torch.minimum(high, teacher_high) - torch.maximum(low, teacher_low)).clamp(min=0)


def race(student, value, teacher, teacher_value, size):
    """The same for categories; tests/noise/test_steps.py holds it to frequencies."""
    return log_coupling(student, value, teacher, teacher_value).exp()


@dataclass(frozen=True)
class CoupledChain:
    """Layers of latents and a target.

    Attributes:
        layers: each ``f(w, *values)``, the distribution of a layer's units, whose last batch dimension is that of its units.
        target: ``f(w, *values)``, the distribution of y.
        units: number of units in each layer.
        size: the latents take the values 0 to ``size - 1``.
        student, teacher: the weights w of both programs.
        joint: the joint probability of the two draws of a unit.
    """

    layers: tuple[Callable[..., Any], ...]
    target: Callable[..., Any]
    units: tuple[int, ...]
    size: int
    student: tuple[float, ...]
    teacher: tuple[float, ...]
    joint: Callable[..., Any] = overlap

    def model(self, w, rows):
        """The program: sites z0, z1, ... and y in the plate ``rows``."""
        values = []
        with pyro.plate("rows", rows):
            for number, layer in enumerate(self.layers):
                values.append(pyro.sample(f"z{number}", layer(w, *values).to_event(1)))
            return pyro.sample("y", self.target(w, *values))

    def exact(self, w):
        """The loss per row, differentiable in the student's weights w."""
        teacher = torch.tensor(self.teacher)
        count = sum(self.units)
        grid = torch.cartesian_prod(*[torch.arange(self.size, dtype=torch.float64)] * 2 * count)
        mine, theirs = (part.split(self.units, -1) for part in grid.split(count, -1))
        weight, total = torch.ones(len(grid)), 0.0
        for number, layer in enumerate(self.layers):
            q, p = layer(w, *mine[:number]), layer(teacher, *theirs[:number])
            kl = torch.distributions.kl_divergence(p, q)
            total = total + LATENT_WEIGHT * kl.expand(len(grid), self.units[number]).sum(-1)
            joint = self.joint(q, mine[number], p, theirs[number], self.size)
            weight = weight * joint.expand(len(grid), self.units[number]).prod(-1)
        total = total + torch.distributions.kl_divergence(self.target(teacher, *theirs), self.target(w, *mine))
        return (weight * total).sum()

    def exact_gradient(self):
        """The gradient of :meth:`exact` at the student's weights."""
        w = torch.tensor(self.student, requires_grad=True)
        return torch.autograd.grad(self.exact(w), w)[0]

    def gradients(self, kind, number=30, rows=300, **options):
        """Independent estimates of the gradient per row, shape (number, weights)."""
        w = torch.tensor(self.student, requires_grad=True)
        teacher = torch.tensor(self.teacher)
        loss = SurrogateKD(["y"], latent_weight=LATENT_WEIGHT, discrete_gradient=kind, max_plate_nesting=1, **options)
        module = loss(lambda: self.model(w, rows), lambda: self.model(teacher, rows))
        return torch.stack([torch.autograd.grad(module(), w)[0] / rows for _ in range(number)])


BITS = CoupledChain(
    (
        lambda w, *z: dist.Bernoulli(logits=w[..., 0:2]),
        lambda w, z: dist.Bernoulli(logits=torch.stack([w[2] + w[3] * z[..., 0] - z[..., 1], w[4] * z.sum(-1)], -1)),
    ),
    lambda w, z, x: dist.Bernoulli(logits=w[5] + 2 * x[..., 0] + w[6] * x[..., 1] * z[..., 0]),
    (2, 2),
    2,
    (0.1, 0.4, -0.4, 0.3, 0.8, -0.3, 0.5),
    (0.5, -0.3, 0.4, 1.0, -0.8, 0.2, 1.5),
)

BINOMIALS = CoupledChain(
    (
        lambda w, *z: dist.Binomial(3, logits=w[0:1]),
        lambda w, z: dist.Binomial(3, logits=w[1] + w[2] * z),
    ),
    lambda w, z, x: dist.Normal(w[3] + (w[4] * x + 0.3 * z).sum(-1).sin(), 1.0),
    (1, 1),
    4,
    (0.1, 0.4, -0.4, 0.3, 0.8),
    (0.5, -0.3, 0.4, -0.2, 0.6),
)

LARGE_BINOMIAL = CoupledChain(
    (lambda w, *z: dist.Binomial(50, logits=w[0:1]),),
    lambda w, z: dist.Normal(w[1] * (z.sum(-1) / 10).sin(), 1.0),
    (1,),
    51,
    (0.4, 0.5),
    (0.0, 1.2),
)

POISSON = CoupledChain(
    (lambda w, *z: dist.Poisson(w[0:1].exp()),),
    lambda w, z: dist.Normal(w[1] * (z.sum(-1) + 1).sqrt(), 1.0),
    (1,),
    25,
    (0.9, 0.5),
    (0.5, 1.2),
)

GEOMETRIC = CoupledChain(
    (lambda w, *z: dist.Geometric(logits=w[0:1]),),
    lambda w, z: dist.Normal(w[1] * (z.sum(-1) + 1).sqrt(), 1.0),
    (1,),
    40,
    (0.9, 0.5),
    (0.5, 1.2),
)

CATEGORIES = CoupledChain(
    (lambda w, *z: dist.Categorical(logits=w[0:3].unsqueeze(0)),),
    lambda w, z: dist.Normal(w[3:6].index_select(0, z.long().flatten()).reshape(z.shape).sum(-1), 1.0),
    (1,),
    3,
    (0.1, 0.4, -0.5, 0.3, 0.8, -1.0),
    (0.6, -0.3, 0.4, -0.2, 0.6, 1.0),
    race,
)
