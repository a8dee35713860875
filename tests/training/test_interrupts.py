"""Ctrl-C during a fit."""

import contextlib
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
from torch.utils.data import DataLoader

from pyro_kd import Distiller, LocalKD
from pyro_kd.training import Callback, CSVLogger, History
from pyro_kd.training.checkpoints import CheckpointFolder
from tests.support.training_callbacks import CtrlC, Stop
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


def rows_of_steps(folder, breaks_at=None, callbacks=()):
    """A fit of two batches a step: the batches of each step, and the losses of all."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            seen.append(index)
            if len(seen) == breaks_at:
                raise KeyboardInterrupt
            return torch.randn(2)  # as augmentation has it

    def student(x):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)) * x, 1.0).to_event(2))

    def teacher(x):
        pyro.sample("x", dist.Normal(3.0 * x, 1.0).to_event(2))

    pyro.clear_param_store()
    seen, adam = [], lambda params: torch.optim.Adam(params, lr=0.1)
    distiller = Distiller(student, teacher, adam, LocalKD(["x"]), accumulate=2)
    loader = DataLoader(Rows(), 3, shuffle=True)
    options = {"seed": 1, "checkpoints": folder, "resume": True, "progress": False, "callbacks": callbacks}
    with contextlib.suppress(KeyboardInterrupt):
        distiller.fit(batches=loader, steps=5, **options)
    return seen, distiller.history.losses


def test_no_batch_of_a_step_that_was_not_taken_is_lost(tmp_path):
    """Ctrl-C comes as the second batch of step 3 is loaded, or the fit is stopped before its first step."""
    rows, losses = rows_of_steps(tmp_path / "undisturbed")
    begun, _ = rows_of_steps(tmp_path / "broken", breaks_at=17)
    assert names(tmp_path / "broken") == ["step-00000002"]
    assert begun == rows[:17]
    resumed, found = rows_of_steps(tmp_path / "broken")
    assert (resumed[-18:], found) == (rows[12:], losses)
    stopped, _ = rows_of_steps(tmp_path / "stopped", callbacks=[Stop(0)])
    assert names(tmp_path / "stopped") == ["step-00000000"]
    assert stopped == rows[:3]
    resumed, found = rows_of_steps(tmp_path / "stopped")
    assert (resumed[3:], found) == (rows, losses)


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
