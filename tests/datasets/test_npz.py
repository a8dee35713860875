"""Drawings and images from .npz files: the written values, and no pickle that runs code."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from pyro_kd.datasets import images_npz, stroke3
from pyro_kd.errors import CorruptDataError, MissingDataError
from tests.support.data_files import drawings, pixels, write_end_to_end

SHARED = Path(__file__).parents[3] / "shared" / "data"


def objects(arrays):
    found = numpy.empty(len(arrays), dtype=object)
    found[:] = arrays
    return found


def write_sketch_rnn(path, split, arrays):
    numpy.savez_compressed(path, **{split: objects(arrays), "other": objects(arrays[:1])})


def write_sketch_rnn_protocol_2(path, split, arrays):
    """With the module's name of NumPy 1 and the pickle protocol of Python 2."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (%d,), }" % len(arrays)
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    content = pickle.dumps(objects(arrays), 2).replace(b"numpy._core.", b"numpy.core.")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{split}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)


@pytest.mark.parametrize("write", [write_end_to_end, write_sketch_rnn, write_sketch_rnn_protocol_2])
@pytest.mark.parametrize("dtype", [numpy.int16, numpy.float32, numpy.float64])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_drawings_are_those_written(write, dtype, split, tmp_path):
    arrays = drawings(dtype=dtype)
    write(tmp_path / "cat.npz", split, arrays)
    strokes = stroke3(tmp_path / "cat.npz", split)
    assert len(strokes) == 5
    for i, array in enumerate(arrays):
        assert torch.equal(strokes[i], torch.from_numpy(array).float())


def test_numpy_reads_the_same_from_the_protocol_2_file(tmp_path):
    arrays = drawings()
    write_sketch_rnn_protocol_2(tmp_path / "cat.npz", "test", arrays)
    found = numpy.load(tmp_path / "cat.npz", allow_pickle=True)["test"]
    assert all(numpy.array_equal(one, other) for one, other in zip(found, arrays, strict=True))


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_hostile_files_run_nothing(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "cat.npz"
    for content in (
        {"train": objects([*drawings(), Hostile(marker)])},
        {"train_strokes": objects([Hostile(marker)]), "train_lengths": [1]},
        {"train_strokes": drawings()[0], "train_lengths": objects([Hostile(marker)])},
        {"train_images": objects([Hostile(marker)])},
        {"train_images": numpy.zeros((2, 2, 2), "u1"), "train_labels": objects([Hostile(marker)] * 2)},
        {"train_images": numpy.zeros((1, 2, 2), "u1"), "train_labels": [0], "classes": objects([Hostile(marker)])},
    ):
        numpy.savez(path, **content)
        load = images_npz if "train_images" in content else stroke3
        with pytest.raises(CorruptDataError, match=r"cat.npz cannot be read"):
            load(path)
        assert not marker.exists()


@pytest.mark.parametrize("load", [stroke3, images_npz])
def test_missing_and_foreign_files_are_refused(load, tmp_path):
    with pytest.raises(MissingDataError, match=r"cat.npz is missing(.|\n)*ROOT, which is the"):
        load(tmp_path / "cat.npz")
    for content in (b"", b"PK", b"\x93NUMPY\x01\x00", pickle.dumps([1])):
        (tmp_path / "cat.npz").write_bytes(content)
        with pytest.raises(CorruptDataError, match=r"cat.npz cannot be read"):
            load(tmp_path / "cat.npz")
    numpy.savez(tmp_path / "cat.npz", something=numpy.zeros(3))
    with pytest.raises(CorruptDataError, match=r"cat.npz: there is n.* 'train_.*'something'"):
        load(tmp_path / "cat.npz")
    with pytest.raises(CorruptDataError):
        load(tmp_path)


@pytest.mark.parametrize("write", [write_end_to_end, write_sketch_rnn])
def test_the_error_names_a_file_with_truncated_drawings(write, tmp_path):
    path = tmp_path / "cat.npz"
    write(path, "train", drawings())
    whole = path.read_bytes()
    for length in range(0, len(whole), 31):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptDataError, match=r"cat.npz"):
            stroke3(path)


