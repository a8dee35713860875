"""Runs that are interrupted or killed end as if nothing had happened; what does not fit a run is refused."""

import json
import signal
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import Distiller, errors, freeze
from tests.support.killed_training import result, train
from tests.support.losses import SurrogateKD
from tests.support.training_callbacks import CtrlC, Recorder
from tests.support.training_programs import adam, decoder, fast_sgd, fit, gaussian, mean, names, point, quiet_fit

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


@pytest.mark.parametrize("pyro_optimiser", [False, True])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(tmp_path, pyro_optimiser):
    """Parameters, buffers, optimiser, schedule, shuffled and augmented batches, history, every random stream."""
    undisturbed = result(train(tmp_path / "one", pyro_optimiser=pyro_optimiser))
    for step in (26, 39):
        with pytest.warns(UserWarning, match=f"stopped by Ctrl-C after step {step} of 60.*step-000000{step}"):
            train(tmp_path / "two", callbacks=[CtrlC(step)], pyro_optimiser=pyro_optimiser)
    assert result(train(tmp_path / "two", pyro_optimiser=pyro_optimiser)) == undisturbed


def test_ctrl_c_ends_a_fit_cleanly(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="stopped by Ctrl-C after step 25"):
        interrupted = train(tmp_path / "two", callbacks=[CtrlC(25)])
    assert interrupted.interrupted
    assert interrupted.num_steps == interrupted.history.num_rows == 25
    assert signal.getsignal(signal.SIGINT) is before
    assert result(train(tmp_path / "two")) == result(train(tmp_path / "one"))


def killed(tmp_path, kills, seed):
    command = [
        sys.executable,
        "-m",
        "tests.support.killed_training",
        str(tmp_path / "kills"),
        "--kills",
        str(kills),
        "--seed",
        str(seed),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_a_killed_run_loses_nothing(tmp_path):
    found = killed(tmp_path, 6, 0)
    assert found["kills"] >= 6
    assert found["different"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_200_times_loses_nothing(tmp_path):
    found = killed(tmp_path, 200, 1)
    assert found["kills"] >= 200
    assert found["different"] == []


def test_a_checkpoint_of_a_different_architecture_is_refused(tmp_path):
    def fit(width, **options):
        pyro.clear_param_store()
        teacher, student = freeze(decoder(0)), decoder(1, width)
        quiet_fit(Distiller(student, teacher, adam, SurrogateKD(["x"])), 5, checkpoints=tmp_path, **options)

    fit(4, steps=2)
    with pytest.raises(errors.ArchitectureMismatchError) as error:
        fit(3, steps=4, resume=True)
    for part in (
        "'decoder.0.weight' is float32 of shape (4, 2) in the checkpoint and float32 of shape (3, 2)",
        "'decoder.2.weight'",
        "a different folder",
    ):
        assert part in str(error.value)
    with pytest.raises(
        errors.ArchitectureMismatchError,
        match=r"'mu' is missing in the checkpoint; .*'decoder.0.weight' is not in the student",
    ):
        quiet_fit(Distiller(mean, gaussian(0.0), adam, SurrogateKD(["x"])), 5, steps=4, checkpoints=tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    recorder = Recorder()
    distiller = Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"]))
    with pytest.raises(errors.CheckpointError, match="cannot be written.*Nothing was trained"):
        quiet_fit(distiller, steps=4, checkpoints=tmp_path / "file" / "run", callbacks=[recorder])
    assert recorder.calls == []
    assert distiller.num_steps == 0


def test_resuming_needs_a_folder_and_starts_anew_in_an_empty_one(tmp_path):
    with pytest.raises(TypeError, match="resume=True needs the folder"):
        quiet_fit(Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"])), steps=4, resume=True)
    assert fit(tmp_path, resume=True).num_steps == 4  # the first start of a command that resumes
    with pytest.warns(UserWarning, match="nothing to train: 4 steps are done, and 4 were asked for"):
        assert fit(tmp_path, resume=True).num_steps == 4  # and one when all is done
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_folder_of_a_different_run_is_not_written_into(tmp_path):
    fit(tmp_path)
    with pytest.raises(
        errors.CheckpointError, match="holds checkpoints of a different run, up to step-00000004.*resume=True"
    ):
        fit(tmp_path)
    assert fit(tmp_path, steps=6, resume=tmp_path / "step-00000002").num_steps == 6
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_checkpoint_of_a_different_optimiser_or_constraint_is_refused(tmp_path):
    def student(constraint):
        return lambda: pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.5), constraint=constraint), 1.0))

    def fit(optim, constraint, **options):
        pyro.clear_param_store()
        quiet_fit(Distiller(student(constraint), point(0.7), optim, SurrogateKD(["x"])), checkpoints=tmp_path, **options)

    fit(adam, dist.constraints.positive, steps=2)
    with pytest.raises(errors.CheckpointError, match="written with torch's Adam, and this run has torch's SGD"):
        fit(fast_sgd, dist.constraints.positive, steps=4, resume=True)
    with pytest.raises(errors.ArchitectureMismatchError, match=r"'mu' had GreaterThan\(lower_bound=0.0\), and has Interval"):
        fit(adam, dist.constraints.unit_interval, steps=4, resume=True)
    with pytest.raises(TypeError, match="LBFGS"):
        Distiller(mean, gaussian(3.0), lambda params: torch.optim.LBFGS(params), SurrogateKD(["x"])).step()


def test_numbers_of_numpy_in_an_optimiser_are_saved(tmp_path):
    import numpy as np

    for resume in (False, True):
        pyro.clear_param_store()
        optim = lambda params: torch.optim.Adam(params, lr=np.float64(0.05))  # noqa: E731
        distiller = Distiller(mean, gaussian(3.0), optim, SurrogateKD(["x"]))
        quiet_fit(distiller, steps=4 if resume else 2, checkpoints=tmp_path, resume=resume)
    assert distiller.num_steps == 4
