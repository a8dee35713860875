"""Validation during a fit: early stopping, the best parameters, schedulers that depend on it."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, errors
from pyro_kd.training import (
    ELBOObjective,
    Trainer,
    Validation,
    linear,
)
from tests.support.losses import SurrogateKD
from tests.support.training_programs import fast_sgd, gaussian, mean, quiet_fit


def test_early_stopping_restores_the_best_parameters():
    losses = iter([5.0, 3.0, 4.0, 3.5, 9.0])
    seen = []

    def validation():
        seen.append(pyro.param("mu").item())
        return next(losses)

    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    history = quiet_fit(distiller, steps=1000, validation=Validation(validation, every=2, patience=3))
    assert distiller.num_steps == 10
    assert pyro.param("mu").item() == seen[1]
    assert [value for value in history["validation/loss"] if not math.isnan(value)] == [5.0, 3.0, 4.0, 3.5, 9.0]


def test_a_fit_that_stopped_early_stays_stopped_when_resumed(tmp_path):
    def fit(steps):
        pyro.clear_param_store()
        distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
        losses = iter([1.0, 2.0, 3.0, 0.5])
        quiet_fit(
            distiller,
            steps=steps,
            validation=Validation(lambda: next(losses), every=1, patience=2),
            checkpoints=tmp_path,
            resume=True,
        )
        return distiller.num_steps, pyro.param("mu").item()

    first = fit(10)
    with pytest.warns(UserWarning, match="nothing to train: it has stopped early, after 2 validations"):
        assert fit(20) == first
    assert first == (3, pytest.approx(0.3))


def test_a_later_fit_does_not_restore_an_earlier_best():
    """It starts from the best of the first fit, after its first step, and has a best of its own."""
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    quiet_fit(distiller, steps=2, validation=Validation(lambda: 1.0, every=1))
    quiet_fit(distiller, steps=40)
    assert pyro.param("mu").item() == pytest.approx(3 - 3 * 0.9**41)
    losses = iter([9.0, 8.0, 8.5, 8.6])
    quiet_fit(distiller, steps=10, validation=Validation(lambda: next(losses), every=1, patience=2))
    assert distiller.num_steps == 2 + 40 + 4
    assert pyro.param("mu").item() == pytest.approx(3 - 3 * 0.9**43)


def test_a_validation_loss_that_is_nan_is_an_error():
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    with pytest.raises(errors.NonFiniteLossError, match="step 1: the validation loss is nan"):
        quiet_fit(distiller, steps=2, validation=Validation(lambda: math.nan, every=1))


def test_validation_losses_under_a_schedule_are_comparable():
    """At the weights of the last step: else a KL that is turned on slowly makes the first validation the best."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 1.0))

    objective = ELBOObjective(TraceMeanField_ELBO(), model, guide, latent_weight=linear(0.0, 1.0, 30))
    history = quiet_fit(Trainer(objective, fast_sgd), steps=30, validation=Validation([()], every=10))
    losses = [value for value in history["validation/loss"] if not math.isnan(value)]
    assert losses == sorted(losses, reverse=True)


def test_validations_take_the_same_batches_whatever_generator_their_loader_has():
    """Also those of a resumed run, whose generators begin anew."""
    data = TensorDataset(torch.arange(10.0))
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(data, 3, shuffle=True, drop_last=True, generator=generator)
    before, taken = generator.get_state(), []

    def student(x):
        taken.append(x.tolist())
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))

    def teacher(x):
        pyro.sample("x", dist.Normal(x.mean(), 1.0))

    still = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    distiller = Distiller(student, teacher, still, SurrogateKD(["x"]))
    losses = quiet_fit(distiller, torch.zeros(1), steps=2, validation=Validation(loader, every=1))["validation/loss"]
    assert losses[0] == losses[1]
    assert torch.equal(generator.get_state(), before)
    rows = [x for x in taken if len(x) == 3]
    assert rows[:3] == rows[3:]
    values = [distiller.evaluate(batches=loader, seed=seed).loss.mean for seed in (0, 0, None)]
    assert losses[0] == values[0] == values[1] != values[2]
    assert not torch.equal(generator.get_state(), before)


def test_small_improvements_do_not_count_and_the_last_parameters_can_be_kept():
    losses = iter([5.0, 4.9, 4.8])
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]))
    quiet_fit(
        distiller,
        steps=9,
        validation=Validation(lambda: next(losses), every=1, patience=2, min_delta=0.5, restore_best=False),
    )
    assert distiller.num_steps == 3
    assert pyro.param("mu").item() == pytest.approx(3 - 3 * 0.9**3)


def test_a_plateau_scheduler_steps_at_each_validation():
    def plateau(optim):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optim, factor=0.5, patience=0)

    losses = iter([1.0, 2.0, 3.0])
    distiller = Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"]), scheduler=plateau)
    history = quiet_fit(distiller, steps=4, validation=Validation(lambda: next(losses, 9.0), every=1))
    assert history["lr"] == pytest.approx([0.1, 0.1, 0.05, 0.025])
