"""ONNX files: the same values in ONNX Runtime, and samples with NumPy and ONNX Runtime alone."""

import builtins
import json
import re
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from models.vae import VAE
from pyro_kd.export import export_sampler, load_onnx
from tests.support.package_files import ROOT

PAGE = ROOT / "docs" / "export.md"


def program_of_the_page():
    return re.search(r"<!-- program -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[1]


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    return export_sampler(VAE(12, 3, [8]).model, 6, targets=["x"], latents=["z"])


@pytest.fixture(scope="module")
def written(sampler, tmp_path_factory):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    return path, sampler.save(path)


def test_the_program_of_the_page_is_short_and_needs_no_torch():
    code = program_of_the_page()
    assert len([line for line in code.split("\n") if line.strip()]) <= 32
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) == {"json", "sys", "numpy", "onnxruntime"}


def test_an_onnx_file_does_not_tell_where_and_from_what_code_it_was_written(written):
    content = written[0].read_bytes()
    for text in ("vae.py", "torch/", "stack_trace", str(ROOT)):
        assert text.encode() not in content


def test_onnx_runtime_gives_the_values_of_the_program(sampler, written):
    import onnxruntime

    path, report = written
    assert report.largest_difference <= 1e-5
    assert report.start_seconds < 1
    assert report.size == path.stat().st_size
    session = onnxruntime.InferenceSession(path.read_bytes())
    assert [found.name for found in session.get_inputs()] == ["z/normal", "x/uniform"]
    assert [found.shape[0] for found in session.get_inputs()] == ["rows", "rows"]
    for rows in (1, 17):
        noise = {"z/normal": torch.randn(rows, 3), "x/uniform": torch.rand(rows, 12).double()}
        found = session.run(None, {name: value.numpy() for name, value in noise.items()})
        for name, value in zip(["x", "z"], found, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), sampler(noise)[name], rtol=0, atol=1e-5)


def test_no_random_operation_is_in_the_file(written):
    import onnx

    kinds = {node.op_type for node in onnx.load(written[0]).graph.node}
    assert not {kind for kind in kinds if kind.startswith(("Random", "Multinomial", "Bernoulli"))}


def test_numpy_and_onnx_runtime_alone_draw_from_it(written, tmp_path):
    script = tmp_path / "sample.py"
    script.write_text(program_of_the_page() + "\nassert 'torch' not in sys.modules\n")
    run = subprocess.run([sys.executable, script, written[0], "500"], capture_output=True, text=True, check=True)
    assert re.findall(r"^(\w+) \((\d+), (\d+)\)", run.stdout, re.M) == [("x", "500", "12"), ("z", "500", "3")]


def test_the_description_is_in_the_metadata(sampler, written):
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(written[0]).metadata_props}
    assert json.loads(metadata["pyro_kd"]) == json.loads(sampler.description.to_json())


def test_inputs_with_the_name_of_an_output_are_told_apart(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

    def model(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(2 * y, 1.0))

    exported = export_sampler(model, torch.zeros(4), targets=["y"])
    assert [item.name for item in exported.description.inputs] == ["y"]
    assert exported.save(tmp_path / "student.onnx").largest_difference <= 1e-5


def test_a_missing_extra_is_named(sampler, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "onnx":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"ONNX files need onnx, which is not installed: pip install 'pyro-kd\[export\]'"
    ):
        sampler.save(tmp_path / "student.onnx")
    assert not (tmp_path / "student.onnx").exists()


@pytest.mark.parametrize("family", [dist.Normal(0.5, 2.0), dist.Bernoulli(0.3)])
def test_sites_without_dimensions_keep_their_shape(tmp_path, family):
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    exported = export_sampler(lambda: pyro.sample("x", family), targets=["x"])
    assert exported.save(tmp_path / "student.onnx").largest_difference <= 1e-6
    assert load_onnx(tmp_path / "student.onnx").sample(seed=0)["x"].shape == ()
