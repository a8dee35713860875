"""Parameters that a program makes after its first run are trained as the others are, and come back from a checkpoint."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pyro_kd import Distiller, LocalKD
from pyro_kd.errors import OptimiserMismatchError
from pyro_kd.training import Callback, Checkpoints, Validation

SCHEDULERS = {
    "none": None,
    "LambdaLR": lambda optim: lr_scheduler.LambdaLR(optim, lambda step: 0.9**step),
    "ExponentialLR": lambda optim: lr_scheduler.ExponentialLR(optim, 0.9),
    "OneCycleLR": lambda optim: lr_scheduler.OneCycleLR(optim, 0.1, total_steps=30, cycle_momentum=False),
    "SequentialLR": lambda optim: lr_scheduler.SequentialLR(
        optim, [lr_scheduler.ConstantLR(optim), lr_scheduler.ExponentialLR(optim, 0.9)], [4]
    ),
}


def teacher(rows):
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(3.0, 1.0))


class Late(Callback):
    """A student whose second parameter is made after five steps; its name comes before that of the first."""

    def __init__(self):
        self.is_late = False

    def on_step(self, trainer, row):
        self.is_late = trainer.num_steps >= 5

    def student(self, rows):
        loc = pyro.param("b", torch.tensor(0.0))
        if self.is_late:
            loc = loc + pyro.param("a", torch.tensor(0.0)) / 2
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(loc, 1.0))


def values():
    return {name: value.item() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("optim", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_late_parameter_is_trained_at_the_scheduled_rate_and_resumed(scheduler, optim, tmp_path):
    late = Late()

    def make():
        return Distiller(
            late.student,
            teacher,
            lambda params: optim(params, lr=0.05),
            LocalKD(["x"]),
            weight=0.1,
            scheduler=SCHEDULERS[scheduler],
        )

    distiller = make()
    distiller.fit(10, steps=10, seed=0, progress=False, callbacks=[late], checkpoints=Checkpoints(tmp_path))
    assert values()["a"] > 0.01
    rates = {group["lr"] for group in distiller._stepper.optimiser._optim.param_groups}
    assert len(rates) == 1
    distiller.fit(10, total_steps=15, progress=False)
    undisturbed = values()

    store = pyro.get_param_store()
    for name in list(store):
        del store[name]
    make().fit(10, total_steps=15, progress=False, checkpoints=Checkpoints(tmp_path, every=100), resume=True)
    assert values() == undisturbed


def test_the_best_student_has_a_later_parameter_as_it_was_made():
    late = Late()
    losses = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    distiller = Distiller(late.student, teacher, lambda params: torch.optim.SGD(params, lr=0.05), LocalKD(["x"]), weight=0.1)
    distiller.fit(10, steps=10, progress=False, callbacks=[late], validation=Validation(lambda: next(losses), every=2))
    assert values()["a"] == 0.0


def groups_of(params):
    return torch.optim.SGD([{"params": params}, {"params": [nn.Parameter(torch.zeros(()))], "lr": 0.3}], lr=0.05)


def test_several_groups_and_a_scheduler_have_no_rate_for_a_late_parameter():
    late = Late()
    distiller = Distiller(late.student, teacher, groups_of, LocalKD(["x"]), scheduler=SCHEDULERS["LambdaLR"])
    with pytest.raises(OptimiserMismatchError, match=r"'a' during training.*2 groups.*Run the student once"):
        distiller.fit(10, steps=10, progress=False, callbacks=[late])
    assert distiller.num_steps == 5


def test_several_groups_alone_take_a_late_parameter_at_the_default_rate():
    late = Late()
    distiller = Distiller(late.student, teacher, groups_of, LocalKD(["x"]), weight=0.1)
    history = distiller.fit(10, steps=10, progress=False, callbacks=[late])
    assert values()["a"] > 0.01
    assert "lr" not in history  # there are two
