"""Objectives that take turns."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import LocalKD, freeze
from pyro_kd.training import Trainer, in_turn, switch
from tests.support.losses import SurrogateKD


class Gaussian(nn.Module):
    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5))


class Counting(LocalKD):
    """Notes in which steps it is evaluated."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = []

    def given_sites(self, teacher, targets):
        self.calls.append(1)
        return super().given_sites(teacher, targets)


def trainer_of(losses, student, **options):
    objectives = in_turn(student, freeze(Gaussian(0.0)), losses, **options)
    return Trainer(objectives, lambda params: torch.optim.SGD(params, lr=1e-4), log_every=1)


def test_each_loss_is_minimised_in_its_turn_alone():
    student = Gaussian(1.0)
    trainer = trainer_of(
        {3: SurrogateKD(["y"], latent_weight=0.0, teacher_forcing=0.0), 0: LocalKD(["y"]), 5: LocalKD(["y"])},
        student,
        weight=0.1,
    )
    history = trainer.fit(100, steps=7, progress=False)
    assert list(trainer.objectives) == ["LocalKD", "SurrogateKD", "LocalKD from step 5"]
    locs, loc = [], 1.0
    for step in range(7):
        gradient = 100 * loc * (1.0 if step < 3 or step >= 5 else 4.0)  # of 100 loc^2 / 2, or of that over 0.5^2
        locs.append(0.1 * gradient * loc / 2)
        loc -= 1e-4 * 0.1 * gradient
    assert history["loss"] == pytest.approx(locs, rel=1e-4)


def test_a_loss_costs_nothing_before_its_turn():
    later = Counting(["y"])
    trainer = trainer_of({0: LocalKD(["y"]), 4: later}, Gaussian(1.0))
    trainer.fit(10, steps=4, progress=False)
    before = len(later.calls)
    trainer.fit(10, steps=2, progress=False)
    assert len(later.calls) >= before + 2
    assert before <= 1, "once, to find the parameters"


def test_the_arguments_reach_every_loss():
    trainer = trainer_of({0: LocalKD(["y"]), 1: LocalKD(["y"])}, Gaussian(1.0), arguments=lambda x: (len(x),))
    assert len(trainer.fit(torch.zeros(5), steps=3, progress=False)["loss"]) == 3


@pytest.mark.parametrize("losses", [{1: LocalKD(["y"])}, {0: LocalKD(["y"]), -1: LocalKD(["y"])}, {}])
def test_one_loss_must_start_at_step_0(losses):
    with pytest.raises(ValueError, match="one must start at step 0 and none before"):
        in_turn(Gaussian(1.0), Gaussian(0.0), losses)


def test_starts_and_weights_that_are_no_numbers_of_steps_are_refused():
    losses = {0: LocalKD(["y"]), 2.5: LocalKD(["y"])}
    with pytest.raises(ValueError, match=r"must be a whole number, such as steps // 4, not 2.5"):
        in_turn(lambda: None, lambda: None, losses)
    with pytest.raises(TypeError, match="weight must be a number"):
        in_turn(lambda: None, lambda: None, {0: LocalKD(["y"])}, weight=lambda step: 1.0)


@pytest.mark.parametrize("step", [2.5, float("nan"), "4", True])
def test_a_schedule_of_no_whole_number_of_steps_is_refused(step):
    with pytest.raises(ValueError, match="must be a whole number"):
        switch(1.0, 0.0, step)
