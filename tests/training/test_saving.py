"""The student alone, as a file for use without pyro_kd."""

import sys
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file

from models.vae import VAE
from pyro_kd import Distiller, errors, freeze
from pyro_kd.training.saving import save_tensors
from tests.support.killed_training import Student
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fast_sgd, fit, point, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


def test_a_saved_student_is_plain_torch(tmp_path):
    student = VAE(6, 2, [3])
    distiller = Distiller(student.model, freeze(VAE(6, 2, [5]).model), adam, SurrogateKD(["x"]))
    with pytest.raises(errors.NoParametersError, match="before the first step"):
        distiller.save_student(tmp_path / "student.pt")
    distiller.step(5)
    distiller.save_student(tmp_path / "student.pt")
    other = VAE(6, 2, [3])
    other.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


def test_a_saved_student_without_a_module_is_plain_pyro(tmp_path):
    def student():
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), scale))

    distiller = Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"]))
    distiller.step()
    mu, scale = pyro.param("mu").item(), pyro.param("scale").item()
    distiller.save_student(tmp_path / "student.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "student.pt")
    student()
    assert (pyro.param("mu").item(), pyro.param("scale").item()) == pytest.approx((mu, scale))
    assert scale != 2.0


def test_a_saved_student_loses_nothing(tmp_path):
    from safetensors.torch import load_file

    student = Student(3)
    distiller = Distiller(student, freeze(Student(5)), adam, SurrogateKD(["y"]))
    pyro.clear_param_store()
    distiller.step(torch.randn(6, 2))
    with pytest.raises(errors.CheckpointError, match="'scale' of the student is not in its module.*student.safetensors"):
        distiller.save_student(tmp_path / "student.pt")
    distiller.save_student(tmp_path / "student.safetensors")
    saved = load_file(tmp_path / "student.safetensors")
    assert saved["scale"].exp().item() == pytest.approx(pyro.param("scale").item())
    assert len(saved) == len(list(student.parameters())) + len(list(student.buffers())) + 1


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


def test_a_student_written_by_several_threads_at_once_is_whole(tmp_path):
    distiller = fit()
    path = tmp_path / "student.safetensors"
    threads = [threading.Thread(target=save_tensors, args=(distiller._stepper.state, path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(load_file(path)["mu"], pyro.param("mu"))
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")
def test_saving_to_a_symbolic_link_replaces_its_target(tmp_path):
    (tmp_path / "real.pt").write_bytes(b"old")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    fit().save_student(tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "real.pt").read_bytes() != b"old"


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_file_of_tensors_is_not_named_as_a_program(tmp_path, suffix):
    def student():
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))

    distiller = Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"]))
    distiller.step()
    with pytest.raises(
        errors.CheckpointError, match=r"save_student writes tensors: name it \.pt or \.safetensors.*export_sampler"
    ):
        distiller.save_student(tmp_path / f"student{suffix}")
    assert not list(tmp_path.iterdir())
