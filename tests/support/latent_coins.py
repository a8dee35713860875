"""Two latent bits and two targets, with the law of the targets by hand: for tests of exact marginals."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import nn

__all__ = ["ROWS", "TARGETS", "Coins", "Registered", "gradients", "sgd"]

ROWS = 64


class Coins(nn.Module):
    """Two latent bits, and two targets: y1 given the first bit, and y2 given y1 and the second, which depends on the first."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.z1, self.z2 = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(2))
        self.y1, self.y2 = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, 2))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.z1)).long()
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[z1])).long()
            z2 = pyro.sample("z2", dist.Bernoulli(logits=self.z2[z1])).long()
            pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, z2]))

    def table(self):
        """log p(y1, y2) by hand, of shape (2, 2)."""
        rows = []
        for y1, y2 in itertools.product([0.0, 1.0], repeat=2):
            terms = []
            for z1, z2 in itertools.product([0, 1], repeat=2):
                laws = [
                    (self.z1, z1),
                    (self.y1[z1], y1),
                    (self.z2[z1], z2),
                    (self.y2[int(y1), z2], y2),
                ]
                terms.append(sum(dist.Bernoulli(logits=a).log_prob(torch.tensor(float(b))) for a, b in laws))
            rows.append(torch.stack(terms).logsumexp(0))
        return torch.stack(rows).reshape(2, 2)

    def kl_from(self, teacher):
        p = teacher.table().detach()
        return (p.exp() * (p - self.table())).sum()


class Registered(Coins):
    """The same student, for Pyro's SVI."""

    def forward(self, rows):
        pyro.module("coins", self)
        super().forward(rows)


TARGETS = ["y1", "y2"]


def gradients(module, value):
    module.zero_grad()
    value.backward()
    return [param.grad.clone() for param in module.parameters()]


def sgd(params):
    return torch.optim.Adam(params, lr=0.05)
