"""Random discrete chains, whose exact KL is a sum over their states."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.metrics import marginal_log_prob

__all__ = ["CASES", "each_case", "estimate", "exact_kl", "random_chain"]

ROWS = 2000


def random_chain(layers, seed, families):
    """z_1 -> ... -> z_L -> y, each variable discrete with random tables."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [2 if families[i] == "bernoulli" else 3 for i in range(layers)]

    def table(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    prior = table(sizes[0])
    tables = [table(sizes[i], sizes[i + 1]) for i in range(layers - 1)] + [table(sizes[-1], 3)]

    def variable(family, logits):
        if family == "bernoulli":
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        if family == "one-hot":
            return dist.OneHotCategorical(logits=logits)
        return dist.Categorical(logits=logits)

    def state(family, value):
        return value.argmax(-1) if family == "one-hot" else value.long()

    def model(n=ROWS):
        with pyro.plate("rows", n):
            z = state(families[0], pyro.sample("z0", variable(families[0], prior)))
            for i in range(1, layers):
                z = state(families[i], pyro.sample(f"z{i}", variable(families[i], tables[i - 1][z])))
            return pyro.sample("y", dist.Categorical(logits=tables[-1][z]))

    return model


CASES = [
    (layers, seed, tuple(["bernoulli", "categorical", "one-hot"][(seed + i) % 3] for i in range(layers)))
    for layers in (1, 2, 3)
    for seed in range(4)
]
each_case = pytest.mark.parametrize(("layers", "seed", "families"), CASES)


def exact_kl(*, student, teacher):
    data = {"y": torch.arange(3)}
    log_q, log_p = (marginal_log_prob(program, data, 3) for program in (student, teacher))
    assert float(log_p.exp().sum()) == pytest.approx(1.0)
    return float((log_p.exp() * (log_p - log_q)).sum())


def estimate(loss, *, student, teacher, blocks=30):
    values = torch.tensor([loss.loss(student, teacher) / ROWS for _ in range(blocks)])
    return float(values.mean()), float(values.std() / blocks**0.5)
