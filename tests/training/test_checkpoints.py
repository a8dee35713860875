"""The checkpoint folder: atomic writes, what a run deletes and what it leaves, permissions, cost."""

import os
import shutil
import stat
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import Distiller, cache_teacher, errors
from pyro_kd.training import (
    Checkpoints,
)
from pyro_kd.training import checkpoints as checkpoints_module
from pyro_kd.training.checkpoints import CheckpointFolder
from pyro_kd.training.fitting import Fit
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fit, gaussian, header_of, names, point, quiet_fit, rewrite, snapshot


@pytest.mark.xdist_group("timing")
def test_a_checkpoint_of_ten_million_parameters_takes_less_than_a_second(tmp_path, monkeypatch):
    """With Adam's moments: 120 MB. The whole of it is written between two steps, so that training stops for no longer."""
    net = nn.Linear(10_000, 1000, bias=False)

    def student():
        pyro.sample("x", dist.Normal(net.weight[:, 0].mean(), 1.0))
        net(torch.zeros(10_000))

    distiller = Distiller(student, point(3.0), adam, SurrogateKD(["x"]))
    write, seconds = Fit._write_checkpoint, []

    def timed(fit):
        begin = time.perf_counter()
        write(fit)
        seconds.append(time.perf_counter() - begin)

    monkeypatch.setattr(Fit, "_write_checkpoint", timed)
    quiet_fit(distiller, steps=4, checkpoints=Checkpoints(tmp_path, every=1))
    assert len(seconds) == 4
    assert sum(tensor.numel() for tensor in distiller.parameters.values()) == 10**7
    assert min(seconds) < 1.0, seconds


def test_reading_a_folder_changes_nothing_in_it(tmp_path):
    fit(tmp_path)
    (tmp_path / ".pyro_kd-writing-1-abc").mkdir()
    before = snapshot(tmp_path)
    folder = CheckpointFolder(tmp_path)
    assert folder.newest().step == 4
    assert [path.name for path in folder.all()] == ["step-00000002", "step-00000004"]
    assert snapshot(tmp_path) == before
    assert CheckpointFolder(tmp_path / "none").newest() is None
    assert not (tmp_path / "none").exists()


def test_reading_a_folder_does_not_disturb_a_write(tmp_path, monkeypatch):
    write = checkpoints_module._write_files

    def watched(checkpoint, folder):
        write(checkpoint, folder)
        CheckpointFolder(tmp_path).newest()

    monkeypatch.setattr(checkpoints_module, "_write_files", watched)
    fit(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_what_a_killed_write_has_left_is_removed_by_the_next_run(tmp_path):
    left = tmp_path / ".pyro_kd-writing-00000001-1"
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    fit(tmp_path)
    assert not left.exists()


def test_a_cache_that_is_being_written_into_the_folder_stays(tmp_path):
    def batches():
        yield 1
        fit(tmp_path)
        yield 1

    cache = cache_teacher(gaussian(3.0), path=tmp_path / "draws", batches=batches(), targets=["x"])
    assert len(cache) == 2
    assert names(tmp_path) == ["draws", "step-00000002", "step-00000004"]


@pytest.mark.parametrize("renames", range(3))
def test_a_run_that_is_killed_while_it_replaces_its_only_checkpoint_has_one(tmp_path, monkeypatch, renames):
    """After each of the renames the folder has a good checkpoint; a later write leaves one."""
    fit(tmp_path)
    folder, rename, copies = CheckpointFolder(tmp_path / "run", keep=1), Path.rename, []
    shutil.copytree(tmp_path / "step-00000004", folder.path / "step-00000004")
    again = folder.newest()

    def copied(path, target):
        if len(copies) == renames:
            shutil.copytree(folder.path, tmp_path / "killed")
        copies.append(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", copied)
    folder.write(again)
    monkeypatch.undo()
    assert names(folder.path) == ["step-00000004"]
    assert len(copies) == 3
    left = CheckpointFolder(tmp_path / "killed", keep=1)
    assert left.newest().step == 4
    left.write(again)
    assert names(left.path) == ["step-00000004"]


def foreign_things(folder):
    """What others may have in a folder, and what a newer version may have written there."""
    newest = max(folder.glob("step-*"))
    newer = folder / "step-00005000"
    shutil.copytree(newest, newer)
    rewrite(newer, header_of(newer) | {"format_version": 99}, sealed=True)
    copied = folder / "step-00006000"
    shutil.copytree(newest, copied)
    for name in ("step-00000010", "step-notes", "step-00000010-notes", ".tmp-mine", "step-000000010"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    (folder / "step-00007000").write_text("a file")
    return [path for path in folder.iterdir() if path.name not in {"step-00000002", "step-00000004", ".pyro_kd-lock"}]


def test_what_a_run_has_not_written_stays(tmp_path):
    fit(tmp_path)
    things = foreign_things(tmp_path)
    before = {path: snapshot(path) if path.is_dir() else path.read_bytes() for path in things}
    with pytest.warns(UserWarning, match="It stays as it is") as caught:
        assert fit(tmp_path, 30, resume=True).num_steps == 30
    said = " ".join(str(warning.message) for warning in caught)
    assert "step-00005000 was written by a newer pyro_kd" in said
    assert "step-00006000 is damaged: it holds step 4" in said
    assert "step-00000010 is no checkpoint" in said
    assert {path: snapshot(path) if path.is_dir() else path.read_bytes() for path in things} == before
    assert {"step-00000028", "step-00000030"} <= set(names(tmp_path))
    assert not {"step-00000010-2", "step-00000026"} & set(names(tmp_path)), "its own are kept as long as was asked for"


def test_a_checkpoint_whose_name_is_taken_gets_a_numbered_name(tmp_path):
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(errors.CheckpointError, match="holds checkpoints of a different run"):
        fit(tmp_path)
    (tmp_path / "step-00000004").rename(tmp_path / "aside")
    fit(tmp_path)
    (tmp_path / "step-00000004" / "checkpoint.json").write_text("{}")
    with pytest.warns(UserWarning, match="step-00000004 is no checkpoint.*It stays as it is"):
        fit(tmp_path, 4, resume=True)
    assert names(tmp_path) == ["aside", "step-00000002", "step-00000004", "step-00000004-2"]
    assert CheckpointFolder(tmp_path).newest().path.name == "step-00000004-2"
    assert fit(tmp_path, 6, resume=True).num_steps == 6


def test_an_interrupted_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    fit(tmp_path)
    before = snapshot(tmp_path)

    def full(*args):
        raise OSError("no space left on device")

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(errors.CheckpointError, match="step 6 could not be written.*no space"):
        fit(tmp_path, 6, resume=True)
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, 6, resume=True)
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        distiller = fit(tmp_path / "run")
        for name in ("student.pt", "student.safetensors"):
            distiller.save_student(tmp_path / name)
        distiller.history.save(tmp_path / "history.json")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name[0] != "."]
    assert len(files) == 3 + 2 * 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
