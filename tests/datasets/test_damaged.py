"""Damaged files are refused, or load as what was written; none takes the memory that a damaged number states."""

import io
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy
import pytest
import torch

from pyro_kd.datasets import Strokes, images_npz, stroke3, svhn
from pyro_kd.datasets.mat import check_mat
from pyro_kd.datasets.unpickling import unpickle_arrays
from pyro_kd.errors import CorruptDataError
from tests.support.damaged_files import FORMATS
from tests.support.package_files import ROOT


def test_files_damaged_at_random():
    """A process of its own, which a wrong tag in a .mat file could end."""
    command = [sys.executable, "-m", "tests.support.damaged_files", "150"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split(": {")[0] for line in lines] == list(FORMATS)
    assert all("'refused': 0" not in line for line in lines)


# .npz


def header(descr, shape):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_members(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


@pytest.mark.parametrize("written", ["(100,", "(901,", "(9000000000,", "(-900,"])
def test_images_whose_shape_does_not_fit_their_bytes_are_refused(written, tmp_path):
    """Without a change of the checksum, as in a file that was damaged, and with the right one, as in one that was written so."""
    path = tmp_path / "images.npz"
    content = header("|u1", (900, 8, 8)).replace(b"(900,", written.encode()) + bytes(900 * 64)
    write_members(path, train_images=content)
    with pytest.raises(CorruptDataError, match=r"images.npz: 'train_images' states"):
        images_npz(path)
    write_members(path, train_images=header("|u1", (900, 8, 8)) + bytes(900 * 64))
    path.write_bytes(path.read_bytes().replace(b"(900,", written.encode()))
    with pytest.raises(CorruptDataError, match=r"images.npz"):
        images_npz(path)


@pytest.mark.parametrize(
    ("compression", "position"),
    [(zipfile.ZIP_STORED, 0), (zipfile.ZIP_STORED, 300), (zipfile.ZIP_STORED, -1), (zipfile.ZIP_DEFLATED, 50)],
)
def test_a_changed_byte_anywhere_in_a_member_is_noticed(compression, position, tmp_path):
    """Also the last one, at whose end the checksum lies, and also in labels and names."""
    draw = numpy.random.default_rng(0).integers
    path = tmp_path / "images.npz"
    arrays = {
        "train_images": draw(0, 256, (50, 8, 8), dtype="u1"),
        "train_labels": draw(0, 5, 1000)[:50],
        "classes": numpy.array([f"{index} {'x' * 90}" for index in range(5)]),
    }
    for damaged in arrays:
        members = {}
        for name, array in arrays.items():
            stream = io.BytesIO()
            numpy.save(stream, array)
            members[name] = stream.getvalue()
        write_members(path, compression, **members)
        assert len(images_npz(path)) == 50
        whole = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{damaged}.npy")
            start = info.header_offset + 30 + len(info.filename)
            whole[start + position % info.compress_size] ^= 1
        path.write_bytes(whole)
        with pytest.raises(CorruptDataError, match=r"images.npz"):
            images_npz(path)


@pytest.mark.parametrize(
    "name", ["train_labls", "train_label", "labels", "trein_labels", "Classes", "classes_", "test_labels"]
)
def test_arrays_that_would_be_skipped_are_refused(name, tmp_path):
    """The images would come without their labels, or the labels without their names."""
    numpy.savez(tmp_path / "images.npz", train_images=numpy.zeros((2, 4, 4), "u1"), **{name: numpy.array([0, 1])})
    with pytest.raises(CorruptDataError, match=rf"images.npz: '{name}' in it is not understood"):
        images_npz(tmp_path / "images.npz")


def test_the_error_suggests_the_name_of_a_misspelt_array(tmp_path):
    numpy.savez(tmp_path / "images.npz", train_images=numpy.zeros((2, 4, 4), "u1"), train_labls=numpy.array([0, 1]))
    with pytest.raises(CorruptDataError, match="Did you mean 'train_labels'"):
        images_npz(tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_strokes": 0}, "'train_strokes' in it, and no 'train_lengths'"),
        ({"train_strokes": 0, "train_lenghts": 0}, "no 'train_lengths'. Did you mean 'train_lenghts'"),
        ({"train_strokes": 0, "train_lengths": 0, "valid_lengths": 0}, "'valid_lengths' in it, and no 'valid_strokes'"),
        ({"train_strokes": 0, "train_lengths": 0, "train": 0}, "'train' is in it twice"),
    ],
)
def test_drawings_with_incomplete_parts_are_refused(content, message, tmp_path):
    numpy.savez(tmp_path / "cat.npz", **content)
    with pytest.raises(CorruptDataError, match=rf"cat.npz: .*{message}"):
        stroke3(tmp_path / "cat.npz")


def test_two_arrays_of_the_same_name_are_refused(tmp_path):
    path, content = tmp_path / "images.npz", header("|u1", (2, 4, 4)) + bytes(32)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("train_images.npy", content)
        archive.writestr("train_images.npy", content)
    with pytest.raises(CorruptDataError, match=r"images.npz has more than one array 'train_images'"):
        images_npz(path)


