"""ONNX files load as what was written or are refused with a typed error, and read no other files."""

import builtins
import random

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.errors import CorruptExportError, UnsupportedExportError
from pyro_kd.export import export_sampler, load_onnx
from pyro_kd.export.onnx_files import seal_of
from tests.support.damaged_exports import mutated

FEED = {"z/normal": torch.tensor([0.0, 1.0, 2.0]).numpy(), "y/normal": torch.zeros(3).numpy()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of a small program with a parameter, and what the program gives."""
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

    def model(num_rows):
        with pyro.plate("rows", num_rows):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.25)), 1.0))
            pyro.sample("y", dist.Normal(2 * z, 0.5))

    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    exported = export_sampler(model, 4, targets=["y"], path=path)
    return path, exported({name: torch.from_numpy(value) for name, value in FEED.items()})["y"].numpy()


def forged(path, change, target):
    """A copy in which something is different, with the right checksum."""
    import onnx

    proto = onnx.load_from_string(path.read_bytes())
    change(proto, onnx)
    content = proto.SerializeToString()
    target.write_bytes(content + seal_of(content))
    return target


def test_a_file_loads_as_what_was_written(written):
    path, expected = written
    loaded = load_onnx(path)
    assert (loaded(FEED)["y"] == expected).all()
    assert [item.name for item in loaded.description.noise] == ["z/normal", "y/normal"]
    one, two = loaded.sample(5, seed=0)["y"], loaded.sample(5, seed=0)["y"]
    assert one.shape == (5,)
    assert (one == two).all()
    with pytest.raises(UnsupportedExportError, match="the program takes 'z/normal', 'y/normal', and ONNX Runtime refuses"):
        loaded({"z/normal": FEED["z/normal"]})


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused(written, tmp_path, count):
    content, rng, broken = written[0].read_bytes(), random.Random(count), tmp_path / "broken.onnx"
    for _ in range(count):
        broken.write_bytes(mutated(content, rng))
        with pytest.raises(CorruptExportError, match="truncated or damaged"):
            load_onnx(broken)


@pytest.mark.slow
def test_files_that_are_damaged_and_sealed_again_are_refused_or_run(written, tmp_path):
    content, rng, broken = written[0].read_bytes()[: -len(seal_of(b""))], random.Random(1), tmp_path / "broken.onnx"
    refused = 0
    for _ in range(2000):
        data = mutated(content, rng)
        broken.write_bytes(data + seal_of(data))
        try:
            load_onnx(broken).sample(3, seed=0)
        except (CorruptExportError, UnsupportedExportError):
            refused += 1
    assert refused > 1000


def test_a_file_does_not_tell_where_it_was_made(written):
    assert b".py" not in written[0].read_bytes()


def read_elsewhere(proto, onnx):
    tensor = proto.graph.initializer.add()
    tensor.name, tensor.data_type, tensor.data_location = "secret", 1, onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def draw_anew(proto, onnx):
    proto.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["drawn"], shape=[3]))


def call_foreign(proto, onnx):
    proto.graph.node.append(onnx.helper.make_node("Run", [], ["out"], domain="com.example"))


def drop_description(proto, onnx):
    del proto.metadata_props[:]


def rename(proto, onnx):
    entry = next(entry for entry in proto.metadata_props if entry.key == "pyro_kd")
    entry.value = entry.value.replace("z/normal", "w/normal")


def come_from_a_newer_version(proto, onnx):
    entry = next(entry for entry in proto.metadata_props if entry.key == "pyro_kd")
    entry.value = entry.value.replace("pyro_kd export 1", "pyro_kd export 2").replace('"kind"', '"sort"')
    draw_anew(proto, onnx)


def need_newer_operations(proto, onnx):
    for item in proto.opset_import:
        item.version += 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            come_from_a_newer_version,
            "was written by a newer pyro_kd: its format is 'pyro_kd export 2'.*pip install --upgrade",
        ),
        (need_newer_operations, "cannot be read by onnx .* and onnxruntime .*pip install --upgrade onnx onnxruntime"),
        (read_elsewhere, "reads the tensor 'secret' from another file"),
        (draw_anew, "operation 'RandomNormal', which no export of pyro_kd has"),
        (call_foreign, "operation 'Run'"),
        (drop_description, "the description of the exported program is damaged, or was not written by pyro_kd"),
        (rename, "its description does not fit its program"),
    ],
)
def test_forged_files_are_refused(written, tmp_path, change, message):
    with pytest.raises(CorruptExportError, match=message):
        load_onnx(forged(written[0], change, tmp_path / "forged.onnx"))


def test_what_is_no_file_of_ours_is_refused(written, tmp_path):
    import onnx

    with pytest.raises(FileNotFoundError):
        load_onnx(tmp_path / "none.onnx")
    with pytest.raises(CorruptExportError, match="is not a file"):
        load_onnx(tmp_path)
    (tmp_path / "foreign.onnx").write_bytes(onnx.load_from_string(written[0].read_bytes()).SerializeToString()[:-20])
    with pytest.raises(CorruptExportError, match="its checksum is missing or wrong"):
        load_onnx(tmp_path / "foreign.onnx")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name in ("onnx", "onnxruntime"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"ONNX files need onnx, .* pip install 'pyro-kd\[export\]'"):
        load_onnx(tmp_path / "student.onnx")
