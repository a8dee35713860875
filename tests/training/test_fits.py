"""What a fit is asked for, and how it ends: steps and total steps, Ctrl-C, devices; and what its objects show of themselves."""

import html
import itertools
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_kd import Distiller, SurrogateKD, errors, freeze
from pyro_kd.training import Callback, CSVLogger, History, Objective, Trainer, linear
from pyro_kd.training.checkpoints import CheckpointFolder
from tests.support.training_programs import adam, fit, gaussian, mean, names, sgd


def distiller():
    pyro.clear_param_store()
    return Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]))


# Steps.


def test_steps_are_more_steps_and_total_steps_are_those_of_all_fits():
    one = distiller()
    for steps, after in (({"steps": 5}, 5), ({"steps": 5}, 10), ({"total_steps": 12}, 12), ({"steps": np.int64(1)}, 13)):
        before = pyro.param("mu").item() if one.num_steps else 0.0
        history = one.fit(10, progress=False, **steps)
        assert one.num_steps == after
        assert pyro.param("mu").item() > before
    assert history["step"] == list(range(1, 14))
    assert len(history.losses) == 13


def test_a_pass_through_the_batches_is_one_more():
    one = distiller()
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
def test_numbers_of_steps_that_make_no_sense(asked, error, message):
    one = distiller()
    with pytest.raises(error, match=message):
        one.fit(10, progress=False, **asked)
    assert one.num_steps == 0


def test_batches_that_make_no_step():
    for batches in ([], [10]):
        one = Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]), accumulate=2)
        with pytest.raises(ValueError, match="batches make no step of accumulate=2"):
            one.fit(batches=batches, progress=False)


def test_a_fit_without_anything_to_do_says_so(tmp_path):
    one = distiller()
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
        one = distiller()
        one.fit(10, steps=3, seed=0, progress=False)
        one.fit(10, steps=4, checkpoint=folder, resume=True, progress=False, callbacks=callbacks)
        return one.num_steps, pyro.param("mu").item(), one.history.losses

    undisturbed = script(tmp_path / "one")
    assert undisturbed[0] == 7
    with pytest.raises(KeyboardInterrupt):
        script(tmp_path / "two", [Stop()])
    assert names(tmp_path / "two") == ["step-00000005"]
    assert script(tmp_path / "two") == undisturbed


def test_resuming_behind_what_was_trained_since_is_said(tmp_path):
    one = distiller()
    one.fit(10, steps=3, checkpoint=tmp_path, progress=False)
    one.fit(10, steps=2, progress=False)
    with pytest.warns(UserWarning, match="undone the last 2 steps"):
        one.fit(10, steps=9, checkpoint=tmp_path, resume=True, progress=False)
    assert one.num_steps == 9


# Ctrl-C.


class CtrlC(Callback):
    def __init__(self, step=3):
        self.step = step
        self.is_ended = False

    def on_step(self, trainer, row):
        if trainer.num_steps == self.step:
            signal.raise_signal(signal.SIGINT)

    def on_end(self, trainer):
        self.is_ended = True


def test_ctrl_c_is_raised_once_all_is_written(tmp_path):
    one, stop = distiller(), CtrlC()
    callbacks = [stop, CSVLogger(tmp_path / "log.csv")]
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 9. The checkpoint is .*step-00000003: .*resume=True"):
        one.fit(10, steps=9, checkpoint=tmp_path / "run", progress=False, callbacks=callbacks)
    assert one.interrupted
    assert stop.is_ended
    assert CheckpointFolder(tmp_path / "run").newest().step == 3
    assert History.load(tmp_path / "log.csv")["loss"] == one.history.losses
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert one.fit(10, total_steps=9, checkpoint=tmp_path / "run", resume=True, progress=False).num_rows == 9
    assert not one.interrupted


def test_ctrl_c_without_a_folder_and_in_a_notebook():
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 9. There is no checkpoint"):
        distiller().fit(10, steps=9, progress=False, callbacks=[CtrlC()])
    one = distiller()
    with pytest.warns(UserWarning, match="stopped by Ctrl-C after step 3 of 9"):
        history = one.fit(10, steps=9, progress=False, callbacks=[CtrlC()], return_on_interrupt=True)
    assert one.interrupted
    assert history.num_rows == 3


class Raises(Callback):
    def on_step(self, trainer, row):
        if trainer.num_steps == 3:
            raise KeyboardInterrupt


def batches_with_ctrl_c():
    yield from (10, 10, 10)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "call", [{"callbacks": [Raises()], "batches": itertools.repeat(10)}, {"batches": batches_with_ctrl_c()}]
)
def test_a_keyboard_interrupt_between_steps_is_ctrl_c(call, tmp_path):
    one = distiller()
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 9. The checkpoint is .*step-00000003"):
        one.fit(steps=9, checkpoint=tmp_path / "run", progress=False, **call)
    assert CheckpointFolder(tmp_path / "run").newest().step == one.history.num_rows == 3


