"""CIFAR-10's batches give the pixels that were written, whichever Python wrote them, and a hostile pickle runs nothing."""

import io
import os
import pickle
import struct

import numpy
import pytest
import torch

from pyro_kd.datasets import cifar10
from pyro_kd.datasets.unpickling import unpickle_arrays
from pyro_kd.errors import CorruptDataError, MissingDataError, PyroKDError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def rows(seed, n=4):
    generator = numpy.random.default_rng(seed)
    return generator.integers(0, 256, (n, 3072), dtype=numpy.uint8), generator.integers(0, 10, n).tolist()


def python2_string(value):
    """The opcodes of a Python 2 ``str``."""
    return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value


def python2_batch(data, labels):
    """A batch as Python 2 and NumPy 1 wrote it, protocol 2, opcode by opcode."""
    dtype = b"cnumpy\ndtype\n" + python2_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + python2_string(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + python2_string(b"b") + b"\x87R"
    array += b"(K\x01K" + bytes([data.shape[0]]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86" + dtype
    array += b"\x89" + python2_string(data.tobytes()) + b"tb"
    items = python2_string(b"batch_label") + python2_string(b"a batch") + python2_string(b"labels")
    items += b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e" + python2_string(b"data") + array
    return b"\x80\x02}(" + items + b"u."


def python3_batch(data, labels, protocol=2):
    return pickle.dumps({b"batch_label": b"a batch", b"data": data, b"labels": labels, b"filenames": [b""]}, protocol)


WRITERS = {
    "Python 2": python2_batch,
    "Python 3, protocol 2": python3_batch,
    "Python 3, protocol 4": lambda data, labels: python3_batch(data, labels, 4),
    "Fortran order": lambda data, labels: python3_batch(numpy.asfortranarray(data), labels),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        (folder / name).write_bytes(python2_batch(*rows(seed)))
    meta = {b"num_cases_per_batch": 10000, b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, 2))
    return folder


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_pixels_are_those_written(folder, write):
    data, labels = rows(7)
    (folder / "test_batch").write_bytes(write(data, labels))
    images = cifar10(folder.parent, train=False)
    assert images.images.shape == (4, 3, 32, 32)
    assert torch.equal(images.images.flatten(1), torch.from_numpy(data))
    assert images.images[1, 2, 3, 4] == data[1, 2 * 1024 + 3 * 32 + 4]
    assert images.labels.tolist() == labels
    assert images.classes == tuple(CLASSES)
    images.images[0] = 0  # memory of its own


def test_numpy_reads_the_same_from_the_python_2_batch():
    """The opcodes above are what NumPy itself takes them for."""
    data, labels = rows(1)
    content = pickle.loads(python2_batch(data, labels), encoding="bytes")
    assert numpy.array_equal(content[b"data"], data)
    assert content[b"labels"] == labels


def test_train_is_the_five_batches_in_order(folder):
    images = cifar10(folder)
    assert torch.equal(images.images.flatten(1), torch.from_numpy(numpy.concatenate([rows(i)[0] for i in range(1, 6)])))
    assert images.labels.tolist() == [label for i in range(1, 6) for label in rows(i)[1]]


def test_missing_files_say_what_to_fetch(folder):
    (folder / "data_batch_3").unlink()
    with pytest.raises(MissingDataError, match=r"data_batch_3 is missing(.|\n)*cs.toronto.edu/~kriz/cifar.html"):
        cifar10(folder.parent)
    with pytest.raises(FileNotFoundError, match=r"ROOT/cifar-10-batches-py/batches.meta"):
        cifar10(folder.parent / "nothing")
    assert len(cifar10(folder.parent, train=False)) == 4


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_hostile_batch_runs_nothing(folder, tmp_path):
    marker = tmp_path / "marker"
    data, labels = rows(0)
    for call in (
        Hostile(os.system, f"touch {marker}"),
        Hostile(open, str(marker), "w"),
        Hostile(eval, f"open({str(marker)!r}, 'w')"),
    ):
        for content in (call, {b"data": data, b"labels": labels, b"more": call}, [call], {b"data": call, b"labels": labels}):
            for protocol in range(6):
                (folder / "test_batch").write_bytes(pickle.dumps(content, protocol))
                with pytest.raises(CorruptDataError, match="test_batch cannot be read: it calls .*only arrays") as caught:
                    cifar10(folder, train=False)
                assert isinstance(caught.value, PyroKDError)
                assert not marker.exists()
    (folder / "test_batch").write_bytes(python2_batch(data, labels))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": Hostile(os.system, f"touch {marker}")}))
    with pytest.raises(CorruptDataError, match=r"batches.meta cannot be read"):
        cifar10(folder, train=False)
    assert not marker.exists()


HOSTILE_PICKLES = {
    "global state": b"cnumpy\ndtype\n}U\x01aK\x01sb.",
    "slot state": b"cnumpy\ndtype\nN}U\x05_callK\x01s\x86b.",
    "call of the array class": b"cnumpy\nndarray\nK\x05\x85R.",
    "attribute of a name": b"cnumpy\ndtype.newbyteorder\n.",
    "dunder": b"\x80\x04\x8c\x05numpy\x8c\x0e__builtins__.x\x93.",
    "many bytes": b"c__builtin__\nbytes\nJ\x00\x00\x00\x7f\x85R.",
    "zip codec": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
    "new object": b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.",
    "instance": b"(K\x05inumpy\nndarray\n.",
    "array without data": b"cnumpy.core.multiarray\n_reconstruct\n)R.",
    "persistent id": b"Pabc\n.",
    "extension": b"\x82\x01.",
    "a name alone": b"cnumpy\nndarray\n.",
    "endless list": b"](h\x00q\x00h\x00e.",
    "list within itself": b"]q\x00h\x00a.",
    "set": b"\x80\x04\x8f.",
    "empty": b"",
}


@pytest.mark.parametrize("content", HOSTILE_PICKLES.values(), ids=HOSTILE_PICKLES)
def test_hostile_pickles_raise_an_unpickling_error(content):
    with pytest.raises(pickle.UnpicklingError):
        unpickle_arrays(io.BytesIO(content))
    assert numpy.array_equal(unpickle_arrays(io.BytesIO(pickle.dumps(numpy.arange(3)))), [0, 1, 2])


def test_what_is_shared_is_read_once():
    """Lists of one and the same list, fifty deep, would be 2 ** 50 long if each were copied."""
    value = [numpy.arange(3)]
    for _ in range(50):
        value = [value, value]
    found = unpickle_arrays(io.BytesIO(pickle.dumps(value)))
    assert found[0] is found[1]


@pytest.mark.parametrize(
    "value", [numpy.zeros(2, "i4,f8"), numpy.zeros(2, "S3"), numpy.zeros(2, "M8[s]"), numpy.zeros(2, "c16")]
)
def test_data_types_that_are_not_plain_numbers_are_refused(value):
    with pytest.raises(pickle.UnpicklingError):
        unpickle_arrays(io.BytesIO(pickle.dumps(value, 4)))


@pytest.mark.parametrize("dtype", ["?", "u1", "<i2", ">i2", "<i8", ">f4", "f8", "f2"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_arrays_are_those_written(dtype, protocol):
    array = numpy.arange(24).reshape(2, 3, 4).astype(dtype)
    for value in (array, array.T, array[:0], array[0, 0, 0:1].reshape(())):
        found = unpickle_arrays(io.BytesIO(pickle.dumps(value, protocol)))
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert numpy.array_equal(found, value)


def test_the_error_names_a_truncated_batch(folder):
    whole = (folder / "test_batch").read_bytes()
    for length in [*range(0, 400, 7), len(whole) // 2, len(whole) - 1]:
        (folder / "test_batch").write_bytes(whole[:length])
        with pytest.raises(CorruptDataError, match="test_batch"):
            cifar10(folder, train=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no entry 'data'"),
        ({b"data": rows(0)[0]}, "no entry 'labels'"),
        ({b"data": rows(0)[0], b"labels": [1, 2]}, r"of shape \(2, 3072\).* and is uint8 of shape \(4, 3072\)"),
        ({b"data": rows(0)[0].astype("f4"), b"labels": [0] * 4}, "and is float32"),
        ({b"data": [1, 2], b"labels": [0, 0]}, "is a list"),
        ({b"data": rows(0)[0], b"labels": [0, 1, 2, 10]}, "labels must lie in 0 to 9, and go from 0 to 10"),
        ({b"data": rows(0)[0], b"labels": [0, 1, 2, -1]}, "go from -1 to 2"),
        ({b"data": rows(0)[0], b"labels": [0, 1, 2, "3"]}, "a list of integers"),
        ({b"data": rows(0)[0][:0], b"labels": []}, "not empty"),
    ],
)
def test_files_with_different_contents_are_refused(folder, content, message):
    (folder / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(CorruptDataError, match=rf"test_batch.*{message}"):
        cifar10(folder, train=False)
