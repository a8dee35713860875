"""A coin behind a coin, whose K-sample bounds and their gradients can be enumerated."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import nn

__all__ = ["WAYS", "Coin", "bound", "draws_of", "leave_one_out_objective", "score_gradient", "table"]

WAYS = {
    "batch": {"reuse_batch": None},
    "plate": {"reuse_batch": False},
    "loop": {"reuse_batch": False, "vectorize": False},
}
"""The ways of MultiSampleKD to get K samples, as options."""


class Coin(nn.Module):
    """z ~ Bernoulli(logits=prior), y ~ Bernoulli(logits=logits[z]), in double precision."""

    def __init__(self, prior, logits):
        super().__init__()
        self.prior = nn.Parameter(torch.tensor(prior, dtype=torch.float64))
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior))
            pyro.sample("y", dist.Bernoulli(logits=self.logits[z.long()]))

    def log_probs(self):
        """Log probability of y, of shape (z, y)."""
        return torch.stack([nn.functional.logsigmoid(-self.logits), nn.functional.logsigmoid(self.logits)], -1)

    def log_prior(self):
        """Log probability of z, of shape (2,)."""
        return torch.stack([nn.functional.logsigmoid(-self.prior), nn.functional.logsigmoid(self.prior)])


def table(student, teacher):
    """The joint probability of the teacher's bit and the student's, which are 1 below their probabilities of one uniform draw."""
    p, q = teacher.prior.detach().sigmoid(), student.prior.detach().sigmoid()
    both = torch.minimum(p, q)
    return torch.stack([torch.stack([1 - torch.maximum(p, q), q - both]), torch.stack([p - both, both])])


def draws_of(student, teacher, num_samples):
    """All bits of both under K samples of the noise, each of shape (states, K), and their probabilities."""
    pairs = torch.tensor(list(itertools.product(range(4), repeat=num_samples)))
    probability = table(student, teacher).flatten()[pairs].prod(-1)
    return pairs // 2, pairs % 2, probability


def bound(student, teacher, num_samples):
    """L_K by enumeration."""
    with torch.no_grad():
        theirs, mine, probability = draws_of(student, teacher, num_samples)
        p = teacher.log_probs()[theirs].exp().mean(1)  # (states, y)
        q = student.log_probs()[mine].exp().mean(1)
        return float((probability[:, None] * p * (p.log() - q.log())).sum())


def leave_one_out_objective(student, teacher, num_samples):
    """The part that the student decides on of the bound without sample 1 in the student's mean; differentiable."""
    bits = torch.tensor(list(itertools.product(range(2), repeat=num_samples - 1)))
    probability = student.log_prior()[bits].sum(-1).exp()
    log_mean = student.log_probs()[bits].exp().mean(1).log()  # (states, y)
    y = (teacher.log_prior().exp()[:, None] * teacher.log_probs().exp()).sum(0).detach()
    return -(probability[:, None] * y * log_mean).sum()


def score_gradient(student, teacher, num_samples):
    """The expectation of the posterior-weighted gradient, with sample 1 coupled to y: by prior and logits."""
    theirs, mine, probability = draws_of(student, teacher, num_samples)
    log_q = student.log_probs()[mine]  # (states, K, y)
    weights = log_q.detach().softmax(1)
    y = teacher.log_probs().detach()[theirs[:, 0]].exp()  # (states, y)
    scores = student.log_prior()[mine]
    inner = ((weights - 1 / num_samples) * scores[..., None] + weights * log_q).sum(1)
    loss = -(probability[:, None] * y * inner).sum()
    return torch.autograd.grad(loss, [student.prior, student.logits])