@pytest.mark.parametrize("write", [write_end_to_end, write_sketch_rnn, write_sketch_rnn_protocol_2])
def test_damaged_drawings_are_read_as_written_or_named(write, tmp_path):
    """One byte changed anywhere in the file."""
    path, arrays = tmp_path / "cat.npz", drawings()
    write(path, "train", arrays)
    whole, expected, messages = path.read_bytes(), numpy.concatenate(arrays), []
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            assert numpy.array_equal(stroke3(path).points, expected)  # a byte of no consequence, such as a date
        except CorruptDataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("cat.npz" in message for message in messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_strokes": numpy.zeros((3, 3)), "train_lengths": [2]}, "the lengths sum to 2, and there are 3"),
        ({"train_strokes": numpy.zeros((3, 3)), "train_lengths": [3, 0]}, "a drawing has 0 points"),
        (
            {"train_strokes": numpy.zeros((3, 2)), "train_lengths": [3]},
            r"of shape \(points, 3\), and is float64 of shape \(3, 2\)",
        ),
        ({"train_strokes": numpy.zeros((3, 3), "U1"), "train_lengths": [3]}, "must be numbers"),
        ({"train_strokes": numpy.zeros((3, 3)), "train_lengths": [3.0]}, "must hold integers"),
        ({"train_strokes": numpy.zeros((3, 3)), "train_lengths": [[3]]}, r"lengths must be int64 of shape \(n,\)"),
        ({"train_strokes": numpy.zeros((0, 3)), "train_lengths": numpy.zeros(0, int)}, "holds no drawing"),
        ({"train_strokes": numpy.full((3, 3), 2.0), "train_lengths": [3]}, "must be 0 or 1"),
        ({"train_strokes": numpy.full((3, 3), numpy.nan), "train_lengths": [3]}, "NaN"),
        ({"train_strokes": numpy.zeros((3, 3))}, "train_lengths"),
        ({"train": numpy.zeros((3, 3))}, "single array of float64"),
        ({"train": objects([])}, "holds no drawing"),
        ({"train": objects([[1, 2, 3]])}, "a drawing of 'train' must be numbers"),
        ({"train": objects([numpy.zeros((2, 2))])}, "a drawing of 'train' must be"),
        ({"train": objects([numpy.zeros((0, 3))])}, "a drawing has 0 points"),
    ],
)
def test_files_with_different_drawings_are_refused(content, message, tmp_path):
    numpy.savez(tmp_path / "cat.npz", **content)
    with pytest.raises(CorruptDataError, match=rf"cat.npz.*{message}"):
        stroke3(tmp_path / "cat.npz")


def test_images_are_those_written(tmp_path):
    path = tmp_path / "images.npz"
    colour, grey, names = pixels(4, 2, 5, 3), pixels(3, 2, 5), ["cat", "dog", "owl"]
    labels = numpy.array([0, 2, 1, 0], numpy.uint8)
    numpy.savez(path, train_images=colour, train_labels=labels, test_images=grey, classes=names)
    images = images_npz(path)
    assert images.images.shape == (4, 3, 2, 5)
    assert images.images[3, 2, 1, 4] == colour[3, 1, 4, 2]
    assert torch.equal(images.images.permute(0, 2, 3, 1), torch.from_numpy(colour))
    assert images.labels.tolist() == [0, 2, 1, 0]
    assert images.classes == ("cat", "dog", "owl")
    test = images_npz(path, "test")
    assert torch.equal(test.images[:, 0], torch.from_numpy(grey))
    assert (test.labels.tolist(), test.classes) == ([0, 0, 0], ("unlabelled",))


