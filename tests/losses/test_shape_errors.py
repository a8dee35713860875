"""Shapes, plates, scales and masks that do not fit: each raises a typed error whose message names the site."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import errors
from tests.support.losses import SurrogateKD
from tests.support.wrong_programs import make, normal, raises


def test_noise_of_a_different_shape_is_an_error():
    raises(
        errors.NoiseMismatchError, "site 'z'", "(3,)", "(4,)", "fresh=['z']",
        student=make(z=normal(torch.zeros(4)), x=normal()),
        teacher=make(z=normal(torch.zeros(3)), x=normal()),
    )  # fmt: skip


def test_different_scales_and_masks_are_an_error():
    program = make(x=normal(torch.zeros(3)).to_event(1))
    raises(
        errors.PlateMismatchError, "the scale of site 'x' differs", "teacher 1.0, student 2.0", "poutine.scale",
        student=poutine.scale(program, scale=2.0), teacher=program,
    )  # fmt: skip
    raises(
        errors.PlateMismatchError, "the mask of site 'x' differs", "teacher None, student tensor(True)",
        student=poutine.mask(program, mask=torch.tensor(True)), teacher=program,
    )  # fmt: skip


def test_different_batch_shapes_are_an_error():
    raises(
        errors.PlateMismatchError, "site 'x' has batch shape (3,) in the teacher and () in the student", ".to_event()",
        student=make(x=normal(torch.zeros(3)).to_event(1)), teacher=make(x=normal(torch.zeros(3))),
    )  # fmt: skip


def test_a_divergence_of_the_wrong_shape_is_an_error():
    raises(
        errors.UnsupportedDivergenceError, "site 'x'", "returned shape ()", "batch shape (3,)",
        loss=SurrogateKD(["x"], divergence=lambda p, q, value: torch.tensor(0.0)),
        student=pyro.plate("rows", 3)(make(x=normal())), teacher=pyro.plate("rows", 3)(make(x=normal())),
    )  # fmt: skip


def test_a_batch_dimension_without_a_plate_is_an_error_among_vectorized_particles():
    """With particles in one plate, draws that broadcast beyond their plates would count more than once."""
    particles = {"num_particles": 5, "vectorize_particles": True, "max_plate_nesting": 1}
    raises(
        errors.PlateMismatchError, "site 'x'", "batch shape (5, 3)", "no plate for dimension -1", ".to_event(1)",
        loss=SurrogateKD(["x"], **particles), student=make(x=normal(torch.zeros(3))), teacher=make(x=normal(torch.zeros(3))),
    )  # fmt: skip

    def program():
        w = pyro.sample("w", dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        with pyro.plate("rows", 10):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1))

    raises(
        errors.PlateMismatchError, "site 'x'", "batch shape (5, 5, 10)", "dimension -3", "broadcast with the plates",
        loss=SurrogateKD(["x"], num_particles=5, vectorize_particles=True), student=program, teacher=program,
    )  # fmt: skip
    assert SurrogateKD(["x"], num_particles=5).loss(program, program) == 0.0


def test_different_masks_inside_to_event_are_an_error():
    def masked(mask):
        return make(x=dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor(mask)).to_event(1))

    raises(
        errors.PlateMismatchError, "the mask of site 'x' differs",
        student=masked([True, False]), teacher=masked([False, True]),
    )  # fmt: skip


def test_a_shape_that_changes_between_calls_is_checked_again():
    loss = SurrogateKD(["x"], divergence=lambda p, q, value: torch.zeros(p.batch_shape))

    def program(name):
        def model(batch):
            pyro.sample("x", normal(torch.zeros(batch if name == "student" else ())).to_event(0))

        return model

    loss.loss(program("student"), program("teacher"), ())
    with pytest.raises(errors.PlateMismatchError, match="site 'x' has batch shape"):
        loss.loss(program("student"), program("teacher"), (3,))