def test_ctrl_c_in_the_last_step_or_while_the_last_checkpoint_is_written(tmp_path):
    """All steps are done, and whoever pressed it still wants the script to stop."""

    class Late(Callback):
        def on_checkpoint(self, trainer, path):
            signal.raise_signal(signal.SIGINT)

    for index, callback in enumerate((CtrlC(4), Late())):
        with pytest.raises(KeyboardInterrupt, match="after step 4 of 4"):
            distiller().fit(10, steps=4, checkpoint=tmp_path / str(index), progress=False, callbacks=[callback])
        assert names(tmp_path / str(index)) == ["step-00000004"]


def test_ctrl_c_when_what_was_trained_is_not_valid(tmp_path):
    """It is not swallowed by whoever catches errors of pyro_kd, and nothing is written."""
    far = lambda params: torch.optim.SGD(params, lr=0.05)  # noqa: E731
    narrow = lambda rows: pyro.sample("x", dist.Normal(torch.zeros(rows), 0.05).to_event(1))  # noqa: E731

    def student(rows):
        pyro.sample("x", dist.Normal(torch.zeros(rows), pyro.param("scale", torch.tensor(0.5))).to_event(1))

    with pytest.raises(KeyboardInterrupt, match="what was trained is not valid: after step 1: .*scale"):
        fit(tmp_path, 5, student=student, teacher=narrow, optim=far, callbacks=[CtrlC(1)])
    assert names(tmp_path) == []


def test_a_process_that_ignores_ctrl_c_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        one = distiller()
        one.fit(10, steps=5, progress=False, callbacks=[CtrlC()])
        assert one.num_steps == 5
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_fit_in_a_thread():
    one = distiller()
    thread = threading.Thread(target=one.fit, args=(10,), kwargs={"steps": 3, "progress": False})
    thread.start()
    thread.join()
    assert one.num_steps == 3


SCRIPT = """
import pyro, torch
from tests.training.test_fits import CtrlC, distiller
one = distiller()
one.fit(10, steps=50, progress=False, callbacks=[CtrlC()])
print("goes on")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="exit statuses of POSIX")
def test_a_script_stops_at_ctrl_c():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, cwd=os.getcwd(), check=False
    )
    assert done.returncode == -signal.SIGINT
    assert "goes on" not in done.stdout
    assert "KeyboardInterrupt: stopped by Ctrl-C after step 3 of 50" in done.stderr


# Devices.


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "nonsense:0", 3.5])
def test_a_device_that_is_not_there(device):
    with pytest.raises(errors.MissingDeviceError, match=re.escape(f"device={device!r} is not there") + ".*There is 'cpu'"):
        Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]), device=device)


# What objects show of themselves.


def decoder(rows):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * z, 1.0))


def text_of(value):
    """The cells of a table for a notebook, tags and entities taken away."""
    return html.unescape(re.sub("<[^>]*>", " ", value._repr_html_()))


def test_trainers_show_what_they_train():
    one = Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"]), weight=2.0, latent_weight=linear(0.0, 1.0, 5))
    for shown in (repr(one), text_of(one)):
        for part in (
            "Distiller",
            "0 done",
            "SurrogateKD",
            "mean",
            "gaussian.teacher",
            "weight=2",
            "found at the first step",
        ):
            assert part in shown
    one.fit(10, steps=2, progress=False)
    for shown in (repr(one), text_of(one)):
        for part in ("2 done, last loss", "torch's Adam", "1 in 1 tensors"):
            assert part in shown
    new, old = Objective(Trace_ELBO(), decoder, gaussian(1.0)), Objective(SurrogateKD(["x"]), decoder, freeze(decoder))
    two = Trainer({"new": new, "old": old}, adam)
    assert "objective new" in repr(two)
    assert "objective old" in repr(two)
    assert one._repr_html_().startswith("<table>")


def test_objectives_histories_and_evaluations_show_what_they_are():
    objective = Objective(SurrogateKD(["x"]), decoder, gaussian(3.0), weight=linear(0.0, 1.0, 5))
    for shown in (repr(objective), text_of(objective)):
        assert "SurrogateKD" in shown
        assert "decoder" in shown
    pyro.clear_param_store()
    decoder(1)
    teacher = freeze(decoder)
    pyro.clear_param_store()
    one = Distiller(decoder, teacher, adam, SurrogateKD(["x"]))
    history = one.fit(10, steps=3, progress=False)
    assert repr(history).startswith("History(3 steps: step=3, loss=")
    assert "History of 3 steps" in text_of(history)
    assert re.search(r"loss .* at first, .* at last", text_of(history))
    assert "measured at 1 steps" in text_of(history)
    found = one.evaluate(10, num_samples=3)
    for shown in (repr(found), text_of(found)):
        assert re.search(r"loss .* ± ", shown)
        assert re.search(r"term x .* ± ", shown)
    assert "±" not in repr(one.evaluate(10)), "one value has no standard error"
    assert repr(History()) == "History(0 steps)"
    assert "History of 0 steps" in text_of(History())
