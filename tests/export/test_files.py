"""Files of exported programs: they load as what was written or are refused with a typed error, and never run code."""

import json
import pickle
import random
import zipfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.errors import CheckpointError, CorruptExportError
from pyro_kd.export import export_sampler, load
from tests.support.damaged_exports import mutated
from tests.support.package_files import ROOT

PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
DESCRIPTION = "extra/pyro_kd.json"
FEED = {"z/normal": torch.tensor([0.0, 1.0, 2.0]), "y/normal": torch.zeros(3)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of a small program with a parameter, and what the program gives."""

    def model(num_rows):
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.25)), 1.0))
            pyro.sample("y", dist.Normal(2 * z, 0.5))

    path = tmp_path_factory.mktemp("export") / "student.pt2"
    exported = export_sampler(model, 4, targets=["y"], path=path)
    return path, exported(FEED)["y"]


def changed(path, name, change, target):
    """A copy of an archive in which one part is different, with right checksums."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(f"/{name}"):
                content = change(content)
            if content is not None:
                new.writestr(info.filename, content)
    return target


def test_a_file_loads_as_what_was_written(written):
    path, expected = written
    loaded = load(path)
    assert loaded(FEED)["y"].equal(expected)
    assert list(loaded.program.state_dict) == ["loc"]
    assert [item.name for item in loaded.description.noise] == ["z/normal", "y/normal"]
    assert loaded.sample(5, seed=0)["y"].shape == (5,)
    loaded.save(path.with_name("again.pt2"))
    assert load(path.with_name("again.pt2"))(FEED)["y"].equal(expected)


def test_a_file_does_not_tell_where_and_from_what_code_it_was_written(written):
    content = written[0].read_bytes()
    texts = (__file__, "plate", "torch/", str(ROOT), ".py", str(Path.cwd()), str(Path.home()), 'stack_trace": "  File')
    for text in texts:
        assert text.encode() not in content


def test_truncated_and_foreign_files_are_refused(written, tmp_path):
    path, _ = written
    content = path.read_bytes()
    broken = tmp_path / "broken.pt2"
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:length])
        with pytest.raises(CorruptExportError, match="truncated or damaged"):
            load(broken)
    torch.save({"a": torch.zeros(2)}, broken)
    with pytest.raises(CorruptExportError, match=r"holds .* which pyro_kd never writes"):
        load(broken)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt2")
    with pytest.raises(CorruptExportError, match="is not a file"):
        load(tmp_path)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_load_as_what_was_written(written, tmp_path, count):
    path, expected = written
    content, rng = path.read_bytes(), random.Random(count)
    broken, refused = tmp_path / "broken.pt2", 0
    for _ in range(count):
        broken.write_bytes(mutated(content, rng))
        try:
            found = load(broken)(FEED)["y"]
        except CorruptExportError:
            refused += 1
        else:
            assert found.equal(expected)
    assert refused > count / 3


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def hostile(change):
    return lambda content: json.dumps(change(json.loads(content))).encode()


def with_node(**changes):
    def change(program):
        program["graph_module"]["graph"]["nodes"][0].update(changes)
        return program

    return hostile(change)


def with_pickle(config):
    next(iter(config["config"].values()))["use_pickle"] = True
    return config


def with_expression(program):
    program["range_constraints"] = {"__import__('pathlib').Path('exploded').touch()": {"min_val": 1, "max_val": 2}}
    return program


def with_tree(program):
    kind = json.dumps([1, {"type": "collections.defaultdict", "context": '"os:system"', "children_spec": []}])
    program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = kind
    return program


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PROGRAM, with_node(target="torch.os.system"), "operation 'torch.os.system'"),
        (PROGRAM, with_node(target="torch.load"), "operation 'torch.load'"),
        (PROGRAM, with_node(target="torch.ops.aten.from_file.default"), "operation"),
        (PROGRAM, with_node(target="_operator.methodcaller"), "operation"),
        (PROGRAM, hostile(with_expression), "expression .* which is no arithmetic of sizes"),
        (PROGRAM, hostile(with_tree), "arguments of type 'collections.defaultdict'"),
        (WEIGHTS, hostile(with_pickle), "tensor 'loc' as a pickle, which could run code"),
        (PROGRAM, lambda content: b"[" * 10_000, "damaged"),
        (PROGRAM, lambda content: b"{}", "damaged"),
        (WEIGHTS, lambda content: b"null", "damaged"),
        ("extra/pyro_kd.json", lambda content: None, r"lacks extra/pyro_kd.json: it was not written by pyro_kd"),
    ],
)
def test_hostile_files_are_refused_and_run_nothing(written, tmp_path, monkeypatch, name, change, message):
    monkeypatch.chdir(tmp_path)
    target = changed(written[0], name, change, tmp_path / "hostile.pt2")
    with pytest.raises(CorruptExportError, match=message):
        load(target)
    assert not Path("exploded").exists()


def test_pickles_and_guards_in_a_file_are_left_unread(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = changed(written[0], "data/sample_inputs/model.pt", lambda _: pickle.dumps(Bomb()), tmp_path / "a.pt2")
    assert load(target)(FEED)["y"].equal(written[1])

    def guarded(program):
        program["guards_code"] = ["__import__('pathlib').Path('exploded').touch()"]
        return program

    target = changed(written[0], PROGRAM, hostile(guarded), tmp_path / "b.pt2")
    assert load(target)(FEED)["y"].equal(written[1])
    assert not Path("exploded").exists()


def test_a_file_of_a_newer_version_is_called_newer(written, tmp_path):
    """Whatever else a newer version has changed."""
    target = tmp_path / "newer.pt2"
    says = r"newer.pt2 was written by a newer pyro_kd: its format is 'pyro_kd export 2'.*pip install --upgrade pyro-kd"

    def newer(content):
        return content.replace(b'"pyro_kd export 1"', b'"pyro_kd export 2"').replace(b'"kind"', b'"sort"')

    changed(written[0], DESCRIPTION, newer, target)
    with pytest.raises(CorruptExportError, match=says):
        load(target)
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/extra/more.json", b"{}" * 1000)
    with pytest.raises(CorruptExportError, match=says):
        load(target)
    changed(written[0], DESCRIPTION, lambda content: content.replace(b"export 1", b"export 0"), target)
    with pytest.raises(CorruptExportError, match="its format is 'pyro_kd export 0', and this version reads"):
        load(target)


def test_compressed_and_repeated_parts_are_refused(written, tmp_path):
    target = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/models/model.json", b"0" * 1_000_000)
    with pytest.raises(CorruptExportError, match="compressed"):
        load(target)
    changed(written[0], "none", lambda content: content, target)
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(f"other/{PROGRAM}", b"{}")
    with pytest.raises(CorruptExportError, match="twice"):
        load(target)


def test_a_file_that_cannot_be_written_is_named(written, tmp_path):
    loaded = load(written[0])
    with pytest.raises(CheckpointError, match="could not be written"):
        loaded.save(tmp_path / "no folder" / "student.pt2")
