"""SVHN's .mat files give the pixels that were written, and 0 for the digit that they call 10."""

import sys

import numpy
import pytest
import torch

from pyro_kd.datasets import svhn
from pyro_kd.errors import CorruptDataError, MissingDataError

scipy_io = pytest.importorskip("scipy.io")


def content(n=6):
    generator = numpy.random.default_rng(0)
    labels = numpy.array([[1], [10], [9], [5], [10], [2]], numpy.uint8)[:n]
    return {"X": generator.integers(0, 256, (32, 32, 3, n), dtype=numpy.uint8), "y": labels}


@pytest.mark.parametrize("split", ["train", "test", "extra"])
@pytest.mark.parametrize("compressed", [True, False])
def test_pixels_are_those_written(split, compressed, tmp_path):
    written = content()
    scipy_io.savemat(tmp_path / f"{split}_32x32.mat", written, do_compression=compressed)
    images = svhn(tmp_path, split)
    assert images.images.shape == (6, 3, 32, 32)
    assert images.images[4, 2, 30, 7] == written["X"][30, 7, 2, 4]
    assert torch.equal(images.images.permute(2, 3, 1, 0), torch.from_numpy(written["X"]))
    assert images.labels.tolist() == [1, 0, 9, 5, 0, 2]
    assert images.classes == tuple("0123456789")
    assert images.images.is_contiguous()


def test_missing_file_says_what_to_fetch(tmp_path):
    with pytest.raises(
        MissingDataError, match=r"test_32x32.mat is missing(.|\n)*ufldl.stanford.edu(.|\n)*ROOT/test_32x32.mat"
    ):
        svhn(tmp_path, "test")
    with pytest.raises(ValueError, match="split must be"):
        svhn(tmp_path, "valid")


def test_without_scipy_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scipy"):
        svhn(tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_the_error_names_a_truncated_file(compressed, tmp_path):
    path = tmp_path / "train_32x32.mat"
    scipy_io.savemat(path, content(), do_compression=compressed)
    whole = path.read_bytes()
    for length in [*range(0, 400, 13), *range(400, len(whole) - 100, 1500)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptDataError, match=r"train_32x32.mat"):
            svhn(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": numpy.zeros((32, 32, 3, 6))}, "X must be uint8 .* and is float64"),
        ({"X": numpy.zeros((6, 3, 32, 32), "u1")}, r"and is uint8 of \(6, 3, 32, 32\)"),
        ({"y": numpy.ones((5, 1))}, "y must hold 6 numbers, and holds 5"),
        ({"y": numpy.full((6, 1), 11)}, "goes from 11 to 11"),
        ({"y": numpy.zeros((6, 1))}, "10 for 0, and goes from 0.0"),
        ({"y": numpy.array(["a"] * 6)}, "y must hold real numbers"),
        ({"y": numpy.ones((6, 1)) * 1j}, "y must hold real numbers"),
    ],
)
def test_files_with_different_contents_are_refused(change, message, tmp_path):
    scipy_io.savemat(tmp_path / "train_32x32.mat", content() | change)
    with pytest.raises(CorruptDataError, match=rf"train_32x32.mat: .*{message}"):
        svhn(tmp_path)


def test_a_different_mat_file_is_refused(tmp_path):
    scipy_io.savemat(tmp_path / "train_32x32.mat", {"digitStruct": numpy.ones(3)})
    with pytest.raises(CorruptDataError, match="no variable 'X'"):
        svhn(tmp_path)
