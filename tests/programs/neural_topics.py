"""Topic model with a neural decoder: both topics and words are a softmax, of Gaussians and of mixtures.

Exercises ``Multinomial`` counts, ``BatchNorm1d`` with its running statistics, ``Dropout``, and a subsampled plate of
documents.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from tests.programs import Program, trained

WORDS, TOPICS = 24, 3


class Decoder(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.beta = nn.Sequential(nn.Linear(TOPICS, rank, bias=False), nn.Linear(rank, WORDS, bias=False))
        self.norm = nn.BatchNorm1d(WORDS, affine=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, theta):
        return self.norm(self.beta(self.drop(theta))).softmax(-1)


class ProdLDA(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.decoder = Decoder(rank)
        self.prior = nn.Parameter(torch.randn(2, TOPICS) * 0.5)

    def model(self, counts):
        pyro.module("prodlda", self)
        loc, log_scale = self.prior
        with pyro.plate("documents", len(counts), subsample_size=20) as rows:
            batch = counts[rows]
            log_theta = pyro.sample("log_theta", dist.Normal(loc, log_scale.exp()).to_event(1))
            probs = self.decoder(log_theta.softmax(-1))
            total_count = int(batch.sum(-1).max())
            pyro.sample("words", dist.Multinomial(total_count, probs), obs=batch)


def program():
    counts = dist.Multinomial(30, torch.ones(WORDS)).sample((60,))
    return Program(trained(ProdLDA(WORDS).model, counts), ProdLDA(2).model, (counts,), steps=60, lr=0.05)
