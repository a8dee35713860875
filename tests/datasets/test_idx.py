"""IDX files give the pixels, labels and characters that were written, EMNIST's images upright, and broken files are refused."""

import pytest
import torch

from pyro_kd.datasets import idx, load_images
from pyro_kd.errors import CorruptDataError, MissingDataError
from tests.support.data_files import idx_bytes, pixels, write_idx


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mark", ["-", "."])
def test_pixels_and_labels_are_those_written(packed, mark, tmp_path):
    train, test = pixels(6, 28, 27), pixels(3, 28, 27)[:, ::-1]
    write_idx(tmp_path, train, [3, 1, 4, 1, 5, 9], mark=mark, packed=packed)
    write_idx(tmp_path, test, [2, 6, 5], part="t10k", mark=mark, packed=packed)
    images = idx(tmp_path)
    assert images.images.shape == (6, 1, 28, 27)
    assert torch.equal(images.images[:, 0], torch.from_numpy(train))
    assert images.labels.tolist() == [3, 1, 4, 1, 5, 9]
    other = idx(tmp_path, train=False)
    assert torch.equal(other.images[:, 0], torch.from_numpy(test.copy()))
    assert other.labels.tolist() == [2, 6, 5]
    assert other.classes == images.classes == tuple("0123456789"), "one list of classes for both parts"
    images.images[0] = 0  # memory of its own


def test_an_unpacked_file_is_read_before_a_packed_one(tmp_path):
    write_idx(tmp_path, pixels(2, 4, 4), [0, 1], packed=True)
    write_idx(tmp_path, pixels(3, 4, 4), [1, 0, 1])
    assert len(idx(tmp_path)) == 3


def test_images_are_padded_in_the_middle(tmp_path):
    written = pixels(5, 28, 28)
    write_idx(tmp_path, written, [0, 1, 0, 1, 1])
    images = load_images("idx", tmp_path, size=32).images[:, 0]
    assert images.shape == (5, 32, 32)
    assert torch.equal(images[:, 2:30, 2:30], torch.from_numpy(written))
    assert int(images.sum()) == int(written.sum())
    assert idx(tmp_path, size=31).images[:, 0, 1:29, 1:29].equal(torch.from_numpy(written))
    with pytest.raises(ValueError, match="28 x 28 pixels, which is more than size=20"):
        idx(tmp_path, size=20)


def test_emnist_is_turned_upright_and_named_by_its_mapping(tmp_path):
    """Its files hold columns as rows; the labels of "letters" start at 1, and each has two characters."""
    upright = pixels(4, 28, 26)
    write_idx(tmp_path, upright.transpose(0, 2, 1), [3, 1, 2, 3], prefix="emnist-letters-")
    write_idx(tmp_path, upright.transpose(0, 2, 1), [1, 1, 2, 1], part="test", prefix="emnist-letters-")
    assert idx(tmp_path).classes == ("0", "1", "2", "3")
    (tmp_path / "emnist-letters-mapping.txt").write_text("1 65 97 \n2 66 98 \n3 67 99\n")
    images = idx(tmp_path)
    assert torch.equal(images.images[:, 0], torch.from_numpy(upright))
    assert images.labels.tolist() == [2, 0, 1, 2]
    assert images.classes == idx(tmp_path, train=False).classes == ("Aa", "Bb", "Cc")
    assert torch.equal(idx(tmp_path, transposed=False).images, images.images.transpose(2, 3))


def test_images_of_other_names_are_turned_on_request(tmp_path):
    written = pixels(2, 4, 5)
    write_idx(tmp_path, written, [0, 1])
    assert torch.equal(idx(tmp_path, transposed=True).images[:, 0], torch.from_numpy(written).transpose(1, 2))


def test_one_of_several_data_sets_is_chosen_by_its_prefix(tmp_path):
    write_idx(tmp_path, pixels(1, 4, 4), [0], prefix="emnist-digits-")
    write_idx(tmp_path, pixels(2, 4, 4), [0, 1], prefix="emnist-mnist-")
    write_idx(tmp_path, pixels(3, 4, 4), [0, 1, 1])
    assert [len(idx(tmp_path, prefix=prefix)) for prefix in ("emnist-digits", "emnist-mnist", "")] == [1, 2, 3]
    with pytest.raises(
        ValueError, match=r"several data sets: choose one with prefix=, one of '', 'emnist-digits', 'emnist-mnist'"
    ):
        idx(tmp_path)
    with pytest.raises(ValueError, match=r"no files with the prefix 'emnist-digit'. Did you mean 'emnist-digits'\?"):
        idx(tmp_path, prefix="emnist-digit")


def test_missing_files_say_what_to_fetch(tmp_path):
    with pytest.raises(MissingDataError, match=r"/train-images-idx3-ubyte is missing(.|\n)*KMNIST(.|\n)*ROOT/train-labels"):
        idx(tmp_path)
    write_idx(tmp_path, pixels(1, 4, 4), [0])
    with pytest.raises(MissingDataError, match=r"/t10k-images-idx3-ubyte is missing"):
        idx(tmp_path, train=False)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataError, match=r"/train-labels-idx1-ubyte is missing"):
        idx(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_the_error_names_a_truncated_file(packed, tmp_path):
    write_idx(tmp_path, pixels(3, 9, 9), [2, 0, 1], packed=packed)
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for length in range(0, len(whole), 3):
            path.write_bytes(whole[:length])
            with pytest.raises(CorruptDataError, match=path.name):
                idx(tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train-images-idx3-ubyte",
            idx_bytes(pixels(2, 4, 4)) + b"\x00",
            r"states the shape \(2, 4, 4\), 32 bytes, and holds 33",
        ),
        (
            "train-images-idx3-ubyte",
            idx_bytes(pixels(2, 16)),
            "in 3 dimension.* starts with 00 00 08 03 .* this one with 00 00 08 02",
        ),
        ("train-images-idx3-ubyte", b"\x00\x00\x0d\x03" + idx_bytes(pixels(2, 4, 4))[4:], "and this one with 00 00 0d 03"),
        ("train-images-idx3-ubyte", idx_bytes(pixels(0, 4, 4)), r"holds no image: its shape is \(0, 4, 4\)"),
        ("train-images-idx3-ubyte", b"", "this one with nothing"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03" + b"\xff" * 12, r"states the shape \(4294967295, "),
        ("train-labels-idx1-ubyte", idx_bytes(pixels(3)), "holds 3 labels, and train-images-idx3-ubyte 2 images"),
    ],
)
def test_files_with_different_contents_are_refused(name, content, message, tmp_path):
    write_idx(tmp_path, pixels(2, 4, 4), [0, 1])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptDataError, match=rf"{name}: .*{message}"):
        idx(tmp_path)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("0 48\n", "train-labels-idx1-ubyte: it has the label 1, which emnist-digits-mapping.txt does not name"),
        ("0 48\n0 49\n", "mapping.txt: each line must have a label and the code of its character, and none twice"),
        ("0 48\n1 48\n", "and none twice"),
        ("0 48\n1\n", "each line must have a label and the code"),
        ("0 48\n1 b\n", "mapping.txt cannot be read: invalid literal"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(mapping, message, tmp_path):
    write_idx(tmp_path, pixels(2, 4, 4), [0, 1], prefix="emnist-digits-")
    (tmp_path / "emnist-digits-mapping.txt").write_text(mapping)
    with pytest.raises(CorruptDataError, match=message):
        idx(tmp_path)
