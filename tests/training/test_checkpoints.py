"""Files of a training run: nothing of others is touched, damage is noticed, and a file is there as a whole or not at all."""

import json
import os
import shutil
import stat
import sys
import threading

import pyro
import pytest
import torch
from safetensors.torch import load_file

from pyro_kd import errors
from pyro_kd.training import Callback, CSVLogger, History
from pyro_kd.training import checkpoints as checkpoints_module
from pyro_kd.training.checkpoints import CheckpointFolder, _checksum
from pyro_kd.training.saving import save_tensors
from tests.support.training_programs import adam, fit, mean, names


def header_of(path):
    return json.loads((path / "checkpoint.json").read_text())


def rewrite(path, header, *, sealed):
    if sealed:
        header["crc32"] = _checksum(header)
    (path / "checkpoint.json").write_text(json.dumps(header))


# The folder.


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_looking_at_a_folder_changes_nothing_in_it(tmp_path):
    fit(tmp_path)
    (tmp_path / ".pyro_kd-writing-1-abc").mkdir()
    before = snapshot(tmp_path)
    folder = CheckpointFolder(tmp_path)
    assert folder.newest().step == 4
    assert [path.name for path in folder.all()] == ["step-00000002", "step-00000004"]
    assert snapshot(tmp_path) == before
    assert CheckpointFolder(tmp_path / "none").newest() is None
    assert not (tmp_path / "none").exists()


def test_a_look_in_the_middle_of_a_write_does_not_disturb_it(tmp_path, monkeypatch):
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


def test_a_checkpoint_whose_name_is_taken_gets_another(tmp_path):
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(errors.CheckpointError, match="holds checkpoints of another run"):
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


# The values.


DAMAGES = {
    "step": [3, "4", None, 4.0, -1, True, []],
    "values": [[], None, {}, "x"],
    "files": [[], {}, None, {"student.safetensors": {"bytes": "x", "crc32": None}}],
    "run": [None, 7],
    "format_version": ["1", None, 1.5, True, 0],
}
"""Wrong values of entries. Step 3: of another folder, and another history."""

INNER_DAMAGES = {
    "begin": [-1, 9, "0", 0.5],
    "batches_taken": [-1, "0", None],
    "best": ["1.0", [], 0.5],
    "stale": [None, -2],
    "columns": [None, ["none"], [1], "step"],
    "constraints": [[], {"mu": 1}],
    "fingerprint": [None, []],
    "optimiser": [1],
    "random": [[], {}, {"python": [3, [1, 2], None], "numpy": []}],
}


def damaged_headers(header):
    for name, values in DAMAGES.items():
        yield from (header | {name: value} for value in values)
        yield {key: value for key, value in header.items() if key != name}
    for name, values in INNER_DAMAGES.items():
        yield from (header | {"values": header["values"] | {name: value}} for value in values)
        yield header | {"values": {key: value for key, value in header["values"].items() if key != name}}


@pytest.mark.parametrize("sealed", [False, True], ids=["checksum broken", "checksum right"])
def test_a_wrong_value_is_noticed_and_the_checkpoint_before_it_is_used(tmp_path, sealed):
    """Also where somebody has made the checksum fit."""
    fit(tmp_path)
    path = tmp_path / "step-00000004"
    header = header_of(path)
    for damaged in damaged_headers(header):
        rewrite(path, dict(damaged), sealed=sealed)
        with pytest.raises(errors.CheckpointError):
            CheckpointFolder.read(path)
        with pytest.warns(UserWarning, match="step-00000004"):
            assert CheckpointFolder(tmp_path).newest().step == 2
    rewrite(path, header, sealed=False)
    assert CheckpointFolder(tmp_path).newest().step == 4


def test_every_single_damaged_byte_of_a_header_is_noticed(tmp_path):
    fit(tmp_path)
    path = tmp_path / "step-00000004"
    whole = (path / "checkpoint.json").read_bytes()
    meaning = header_of(path)
    for place in range(0, len(whole), 97):
        (path / "checkpoint.json").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            CheckpointFolder.read(path)
        except errors.CheckpointError:
            continue
        assert header_of(path) == meaning, f"byte {place}"


def test_a_resumed_run_goes_on_from_before_the_damage(tmp_path):
    undisturbed = fit(tmp_path / "one", 6).history["loss"]
    for damage in ({"step": 6}, {"step": "4"}, {"values": []}):
        fit(tmp_path / "two")
        rewrite(tmp_path / "two" / "step-00000004", header_of(tmp_path / "two" / "step-00000004") | damage, sealed=False)
        with pytest.warns(UserWarning, match="is not as it was written"):
            assert fit(tmp_path / "two", 6, resume=True).history["loss"] == undisturbed
        shutil.rmtree(tmp_path / "two")