def test_labels_far_above_the_number_of_images_are_refused(tmp_path):
    path, pixels = tmp_path / "images.npz", numpy.zeros((2, 8, 8), "u1")
    for largest in (10_000, 3_000_000, 2**62):
        numpy.savez(path, train_images=pixels, train_labels=numpy.array([0, largest]))
        with pytest.raises(
            CorruptDataError, match=rf"2 labels go up to {largest}. Where that is right, add the array 'classes'"
        ):
            images_npz(path)
    numpy.savez(path, train_images=pixels, train_labels=numpy.array([0, 2**64 - 1], "u8"), classes=["cat", "dog"])
    with pytest.raises(CorruptDataError, match="labels must lie in 0 to 1"):
        images_npz(path)
    numpy.savez(path, train_images=pixels, train_labels=numpy.array([0, 999]))  # of a thousand classes, two images
    assert len(images_npz(path).classes) == 1000


def test_strings_without_bytes_are_refused(tmp_path):
    members = {"train_images": header("|u1", (2, 4, 4)) + bytes(32), "train_labels": header("|u1", (2,)) + bytes(2)}
    write_members(tmp_path / "images.npz", **members, classes=header("|S0", (10**12,)))
    with pytest.raises(CorruptDataError, match="'classes' states"):
        images_npz(tmp_path / "images.npz")


def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path):
    """The directory of the archive states a terabyte, and so does the array."""
    path, small = tmp_path / "images.npz", header("|u1", (2**40, 1, 1))
    write_members(path, train_images=small)
    whole = path.read_bytes()
    place = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: place + 24] + struct.pack("<I", 2**32 - 2) + whole[place + 28 :])
    with pytest.raises(CorruptDataError, match=r"images.npz: 'train_images' states 4294967294 bytes"):
        images_npz(path)


def test_lengths_whose_sum_overflows_are_refused(tmp_path):
    """Four times 2**62 is 0 in 64 bits."""
    points = numpy.zeros((3, 3), "f4")
    for lengths in ([2**62, 2**62, 2**62, 2**62 + 3], [2**62 + 1, 2**62 + 1, 2**62 + 1, 2**62]):
        numpy.savez(tmp_path / "cat.npz", train_strokes=points, train_lengths=lengths)
        with pytest.raises(CorruptDataError, match="4 drawings of up to 46116860184273879.. points have 3 points"):
            stroke3(tmp_path / "cat.npz")
    numpy.savez(tmp_path / "cat.npz", train_strokes=points, train_lengths=numpy.array([2**64 - 1, 4], "u8"))
    with pytest.raises(CorruptDataError, match="a drawing has -1 points"):
        stroke3(tmp_path / "cat.npz")
    with pytest.raises(ValueError, match="4 drawings of up to 1 points"):
        Strokes(torch.zeros(3, 3), torch.ones(4, dtype=torch.int64))


# Pickles


def test_a_damaged_number_in_a_pickle_allocates_nothing():
    """The place in its memo is damaged: 2 billion, for which the unpickler in C would take 34 GB."""
    pickled = b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b"."
    assert unpickle_arrays(io.BytesIO(pickled)) == []


def test_nothing_may_follow_a_pickle():
    with pytest.raises(pickle.UnpicklingError, match="something follows"):
        unpickle_arrays(io.BytesIO(pickle.dumps([1], 2) + b"\x00"))


# .mat

scipy_io = pytest.importorskip("scipy.io")
_INT32, _DOUBLE, _MATRIX = 5, 9, 14


def mat(*variables):
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + b"".join(variables)


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def variable(name=b"X", flags=9, shape=(2, 3), kind=2, content=bytes(6), after=b""):
    dimensions = element(_INT32, struct.pack(f"<{len(shape)}i", *shape))
    inside = element(6, struct.pack("<II", flags, 0)) + dimensions + element(1, name) + element(kind, content) + after
    return element(_MATRIX, inside)


def test_a_valid_mat_file_is_accepted(tmp_path):
    check_mat(mat(variable(), variable(b"y"), variable(b"other", flags=4, kind=77)), ("X", "y"))
    for compressed in (True, False):
        path = tmp_path / "sound.mat"
        scipy_io.savemat(path, {"X": numpy.eye(3), "y": 1, "s": "text", "c": {"a": [1]}}, do_compression=compressed)
        check_mat(path.read_bytes(), ("X", "y"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mat(variable(kind=77)), r"X states the shape \(2, 3\), and holds 6 bytes of type 77"),
        (mat(variable(kind=_DOUBLE)), "holds 6 bytes of type 9"),
        (mat(variable(shape=(2, 4))), r"the shape \(2, 4\), and holds 6"),
        (mat(variable(shape=(2**16,) * 4)), "and holds 6"),
        (mat(variable(shape=(-2, -3))), r"its shape \(-2, -3\)"),
        (mat(variable(shape=(6,))), "dimensions are 4 bytes"),
        (mat(variable(shape=(1,) * 33)), "dimensions are 132 bytes"),
        (mat(variable(flags=4)), "must hold real numbers, and is of class 4"),
        (mat(variable(flags=9 | 0x0800)), "must hold real numbers"),
        (mat(variable(after=element(2, bytes(6)))), "holds 6 bytes"),
        (mat(variable(), variable()), "the variable 'X' twice"),
        (mat(element(3, bytes(8))), "an element of type 3"),
        (mat(element(15, b"no zlib")), "incorrect header"),
        (mat(variable())[:-9], "states 64 bytes, and 55 are left"),
        (mat(variable()) + bytes(3), "ends within a tag"),
        (bytes(4) + mat(variable())[4:], "no MAT-file of version 5"),
        (mat(variable()).replace(b"\x00\x01IM", b"\x00\x02IM"), "no MAT-file of version 5"),
    ],
)
def test_invalid_tags_are_refused(content, message, tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(content)
    with pytest.raises(CorruptDataError, match=rf"train_32x32.mat.*{message}"):
        svhn(tmp_path)
