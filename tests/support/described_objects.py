"""Objects whose descriptions must not depend on the process."""

import numpy as np
import pyro.distributions as dist
import torch
from torch import nn


def objects_to_describe():
    """Things whose repr differs from process to process, or whose order does."""
    names = {"alpha", "beta", "gamma", "delta"}
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.ones_(net[0].weight), nn.init.zeros_(net[0].bias)
    return {
        "set": names,
        "function": lambda site: site in {"alpha", "beta", "gamma", "delta"},
        "closure": lambda site: site in names,
        "object": object(),
        "generator": torch.Generator(),
        "module": net,
        "scripted": torch.jit.script(nn.Linear(1, 1, bias=False).requires_grad_(False).to_empty(device="meta")),
        "array": np.arange(5),
        "many": list(range(5000)),
        "tensors": [torch.arange(3) + i for i in range(100)],
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "distribution": dist.Categorical(torch.ones(3)),
    }
