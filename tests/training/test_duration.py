"""How long a fit is: steps, total steps, passes through the batches."""

import signal

import numpy as np
import pyro
import pytest

from pyro_kd import Distiller
from pyro_kd.training import Callback
from tests.support.losses import SurrogateKD
from tests.support.training_programs import fit, gaussian, mean, names, sgd


def new_distiller():
    pyro.clear_param_store()
    return Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]))


def test_steps_count_one_fit_and_total_steps_count_all_fits():
    one = new_distiller()
    for steps, after in (({"steps": 5}, 5), ({"steps": 5}, 10), ({"total_steps": 12}, 12), ({"steps": np.int64(1)}, 13)):
        before = pyro.param("mu").item() if one.num_steps else 0.0
        history = one.fit(10, progress=False, **steps)
        assert one.num_steps == after
        assert pyro.param("mu").item() > before
    assert history["step"] == list(range(1, 14))
    assert len(history.losses) == 13


def test_without_steps_a_fit_is_one_pass_through_the_batches():
    one = new_distiller()
    for after in (3, 6):
        one.fit(batches=[10, 10, 10], progress=False)
        assert one.num_steps == after


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"steps": 1.5}, TypeError, r"steps is 1.5, and must be a whole number"),
        ({"steps": 1e3}, TypeError, r"int\(1000.0\)"),
        ({"steps": "5"}, TypeError, "steps is '5'"),
        ({"steps": True}, TypeError, "steps is True"),
        ({"steps": 0}, ValueError, "at least 1, not 0"),
        ({"steps": -3}, ValueError, "at least 1, not -3"),
        ({"total_steps": 2.5}, TypeError, "total_steps is 2.5"),
        ({"total_steps": 0}, ValueError, "total_steps must be at least 1"),
        ({"steps": 2, "total_steps": 3}, TypeError, "either steps, of this fit, or total_steps"),
        ({}, TypeError, "steps is needed"),
    ],
)
def test_invalid_numbers_of_steps_are_errors(asked, error, message):
    one = new_distiller()
    with pytest.raises(error, match=message):
        one.fit(10, progress=False, **asked)
    assert one.num_steps == 0


def test_fewer_batches_than_one_step_takes_are_an_error():
    for batches in ([], [10]):
        one = Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]), accumulate=2)
        with pytest.raises(ValueError, match="batches are fewer than one step takes, accumulate=2"):
            one.fit(batches=batches, progress=False)


def test_a_fit_with_nothing_to_do_warns(tmp_path):
    one = new_distiller()
    one.fit(10, steps=5, progress=False)
    with pytest.warns(UserWarning, match="nothing to train: 5 steps are done, and 4 were asked for"):
        one.fit(10, total_steps=4, progress=False)
    fit(tmp_path, 4)
    with pytest.warns(UserWarning, match="nothing to train: 4 steps are done"):
        fit(tmp_path, 4, resume=True)


def test_the_same_lines_end_where_they_would_have_without_a_break(tmp_path):
    """A second fit, of 4 steps after one of 3, that is interrupted at its second step, and run again with all lines before it."""

    class Stop(Callback):
        def on_step(self, trainer, row):
            if trainer.num_steps == 5:
                signal.raise_signal(signal.SIGINT)

    def script(folder, callbacks=()):
        one = new_distiller()
        one.fit(10, steps=3, seed=0, progress=False)
        one.fit(10, steps=4, checkpoints=folder, resume=True, progress=False, callbacks=callbacks)
        return one.num_steps, pyro.param("mu").item(), one.history.losses

    undisturbed = script(tmp_path / "one")
    assert undisturbed[0] == 7
    with pytest.raises(KeyboardInterrupt):
        script(tmp_path / "two", [Stop()])
    assert names(tmp_path / "two") == ["step-00000005"]
    assert script(tmp_path / "two") == undisturbed


def test_resuming_from_before_the_current_step_warns(tmp_path):
    one = new_distiller()
    one.fit(10, steps=3, checkpoints=tmp_path, progress=False)
    one.fit(10, steps=2, progress=False)
    with pytest.warns(UserWarning, match="undone the last 2 steps"):
        one.fit(10, steps=9, checkpoints=tmp_path, resume=True, progress=False)
    assert one.num_steps == 9
