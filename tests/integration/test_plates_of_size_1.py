"""A plate of size 1 changes nothing: losses and gradients are those of the same programs without it."""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import DrawsKD, LocalKD, MarginalKD, MultiSampleKD, OnPolicyKD, SurrogateKD, freeze, mixture_of, stored_draws
from pyro_kd.utils.pyro_internals import unconstrained_params

ROWS = 3


def program(shift, outer, inner):
    """A bit z in the outer plates, and a bit w and the target y in the inner plates as well; all numbers are sizes of plates."""

    def plate(name, place):
        return pyro.plate(name, (*outer, *inner)[place], dim=place - len(outer) - len(inner))

    def model():
        with ExitStack() as stack:
            for place in range(len(outer)):
                stack.enter_context(plate(f"outer_{place}", place))
            z = pyro.sample("z", dist.Bernoulli(0.3 + 0.3 * shift))
            for place in range(len(inner)):
                stack.enter_context(plate(f"inner_{place}", len(outer) + place))
            w = pyro.sample("w", dist.Bernoulli(0.2 + 0.3 * z + 0.3 * shift))
            pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * z + 0.3 * w + 0.2 * shift))

    return model


LOSSES = {
    "surrogate": lambda: SurrogateKD(["y"], latent_weight=0.1, teacher_forcing=0.0),
    "surrogate, vectorised": lambda: SurrogateKD(["y"], latent_weight=0.1, num_particles=3, vectorize_particles=True),
    "teacher forcing": lambda: SurrogateKD(["y"], latent_weight=0.1, teacher_forcing=0.5),
    "local": lambda: LocalKD(["y"]),
    "samples in a plate": lambda: MultiSampleKD(["y"], num_samples=4, reuse_batch=False),
    "samples in a loop": lambda: MultiSampleKD(["y"], num_samples=4, vectorize=False, reuse_batch=False),
    "leave one out": lambda: MultiSampleKD(["y"], num_samples=4, gradient="leave_one_out", reuse_batch=False),
    "marginal": lambda: MarginalKD(["y"]),
    "boundary": lambda: SurrogateKD(["y"], teacher_forcing=0.0, discrete_gradient="boundary_all"),
    "score": lambda: SurrogateKD(["y"], teacher_forcing=0.0, discrete_gradient="score", num_particles=3),
    "on policy": lambda: OnPolicyKD(["y"], student_fraction=0.5),
}
SHAPES = {"rows": ((1,), ()), "outer": ((1, ROWS), ()), "inner": ((ROWS,), (1,)), "everywhere": ((1, ROWS, 1), (1,))}
WITHOUT = {"rows": ((), ()), "outer": ((ROWS,), ()), "inner": ((ROWS,), ()), "everywhere": ((ROWS,), ())}


def loss_and_gradient(loss, shape, is_captured):
    pyro.clear_param_store()
    shift = pyro.param("shift", torch.tensor(0.7))

    def student():
        program(pyro.param("shift"), *shape)()

    if is_captured:
        loss.compile(backend=None)
    pyro.set_rng_seed(2)
    value = loss.loss_and_grads(student, freeze(program(torch.tensor(0.2), *shape)))
    assert unconstrained_params(pyro.get_param_store())["shift"] is shift
    return torch.stack([torch.tensor(value), shift.grad])


@pytest.mark.parametrize(("where", "is_captured"), [*((where, False) for where in SHAPES), ("everywhere", True)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_plate_of_size_1_changes_no_loss_and_no_gradient(name, where, is_captured):
    with_plates = loss_and_gradient(LOSSES[name](), SHAPES[where], is_captured)
    torch.testing.assert_close(with_plates, loss_and_gradient(LOSSES[name](), WITHOUT[where], is_captured))


def rows_of(loc):
    def model(count):
        with pyro.plate("rows", count):
            pyro.sample("y", dist.Normal(loc, 1.0))

    return model


@pytest.mark.parametrize("rows", [None, int], ids=["one teacher", "a teacher for each row"])
def test_a_mixture_of_teachers_with_a_single_row(rows):
    mixture = mixture_of([rows_of(2.0)], sites=["y"], rows=rows)
    assert SurrogateKD(["y"], fresh=["teacher"]).loss(rows_of(1.0), mixture, 1) == pytest.approx(0.5)


def test_stored_draws_with_a_single_row():
    draws = {
        "one draw": stored_draws({"y": torch.full((5, 1), 2.0)}, event_dim=0),
        "each": stored_draws({"y": torch.full((5,), 2.0)}, rows=int),
    }
    found = [DrawsKD(["y"], fresh=["draw"]).loss(rows_of(1.0), teacher, 1) for teacher in draws.values()]
    assert found == pytest.approx([-dist.Normal(1.0, 1.0).log_prob(torch.tensor(2.0)).item()] * 2)
