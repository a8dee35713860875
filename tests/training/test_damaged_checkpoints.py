"""Damaged, foreign and hostile checkpoints are noticed, and the one before them is used."""

import io
import json
import shutil

import pyro
import pytest
import torch

from pyro_kd import errors
from pyro_kd.training import checkpoints as checkpoints_module
from pyro_kd.training.checkpoints import CheckpointFolder, _checksum
from tests.support.training_programs import fit, header_of, rewrite


def edit(path, **changes):
    header = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(header | changes))


def truncate(path, name="student.safetensors"):
    (path / name).write_bytes((path / name).read_bytes()[:-1])


DAMAGES = {
    "truncated": (truncate, "truncated or damaged: student.safetensors"),
    "damaged": (
        lambda path: (path / "optimiser.pt").write_bytes(b"x" * (path / "optimiser.pt").stat().st_size),
        "damaged: optimiser.pt",
    ),
    "without its header": (lambda path: (path / "checkpoint.json").unlink(missing_ok=True), "no checkpoint of pyro_kd"),
    "foreign": (lambda path: edit(path, format="other"), "does not say format"),
    "newer": (lambda path: edit(path, format_version=99), "newer pyro_kd: format version 99.*Upgrade pyro_kd"),
    "not JSON": (lambda path: (path / "checkpoint.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_skipped_for_the_one_before(tmp_path, damage):
    undisturbed = fit(tmp_path / "undisturbed", steps=6).history["loss"]
    fit(tmp_path / "run")
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "run" / "step-00000004")
    with pytest.raises(errors.CheckpointError, match=message):
        fit(tmp_path / "run", steps=6, resume=tmp_path / "run" / "step-00000004")
    with pytest.warns(UserWarning, match=message):
        resumed = fit(tmp_path / "run", steps=6, resume=True)
    assert resumed.history["loss"] == undisturbed
    for path in (tmp_path / "run").glob("step-*"):
        spoil(path)
    with pytest.warns(UserWarning, match=message), pytest.raises(errors.CheckpointError, match=message):
        fit(tmp_path / "run", steps=6, resume=True)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_no_code_of_a_checkpoint_is_executed(tmp_path):
    import zlib

    fit(tmp_path)
    path = tmp_path / "step-00000004"
    buffer = io.BytesIO()
    torch.save({"optimiser": Hostile()}, buffer)
    (path / "optimiser.pt").write_bytes(buffer.getvalue())
    header = json.loads((path / "checkpoint.json").read_text())
    header["files"]["optimiser.pt"] = {"bytes": len(buffer.getvalue()), "crc32": zlib.crc32(buffer.getvalue())}
    header["crc32"] = _checksum(header)
    (path / "checkpoint.json").write_text(json.dumps(header))
    with pytest.raises(errors.CheckpointError, match="not trusted: optimiser.pt"):
        fit(tmp_path, steps=6, resume=path)


WRONG_ENTRIES = {
    "step": [3, "4", None, 4.0, -1, True, []],
    "values": [[], None, {}, "x"],
    "files": [[], {}, None, {"student.safetensors": {"bytes": "x", "crc32": None}}],
    "run": [None, 7],
    "format_version": ["1", None, 1.5, True, 0],
}


"""Wrong values of entries. Step 3 contradicts the name of the folder and the length of the history."""


WRONG_INNER_ENTRIES = {
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
    for name, values in WRONG_ENTRIES.items():
        yield from (header | {name: value} for value in values)
        yield {key: value for key, value in header.items() if key != name}
    for name, values in WRONG_INNER_ENTRIES.items():
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
