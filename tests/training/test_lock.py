"""One training run per folder."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from pyro_kd import Distiller, errors
from pyro_kd.training import Callback
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fit, gaussian, mean, names


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    class Second(Callback):
        def on_step(self, trainer, row):
            for resume in (False, True):
                with pytest.raises(errors.FolderInUseError, match="a different training run writes.*Nothing was trained"):
                    Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"])).fit(
                        10, steps=2, checkpoints=tmp_path, resume=resume, progress=False
                    )

    assert fit(tmp_path, 4, callbacks=[Second()]).num_steps == 4
    assert fit(tmp_path, 6, resume=True).num_steps == 6


HOLDER = """
import sys, time, os
from pathlib import Path
from pyro_kd.training.lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "fork":
        if os.fork() == 0:
            print("held", flush=True)
            time.sleep(60)
    else:
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process as POSIX does")
@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_second_process_is_refused_and_a_dead_one_holds_no_lock(tmp_path, how):
    """Also where a child of the dead one lives on, as the workers of a DataLoader do for a while."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path), how]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(errors.FolderInUseError):
            fit(tmp_path)
        assert names(tmp_path) == []
        holder.kill()
        holder.wait()
        assert fit(tmp_path).num_steps == 4
    finally:
        with suppress(ProcessLookupError):  # nobody is left of it
            os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"):
        assert fit(tmp_path).num_steps == 4
