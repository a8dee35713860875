"""Programs over categories, coded as numbers or as one-hot vectors."""

import pyro
import pyro.distributions as dist
import torch

ROWS = 2000


def table(*shape, seed):
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def categorical(logits):
    return dist.Categorical(logits=logits)


def one_hot(logits):
    return dist.OneHotCategorical(logits=logits)


def chain(*names, seed, sizes=None, family=categorical, plate="rows"):
    """z_1 -> ... -> z_L -> y over categories; ``sizes`` gives their numbers."""
    sizes = [*(sizes or [3] * len(names)), 3]
    prior = table(sizes[0], seed=seed)
    tables = [table(sizes[i], sizes[i + 1], seed=seed + 100 * (i + 1)) for i in range(len(names))]

    def model(n=ROWS):
        with pyro.plate(plate, n):
            logits = prior
            for name, weights in zip(names, tables, strict=True):
                z = pyro.sample(name, family(logits))
                logits = weights[z.argmax(-1) if family is one_hot else z]
            pyro.sample("y", dist.Categorical(logits=logits))

    return model
