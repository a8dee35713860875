"""Stored draws as a teacher: which draws a run takes, and their shapes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import DrawsKD, stored_draws
from pyro_kd.errors import InvalidProgramError
from tests.support.gradient_estimates import assert_mean


def sites(teacher, *args):
    return poutine.trace(teacher).get_trace(*args).nodes


def test_rows_take_whole_draws_which_are_equally_likely():
    pyro.set_rng_seed(0)
    draws = {"a": torch.arange(5.0), "b": torch.arange(5.0)[:, None] * torch.tensor([10.0, 100.0])}
    nodes = sites(stored_draws(draws, rows=int), 10_000)
    a, b = nodes["a"]["value"], nodes["b"]["value"]
    assert nodes["a"]["fn"].event_shape == ()
    assert nodes["b"]["fn"].event_shape == (2,)
    torch.testing.assert_close(b, a[:, None] * torch.tensor([10.0, 100.0]))
    assert_mean((a[:, None] == torch.arange(5.0)).double(), torch.full((5,), 0.2))
    assert_mean(a[1:] * a[:-1], 4.0)  # rows are independent: the mean is 2


def test_a_run_takes_one_draw_of_a_whole_batch():
    draws = {"y": torch.arange(3.0)[:, None] + 10 * torch.arange(4.0)}
    nodes = sites(stored_draws(draws, event_dim=0))
    assert nodes["y"]["fn"].batch_shape == (4,)
    torch.testing.assert_close(nodes["y"]["value"].diff(), torch.full((3,), 10.0))
    assert sites(stored_draws(draws))["y"]["fn"].event_shape == (4,)


@pytest.mark.parametrize("rows", [None, int])
def test_vectorized_particles_have_their_own_draws(rows):
    pyro.set_rng_seed(1)

    def student(rows):
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0).expand([2]).to_event(1))

    teacher = stored_draws({"y": torch.randn(100, 2)}, rows=rows or (lambda n: n))
    loss = DrawsKD(["y"], num_particles=300, vectorize_particles=True)
    single = DrawsKD(["y"])
    few = torch.tensor([single.loss(student, teacher, 4) for _ in range(300)])
    assert abs(loss.loss(student, teacher, 4) - few.mean()) < 5 * few.std() * (2 / 300) ** 0.5


ERRORS = {
    "no draws": (lambda: stored_draws({"y": torch.zeros(0, 3)}), "a teacher without draws.*'y': 0.*at least one draw"),
    "no sites": (lambda: stored_draws({}), "a teacher without draws"),
    "numbers that differ": (
        lambda: stored_draws({"a": torch.zeros(3), "b": torch.zeros(4)}),
        "same number of draws.*'b': 4",
    ),
    "no tensors": (lambda: stored_draws({"y": 1.0}), r"draws of 'y' are not tensors of shape \(draws, ...\)"),
    "more event dimensions than there are": (
        lambda: stored_draws({"y": torch.zeros(5, 3)}, event_dim=2),
        "'y' have 1 dimensions beside that of the draws.*event_dim=2",
    ),
    "a batch of draws and a draw for each row": (
        lambda: stored_draws({"y": torch.zeros(5, 3)}, event_dim=0, rows=int),
        "does not fit event_dim=0 and a draw for each row.*Leave out event_dim",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    make, text = ERRORS[case]
    with pytest.raises(InvalidProgramError, match=text):
        make()
