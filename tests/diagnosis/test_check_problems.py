"""The check before training names one cause once."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD, check, freeze
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
    other = 1.0 if loss is LocalKD else 0.1
    assert f"latent_weight=lambda site: 0.0 if site == 'z' else {other}" in problem.text
    assert check(loss(["x"], latent_weight=lambda site: 0.0 if site == "z" else other), student, teacher).is_ok


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("fault", ["shape", "matrix"])
def test_a_program_that_fails_by_itself_is_named_once(role, fault):
    def right(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0))

    def wrong(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(rows, 2), 1.0).to_event(1))
            loc = z if fault == "shape" else z @ torch.ones(3)
            pyro.sample("y", dist.Normal(loc, 1.0))

    student, teacher = (right, wrong) if role == "teacher" else (wrong, right)
    errors = [problem.text for problem in check(SurrogateKD(["y"]), student, freeze(teacher), 5).errors]
    named = [text for text in errors if text.startswith(f"the {role} fails by itself: ")]
    assert len(named) == 1, errors
    assert "Trace Shapes" not in named[0]
