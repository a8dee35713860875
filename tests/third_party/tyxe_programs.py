"""tyxe: Bayesian neural networks, whose weights are sample sites of a PyroModule."""

import functools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample

from tests.third_party.cases import Case, Programs

tyxe = pytest.importorskip("tyxe")

X = torch.linspace(-2, 2, 40).unsqueeze(-1)


def network(width: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))


def bayesian(width: int, *, only_last: bool) -> Any:
    net = network(width)
    options = {"expose_all": False, "hide_modules": [net[0]]} if only_last else {}
    return tyxe.VariationalBNN(
        net,
        tyxe.priors.IIDPrior(dist.Normal(0.0, 1.0), **options),
        tyxe.likelihoods.HomoskedasticGaussian(len(X), scale=0.1),
        functools.partial(AutoNormal, init_scale=0.3, init_loc_fn=init_to_sample),  # tyxe's own guides need an older Pyro
    )


def last_layer() -> Programs:
    teacher, student = bayesian(16, only_last=True), bayesian(8, only_last=True)
    weights = {"latent_weight": lambda site: 0.0}  # the student has fewer weights
    return Programs(teacher.model, student.model, (X,), ["likelihood.data"], weights)


def posterior() -> Programs:
    teacher, student = bayesian(8, only_last=False), bayesian(8, only_last=False)
    for bnn in (teacher, student):
        bnn.guide(X)  # makes the guide's parameters,
        pyro.clear_param_store()  # under names that both have
    return Programs(
        teacher.guide, student.guide, (X,), [f"net.{i}.{kind}_unconstrained" for i in (0, 2) for kind in ("weight", "bias")]
    )


CASES = [
    Case("tyxe", "a regression with a Bayesian last layer, 16 hidden units into 8", last_layer),
    Case("tyxe", "the posterior of all weights, one mean-field guide into another", posterior),
]