def test_images_may_lack_names_or_have_attributes(tmp_path):
    path = tmp_path / "images.npz"
    numpy.savez(path, train_images=pixels(3, 2, 2, 1), train_labels=[0, 3, 1])
    assert images_npz(path).classes == ("0", "1", "2", "3")
    numpy.savez(path, train_images=pixels(3, 2, 2), train_labels=numpy.eye(3, 2, dtype=bool), classes=["a", "b"])
    assert images_npz(path).labels.tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_images": numpy.zeros((2, 3, 3, 3))}, "must be uint8 .* and is float64"),
        ({"train_images": pixels(2, 3, 3, 4)}, r"and is uint8 of shape \(2, 3, 3, 4\)"),
        ({"train_images": pixels(2, 3)}, r"of shape \(2, 3\)"),
        ({"train_images": pixels(0, 3, 3)}, "is empty"),
        ({"train_images": pixels(2, 3, 3), "train_labels": [0]}, r"labels must be int64 of shape \(2,\)"),
        ({"train_images": pixels(2, 3, 3), "train_labels": [0.0, 1.0]}, "must hold integers"),
        ({"train_images": pixels(2, 3, 3), "train_labels": [0, -1]}, "go from -1 to 0"),
        ({"train_images": pixels(2, 3, 3), "train_labels": [0, 2], "classes": ["a", "b"]}, "labels must lie in 0 to 1"),
        ({"train_images": pixels(2, 3, 3), "train_labels": [0, 2], "classes": [1, 2, 3]}, "classes must be strings"),
        (
            {"train_images": pixels(2, 3, 3), "train_labels": [[0, 1, 0]] * 2, "classes": ["a"]},
            "3 columns of attributes and 1",
        ),
    ],
)
def test_files_with_different_images_are_refused(content, message, tmp_path):
    numpy.savez(tmp_path / "images.npz", **content)
    with pytest.raises(CorruptDataError, match=rf"images.npz.*{message}"):
        images_npz(tmp_path / "images.npz")


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
@pytest.mark.parametrize("lost", ["train_images", "train_labels", "classes"])
def test_an_array_that_the_directory_does_not_list_is_noticed(save, lost, tmp_path):
    """Damage in one entry of a ZIP archive's directory takes the next one for a comment: images would silently be unlabelled."""
    arrays = {
        "train_images": numpy.zeros((3, 4, 4), numpy.uint8),
        "train_labels": numpy.arange(3),
        "classes": numpy.array(list("abc")),
    }
    path = tmp_path / "images.npz"
    save(path, **{"test_images": arrays["train_images"]}, **arrays)
    assert images_npz(path).labels.tolist() == [0, 1, 2]
    names = ["test_images", *arrays]
    content = bytearray(path.read_bytes())
    entries = [index for index in range(len(content)) if content[index : index + 4] == b"PK\1\2"]
    before, swallowed = entries[names.index(lost) - 1], entries[names.index(lost)]
    after = [*entries, content.index(b"PK\5\6")][names.index(lost) + 1]
    content[before + 32 : before + 34] = (after - swallowed).to_bytes(2, "little")  # the length of its comment
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert f"{lost}.npy" not in archive.namelist()
    with pytest.raises(CorruptDataError, match=r"images\.npz: its directory lists nothing"):
        images_npz(path)


def test_a_file_of_human_drawings():
    path = SHARED / "omniglot_strokes.npz"
    if not path.exists():
        pytest.skip("needs the file omniglot_strokes.npz next to the repository, in shared/data")
    strokes = stroke3(path, "valid")
    assert len(strokes) == 1000
    last = strokes.lengths.cumsum(0) - 1
    assert (strokes.points[last, 2] == 1).all()


def test_a_file_of_photographs():
    path = SHARED / "cifar10_subset.npz"
    if not path.exists():
        pytest.skip("needs the file cifar10_subset.npz next to the repository, in shared/data")
    images = images_npz(path, "test")
    assert images.images.shape == (2000, 3, 32, 32)
    assert len(images.classes) == 10
    assert 0.4 < images.floats().mean() < 0.55
