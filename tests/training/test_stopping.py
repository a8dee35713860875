"""A callback ends a fit: as if the step were the last one."""

import pyro
import pytest
import torch

from pyro_kd import Distiller, LocalKD, freeze
from pyro_kd.training import Callback, Checkpoints, Trainer, Validation, in_turn
from tests.support.losses import SurrogateKD
from tests.support.training_callbacks import Recorder, Stop
from tests.support.training_programs import adam, fast_sgd, gaussian, mean, names, quiet_fit


def distiller():
    pyro.clear_param_store()
    return Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"]))


def test_a_stopped_fit_ends_as_one_of_fewer_steps(tmp_path):
    """With its checkpoint, its callbacks and its history, without a warning."""
    recorder, stopped = Recorder(), distiller()
    checkpoints = Checkpoints(tmp_path / "a", every=2)
    history = quiet_fit(stopped, steps=9, seed=1, checkpoints=checkpoints, callbacks=[Stop(3), recorder])
    assert (stopped.num_steps, stopped.interrupted) == (3, False)
    assert recorder.calls[-3:] == [("step", 3), ("checkpoint", "step-00000003"), ("end", 3)]
    shorter = distiller()
    shorter.expect(9)
    assert list(history.losses) == list(
        quiet_fit(shorter, steps=3, seed=1, checkpoints=Checkpoints(tmp_path / "b", every=2)).losses
    )
    assert names(tmp_path / "a") == names(tmp_path / "b")


def test_a_stopped_fit_is_resumed_to_its_end_bit_for_bit(tmp_path):
    whole = distiller()
    losses = list(quiet_fit(whole, steps=9, seed=1).losses)
    quiet_fit(distiller(), steps=9, seed=1, checkpoints=tmp_path, callbacks=[Stop(4)])
    resumed = distiller()
    assert list(quiet_fit(resumed, steps=9, seed=1, checkpoints=tmp_path, resume=True).losses) == losses
    assert resumed.num_steps == 9


def test_a_callback_that_stops_at_the_start_of_a_resumed_fit_takes_no_step(tmp_path):
    quiet_fit(distiller(), steps=9, seed=1, checkpoints=tmp_path, callbacks=[Stop(4)])
    resumed = distiller()
    quiet_fit(resumed, steps=9, seed=1, checkpoints=tmp_path, resume=True, callbacks=[Stop(4)])
    assert resumed.num_steps == 4
    assert names(tmp_path) == ["step-00000004"]


def test_a_stopped_fit_restores_the_best_parameters():
    values = iter([2.0, 1.0, 3.0, 4.0])
    seen = []

    class Seeing(Callback):
        def on_step(self, trainer, row):
            seen.append(pyro.param("mu").item())

    validation = Validation(lambda: next(values), every=1)
    quiet_fit(distiller(), steps=9, validation=validation, callbacks=[Seeing(), Stop(4)])
    assert len(seen) == 4
    assert pyro.param("mu").item() == seen[1]


def test_the_next_fit_goes_on_and_a_stop_outside_of_a_fit_does_nothing():
    trained = distiller()
    trained.stop()
    quiet_fit(trained, steps=2)
    quiet_fit(trained, steps=5, callbacks=[Stop(3)])
    assert trained.num_steps == 3
    quiet_fit(trained, steps=2)
    assert trained.num_steps == 5


@pytest.mark.parametrize("steps", [2, 4, 6])
def test_objectives_in_turn_end_before_and_after_a_turn(steps):
    pyro.clear_param_store()
    losses = {0: LocalKD(["x"]), 4: SurrogateKD(["x"])}
    trainer = Trainer(in_turn(mean, freeze(gaussian(3.0)), losses), fast_sgd)
    quiet_fit(trainer, steps=9, callbacks=[Stop(steps)])
    assert len(trainer.history.losses) == steps
    assert torch.isfinite(pyro.param("mu"))
