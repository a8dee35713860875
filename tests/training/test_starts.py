"""Several short starts, of which the best goes on."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import Distiller, LocalKD, freeze
from pyro_kd.errors import NonFiniteLossError
from pyro_kd.training import Callback, best_start

ROWS = 20


class Unit(nn.Module):
    """A single ReLU unit, which is dead for a negative bias."""

    def __init__(self, bias):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(self.bias.relu(), 1.0))


def distillers(*biases):
    """A function that makes one distiller after the other; and the students that it has made."""
    students, waiting = [], list(biases)

    def make():
        students.append(Unit(waiting.pop(0)))
        return Distiller(students[-1], freeze(Unit(2.0)), lambda params: torch.optim.SGD(params, lr=0.01), LocalKD(["y"]))

    return make, students


def test_the_start_with_the_lowest_loss_goes_on():
    make, students = distillers(-1.0, 1.5, 0.5, -2.0)
    distiller = best_start(make, ROWS, starts=4, steps=3)
    assert distiller.num_steps == 3
    assert list(distiller.parameters.values()) == [students[1].bias]
    before = students[1].bias.item()
    distiller.fit(ROWS, steps=100, progress=False)
    assert abs(students[1].bias.item() - 2.0) < 0.01 < abs(before - 2.0)


def test_a_judge_may_decide():
    make, students = distillers(1.5, -1.0)
    distiller = best_start(
        make, ROWS, starts=2, steps=1, judge=lambda distiller: next(iter(distiller.parameters.values())).item()
    )
    assert list(distiller.parameters.values()) == [students[1].bias]


def test_batches_are_passed_on():
    make, students = distillers(-1.0, 1.5)
    distiller = best_start(make, starts=2, steps=2, batches=[ROWS])
    assert list(distiller.parameters.values()) == [students[1].bias]


def test_students_in_the_parameter_store_are_kept_apart():
    starts = iter([5.0, 2.5, -4.0])
    pyro.param("of someone else", torch.tensor(1.0))

    def make():
        start = torch.tensor(next(starts))

        def student(rows):
            loc = pyro.param("loc", start)
            with pyro.plate("rows", rows):
                pyro.sample("y", dist.Normal(loc, 1.0))

        return Distiller(student, freeze(Unit(2.0)), lambda params: torch.optim.SGD(params, lr=0.001), LocalKD(["y"]))

    distiller = best_start(make, ROWS, starts=3, steps=2)
    assert 2.4 < pyro.param("loc").item() < 2.5
    assert set(pyro.get_param_store()) == {"loc", "of someone else"}
    distiller.fit(ROWS, steps=300, progress=False)
    assert pyro.param("loc").item() == pytest.approx(2.0, abs=0.01)


def test_a_start_that_fails_is_left_out_with_a_warning():
    make, students = distillers(float("nan"), 1.0)
    with pytest.warns(UserWarning, match="start 1 of 2 has failed and is left out"):
        distiller = best_start(make, ROWS, starts=2, steps=2)
    assert list(distiller.parameters.values()) == [students[1].bias]


def test_if_every_start_fails_there_is_an_error():
    make, _ = distillers(float("nan"), float("nan"))
    with pytest.warns(UserWarning, match="has failed"), pytest.raises((NonFiniteLossError, ValueError)):
        best_start(make, ROWS, starts=2, steps=2)
    make, _ = distillers(1.0)
    with pytest.raises(NonFiniteLossError, match="the judge has returned NaN for every start"):
        best_start(make, ROWS, starts=1, steps=1, judge=lambda distiller: float("nan"))


def test_at_least_one_start_is_needed():
    with pytest.raises(ValueError, match="starts must be at least 1, not 0"):
        best_start(lambda: None, starts=0, steps=1)


def test_an_option_of_fit_is_passed_to_each_fit_alone():
    seen = []

    class Count(Callback):
        def on_end(self, trainer):
            seen.append(trainer.num_steps)

    make, _ = distillers(0.5, 1.5, 1.0)
    best_start(make, ROWS, starts=3, steps=2, progress=False, callbacks=[Count()])
    assert seen == [2, 2, 2]
