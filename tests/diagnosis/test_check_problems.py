"""The check before training names one cause once."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD, check
from tests.support.losses import SurrogateKD

ROWS = 8


def categories(locs):
    number = len(locs)
    with pyro.plate("rows", ROWS):
        z = pyro.sample("z", dist.Categorical(logits=torch.zeros(number)))
        pyro.sample("x", dist.Normal(locs[z], 0.5))


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_fewer_categories_in_the_student_are_one_problem_whose_remedy_works(loss):
    """The student can neither be given the teacher's category nor be compared with it: one cause, one remedy."""
    locs = torch.zeros(2, requires_grad=True)
    student, teacher = functools.partial(categories, locs), functools.partial(categories, torch.arange(4.0))
    (problem,) = check(loss(["x"]), student, teacher).problems
    assert problem.is_error
    assert "supports differ at site 'z'" in problem.text
    assert "latent_weight=lambda site: 0.0 if site == 'z' else 0.1" in problem.text
    assert check(loss(["x"], latent_weight=lambda site: 0.0 if site == "z" else 0.1), student, teacher).is_ok
