"""Where something else is minimised from a step on, the optimiser forgets the moments of past gradients."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import Distiller, LocalKD, OnPolicyKD, freeze
from pyro_kd.training import DistillationObjective, Trainer, in_turn, linear, switch
from tests.support.losses import SurrogateKD

ROWS, LOCAL_STEPS, STEPS = 10, 4, 7


def program(loc: Any) -> None:
    with pyro.plate("rows", ROWS):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5))


def student() -> None:
    program(pyro.param("loc", lambda: torch.tensor(1.0)))


@freeze
def teacher() -> None:
    program(0.0)


def expected(optim: Any, restarts: bool) -> float:
    """The parameter after both parts: the losses are loc^2 / 2, and that over 0.5^2, on any noise."""
    loc = torch.tensor(1.0, requires_grad=True)
    optimiser = optim([loc])
    for step in range(STEPS):
        if restarts and step == LOCAL_STEPS:
            optimiser = optim([loc])
        loc.grad = (loc.detach() if step < LOCAL_STEPS else 4 * loc.detach()).clone()
        optimiser.step()
    return loc.item()


def losses() -> dict[int, Any]:
    return {0: LocalKD(["y"]), LOCAL_STEPS: SurrogateKD(["y"], latent_weight=0.0)}


TORCH: dict[str, Callable[[Any], Any]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("is_made", [True, False], ids=["an optimiser", "a function that makes one"])
def test_the_second_loss_is_minimised_by_a_new_optimiser(name, is_made):
    pyro.clear_param_store()
    optim = TORCH[name]
    student()
    made = optim([pyro.get_param_store()["loc"]]) if is_made else optim
    Trainer(in_turn(student, teacher, losses(), weight=1 / ROWS), made).fit(steps=STEPS, progress=False)
    assert pyro.param("loc").item() == pytest.approx(expected(optim, restarts=True), rel=1e-5)
    assert pyro.param("loc").item() != pytest.approx(expected(optim, restarts=False), rel=1e-3)


@pytest.mark.parametrize(
    ("made", "alike"),
    [
        (pyro.optim.Adam({"lr": 0.01}), TORCH["Adam"]),
        (pyro.optim.Adam(lambda name: {"lr": 0.01}), TORCH["Adam"]),
        (pyro.optim.Adam(lambda module, name: {"lr": 0.01}), TORCH["Adam"]),
        (
            pyro.optim.AdagradRMSProp({"eta": 0.1}),
            lambda params: pyro.optim.adagrad_rmsprop.AdagradRMSProp(params, eta=0.1),
        ),
        (
            pyro.optim.StepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "step_size": 100}),
            TORCH["Adam"],
        ),
    ],
    ids=["options", "options by name", "options by module and name", "one that makes its state at once", "a scheduler"],
)
def test_so_it_is_with_optimisers_of_pyro(made, alike):
    pyro.clear_param_store()
    Trainer(in_turn(student, teacher, losses(), weight=1 / ROWS), made).fit(steps=STEPS, progress=False)
    assert pyro.param("loc").item() == pytest.approx(expected(alike, restarts=True), rel=1e-5)
    assert pyro.param("loc").item() != pytest.approx(expected(alike, restarts=False), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": SurrogateKD(["y"], latent_weight=0.0, teacher_forcing=None), "local_steps": LOCAL_STEPS},
        {"loss": SurrogateKD(["y"], latent_weight=0.0), "teacher_forcing": switch(1.0, 0.0, LOCAL_STEPS)},
        {"loss": SurrogateKD(["y"], latent_weight=0.0), "teacher_forcing": switch({"z": 1.0}, {"z": 0.0}, LOCAL_STEPS)},
    ],
    ids=["the default", "a switch", "a switch by site"],
)
def test_the_end_of_teacher_forcing_is_such_a_step(options):
    pyro.clear_param_store()
    Distiller(student, teacher, TORCH["Adam"], weight=1 / ROWS, **options).fit(steps=STEPS, progress=False)
    assert pyro.param("loc").item() == pytest.approx(expected(TORCH["Adam"], restarts=True), rel=1e-5)


def test_the_learning_rate_goes_on():
    pyro.clear_param_store()
    trainer = Trainer(
        in_turn(student, teacher, losses(), weight=1 / ROWS),
        TORCH["Adam"],
        scheduler=lambda optim: torch.optim.lr_scheduler.ExponentialLR(optim, 0.5),
    )
    rates = trainer.fit(steps=STEPS, progress=False)["lr"]
    assert rates == pytest.approx([0.01 * 0.5**step for step in range(STEPS)])


def test_a_smooth_schedule_is_no_such_step():
    for schedule in (linear(1.0, 0.0, 10), lambda step: 0.25, lambda step: {"z": 0.5}):
        objective = DistillationObjective(SurrogateKD(["y"]), student, teacher, teacher_forcing=schedule)
        assert not any(objective.begins_anew_at(step) for step in range(20))


def test_a_function_that_goes_up_and_down_is_no_such_step():
    """A new optimiser in every other step would make Adam forget all that it should know."""
    loss = SurrogateKD(["y"])
    for options in ({"weight": lambda step: float(step % 2)}, {"teacher_forcing": lambda step: float(step % 2)}):
        objective = DistillationObjective(loss, student, teacher, **options)
        assert not any(objective.begins_anew_at(step) for step in range(20))


def test_a_switch_to_the_student_s_history_is_such_a_step():
    objective = DistillationObjective(OnPolicyKD(["y"]), student, teacher, student_fraction=switch(0.0, 1.0, 5))
    assert [step for step in range(20) if objective.begins_anew_at(step)] == [5]


def test_resumed_at_the_switch_training_ends_at_the_same_student(tmp_path):
    def trained(*ends: int) -> float:
        for end in ends:
            pyro.clear_param_store()
            folder = tmp_path / "-".join(map(str, ends))
            trainer = Trainer(in_turn(student, teacher, losses(), weight=1 / ROWS), TORCH["Adam"])
            trainer.fit(total_steps=end, checkpoints=folder, resume=end != ends[0], progress=False)
        return pyro.param("loc").item()

    assert trained(LOCAL_STEPS, STEPS) == trained(STEPS)