def test_nothing_is_half_loaded(tmp_path):
    """An optimiser's state that does not fit, though the file is as it was written."""
    fit(tmp_path)
    path = tmp_path / "step-00000004"
    state = torch.load(path / "optimiser.pt", weights_only=True)
    state["optimiser"]["param_groups"][0]["params"] = [0, 1]
    torch.save(state, path / "optimiser.pt")
    header = header_of(path)
    file = path / "optimiser.pt"
    header["files"]["optimiser.pt"] = {"bytes": file.stat().st_size, "crc32": checkpoints_module._crc32(file)}
    rewrite(path, header, sealed=True)
    with pytest.raises(errors.CheckpointError, match="the optimiser's state"):
        fit(tmp_path, 6, resume=path)
    assert pyro.param("mu").item() == 0.0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
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


# The student alone.


@pytest.mark.parametrize("name", ["student.pt", "student.safetensors"])
def test_a_student_that_cannot_be_written_leaves_nothing(tmp_path, name, monkeypatch):
    distiller = fit()
    with pytest.raises(errors.CheckpointError, match="there is no folder .*none.*mkdir"):
        distiller.save_student(tmp_path / "none" / name)
    (tmp_path / "folder" / name).mkdir(parents=True)
    with pytest.raises(errors.CheckpointError, match="it is a folder"):
        distiller.save_student(tmp_path / "folder" / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.CheckpointError, match="there is no folder"):
        distiller.save_student(tmp_path / "file" / name)
    distiller.save_student(tmp_path / name)
    before = snapshot(tmp_path)

    def full(tensors, file):
        getattr(file, "write_bytes", getattr(file, "write", None))(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(errors.CheckpointError, match="the student could not be written .*no space left"):
        distiller.save_student(tmp_path / name)
    assert snapshot(tmp_path) == before


def test_a_student_written_by_several_at_once_is_that_of_one(tmp_path):
    distiller = fit()
    path = tmp_path / "student.safetensors"
    threads = [threading.Thread(target=save_tensors, args=(distiller._state, path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(load_file(path)["mu"], pyro.param("mu"))
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    fit().save_student(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").read_bytes() != b"old"


# The history.


def history():
    found = History()
    for step in range(1, 4):
        found.append({"step": step, "loss": 1 / step, **({"term/x": 0.5} if step == 2 else {})})
    return found


@pytest.mark.parametrize("name", ["history.json", "history.csv"])
def test_a_history_is_written_as_a_whole_or_not_at_all(tmp_path, name, monkeypatch):
    history().save(tmp_path / name)
    assert History.load(tmp_path / name).to_json() == history().to_json()
    History().save(tmp_path / f"empty-{name}")
    assert History.load(tmp_path / f"empty-{name}").num_rows == 0
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(errors.CheckpointError, match="the history could not be written"):
        History().save(tmp_path / name)
    assert snapshot(tmp_path) == before
    with pytest.raises(errors.CheckpointError, match="there is no folder"):
        history().save(tmp_path / "none" / name)


@pytest.mark.parametrize("name", ["history.json", "history.csv"])
def test_a_history_that_is_cut_short_is_an_error(tmp_path, name):
    history().save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in range(len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:length])
        try:
            found = History.load(tmp_path / name)
        except errors.CheckpointError:
            continue
        rows = found.num_rows
        assert name.endswith("csv"), length
        assert whole[:length].endswith(b"\n"), length
        assert found["loss"] == history()["loss"][:rows]
    with pytest.raises(errors.CheckpointError, match="cannot be read"):
        History.load(tmp_path / f"none-{name}")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "1",
        '{"step": 1}',
        '{"step": [1, "2"]}',
        '{"step": [1], "loss": [1, 2]}',
        '{"step": [true]}',
        "\xff",
        "[" * 10**5,
    ],
)
def test_what_is_no_history(tmp_path, text):
    (tmp_path / "history.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.CheckpointError, match="cannot be read as a history"):
        History.load(tmp_path / "history.json")


@pytest.mark.parametrize("text", ["step,loss\r\n1\r\n", "step,step\r\n1,2\r\n", "step\r\nx\r\n", 'step\r\n"1\r\n'])
def test_what_is_no_table(tmp_path, text):
    (tmp_path / "history.csv").write_bytes(text.encode())
    with pytest.raises(errors.CheckpointError, match="cannot be read as a history"):
        History.load(tmp_path / "history.csv")


def test_a_log_of_any_name_is_csv(tmp_path):
    fit(steps=2, callbacks=[CSVLogger(tmp_path / "logs" / "run.txt")])
    assert (tmp_path / "logs" / "run.txt").read_text().startswith("step,loss")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run.txt"]


def test_a_callback_may_read_what_was_written(tmp_path):
    class Reader(Callback):
        steps = []

        def on_checkpoint(self, trainer, path):
            self.steps.append(CheckpointFolder.read(path).step)

    fit(tmp_path, student=mean, optim=adam, callbacks=[Reader()])
    assert Reader.steps == [2, 4]
