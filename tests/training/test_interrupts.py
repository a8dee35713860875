"""Ctrl-C during a fit."""

import itertools
import os
import signal
import subprocess
import sys
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.training import Callback, CSVLogger, History
from pyro_kd.training.checkpoints import CheckpointFolder
from tests.support.training_callbacks import CtrlC
from tests.support.training_programs import fit, names, new_distiller


def test_ctrl_c_is_raised_after_everything_is_written(tmp_path):
    one, stop = new_distiller(), CtrlC()
    callbacks = [stop, CSVLogger(tmp_path / "log.csv")]
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 9. The checkpoint is .*step-00000003: .*resume=True"):
        one.fit(10, steps=9, checkpoints=tmp_path / "run", progress=False, callbacks=callbacks)
    assert one.interrupted
    assert stop.is_ended
    assert CheckpointFolder(tmp_path / "run").newest().step == 3
    assert History.load(tmp_path / "log.csv")["loss"] == one.history.losses
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert one.fit(10, total_steps=9, checkpoints=tmp_path / "run", resume=True, progress=False).num_rows == 9
    assert not one.interrupted


def test_ctrl_c_raises_without_a_folder_and_returns_in_a_notebook():
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 9. There is no checkpoint"):
        new_distiller().fit(10, steps=9, progress=False, callbacks=[CtrlC()])
    one = new_distiller()
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
    one = new_distiller()
    with pytest.raises(KeyboardInterrupt, match="after step 3 of 9. The checkpoint is .*step-00000003"):
        one.fit(steps=9, checkpoints=tmp_path / "run", progress=False, **call)
    assert CheckpointFolder(tmp_path / "run").newest().step == one.history.num_rows == 3


def test_ctrl_c_in_the_last_step_or_its_checkpoint_is_raised(tmp_path):
    """All steps are done, and whoever pressed it still wants the script to stop."""

    class Late(Callback):
        def on_checkpoint(self, trainer, path):
            signal.raise_signal(signal.SIGINT)

    for index, callback in enumerate((CtrlC(4), Late())):
        with pytest.raises(KeyboardInterrupt, match="after step 4 of 4"):
            new_distiller().fit(10, steps=4, checkpoints=tmp_path / str(index), progress=False, callbacks=[callback])
        assert names(tmp_path / str(index)) == ["step-00000004"]


def test_ctrl_c_is_raised_when_what_was_trained_is_not_valid(tmp_path):
    """It is not swallowed by whoever catches errors of pyro_kd, and nothing is written."""
    far = lambda params: torch.optim.SGD(params, lr=0.05)  # noqa: E731
    narrow = lambda rows: pyro.sample("x", dist.Normal(torch.zeros(rows), 0.05).to_event(1))  # noqa: E731

    def student(rows):
        pyro.sample("x", dist.Normal(torch.zeros(rows), pyro.param("scale", torch.tensor(0.5))).to_event(1))

    with pytest.raises(KeyboardInterrupt, match="what was trained is not valid: after step 1: .*scale"):
        fit(tmp_path, 5, student=student, teacher=narrow, optim=far, callbacks=[CtrlC(1)])
    assert names(tmp_path) == []


def test_a_process_that_ignores_ctrl_c_keeps_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        one = new_distiller()
        one.fit(10, steps=5, progress=False, callbacks=[CtrlC()])
        assert one.num_steps == 5
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_fit_runs_in_a_thread():
    one = new_distiller()
    thread = threading.Thread(target=one.fit, args=(10,), kwargs={"steps": 3, "progress": False})
    thread.start()
    thread.join()
    assert one.num_steps == 3


SCRIPT = """
import pyro, torch
from tests.support.training_callbacks import CtrlC
from tests.support.training_programs import new_distiller
one = new_distiller()
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
