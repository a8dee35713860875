"""CelebA's files give the centre of each picture at the requested size, with its own attributes."""

import sys

import numpy
import pytest
import torch

from pyro_kd.datasets import celeba
from pyro_kd.errors import CorruptDataError, MissingDataError

Image = pytest.importorskip("PIL.Image")
NAMES = [f"{number:06d}.jpg" for number in range(1, 7)]
ATTRIBUTES = [f"Attribute_{index}" for index in range(40)]
PARTS = [0, 0, 0, 1, 2, 2]


def attributes():
    return numpy.random.default_rng(0).integers(0, 2, (6, 40))


def picture(index):
    """A colour of its own in the square of 148 pixels at the centre, its upper half darker, and white around it."""
    pixels = numpy.full((218, 178, 3), 255, numpy.uint8)
    pixels[35:183, 15:163] = (40 * index, 100, 200 - 30 * index)
    pixels[35:109, 15:163] //= 2
    return pixels


@pytest.fixture
def root(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    for index, name in enumerate(NAMES):
        Image.fromarray(picture(index)).save(tmp_path / "img_align_celeba" / name, quality=100, subsampling=0)
    rows = [f"{name}  {'  '.join(str(2 * int(v) - 1) for v in row)}" for name, row in zip(NAMES, attributes(), strict=True)]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join(["6", " ".join(ATTRIBUTES) + " ", *rows]) + "\n")
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(NAMES, PARTS, strict=True)))
    return tmp_path


@pytest.mark.parametrize(
    ("split", "indices"), [("train", [0, 1, 2]), ("valid", [3]), ("test", [4, 5]), ("all", [0, 1, 2, 3, 4, 5])]
)
@pytest.mark.parametrize("size", [32, 64])
def test_pixels_and_attributes_are_those_written(root, split, indices, size):
    faces = celeba(root, split, size=size)
    assert faces.images.shape == (len(indices), 3, size, size)
    assert faces.classes == tuple(ATTRIBUTES)
    assert torch.equal(faces.labels, torch.from_numpy(attributes()[indices]))
    for face, index in zip(faces.images, indices, strict=True):
        written = picture(index)
        for half, row in ((slice(2, size // 2 - 2), 60), (slice(size // 2 + 2, size - 2), 160)):
            expected = torch.from_numpy(written[row, 89].astype(int))[:, None, None]
            assert (face[:, half, 2:-2].int() - expected).abs().max() <= 3  # of the JPEG


def test_uncropped_width_shows_the_margin(root):
    face = celeba(root, size=178, crop=178, limit=1).images[0]
    written = torch.from_numpy(picture(0)[20:198]).permute(2, 0, 1)
    assert (face.int() - written.int()).abs().float().mean() < 3
    assert face[:, 5, 5].min() > 250


def test_the_limit_applies_to_the_split(root):
    assert torch.equal(celeba(root, "test", limit=1).images, celeba(root, "test").images[:1])
    assert len(celeba(root, limit=100)) == 3


@pytest.mark.parametrize("name", ["img_align_celeba/000002.jpg", "list_attr_celeba.txt", "list_eval_partition.txt"])
def test_missing_files_say_what_to_fetch(root, name):
    (root / name).unlink()
    with pytest.raises(MissingDataError, match=rf"{name} is missing(.|\n)*mmlab.ie.cuhk.edu.hk(.|\n)*ROOT/img_align_celeba"):
        celeba(root)
    with pytest.raises(MissingDataError, match="is missing"):
        celeba(root / "nothing")


def test_invalid_options_are_refused(root):
    with pytest.raises(ValueError, match="split must be one of 'train'"):
        celeba(root, "holdout")
    for options in ({"crop": 179}, {"crop": 0}, {"size": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match="crop must lie in 1 to 178"):
            celeba(root, **options)


def test_without_pillow_the_error_says_what_to_install(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        celeba(root)


def test_the_error_names_a_broken_picture(root):
    path = root / "img_align_celeba" / "000002.jpg"
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[: len(whole) // 2], b"GIF89a" + whole):
        path.write_bytes(content)
        with pytest.raises(CorruptDataError, match=r"000002.jpg"):
            celeba(root)
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(CorruptDataError, match="must have 178 x 218 pixels, and has 64 x 64"):
        celeba(root)
    Image.new("RGB", (178, 218)).save(path, format="PNG")
    with pytest.raises(CorruptDataError, match=r"000002.jpg"):
        celeba(root)


def test_grey_pictures_become_colour(root):
    Image.new("L", (178, 218), 77).save(root / "img_align_celeba" / "000001.jpg", quality=100)
    assert (celeba(root, limit=1).images.int() - 77).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("list_eval_partition.txt", lambda text: "", "lists no image of part 0"),
        ("list_eval_partition.txt", lambda text: text.replace("000002.jpg 0", "000002.jpg 3"), "line 2 must be"),
        ("list_eval_partition.txt", lambda text: text.replace("000002.jpg", "../../000002.jpg"), "line 2 must be"),
        ("list_eval_partition.txt", lambda text: text.replace("000002.jpg 0", "000002.jpg"), "unpack"),
        ("list_eval_partition.txt", lambda text: "\u00e9" + text, "ascii"),
        ("list_attr_celeba.txt", lambda text: "", "unpack"),
        ("list_attr_celeba.txt", lambda text: text[: len(text) // 2], "states 6 images, and it lists"),
        ("list_attr_celeba.txt", lambda text: text[:-10], "line 8 must be a file's name and 40 times"),
        ("list_attr_celeba.txt", lambda text: text.replace("000003.jpg  ", "000003.jpg  0 "), "line 5 must be"),
        ("list_attr_celeba.txt", lambda text: text.replace("000003.jpg", "000009.jpg"), "does not list '000003.jpg'"),
        ("list_attr_celeba.txt", lambda text: text.replace("000006.jpg", "000009.jpg"), "does not list '000006.jpg'"),
        ("list_attr_celeba.txt", lambda text: text.replace("000003.jpg", "000002.jpg"), "line 5 lists '000002.jpg' again"),
        ("list_attr_celeba.txt", lambda text: text.replace("Attribute_4 ", "Attribute_5 "), "each once"),
        ("list_eval_partition.txt", lambda text: text + "000001.jpg 2\n", "line 7 lists '000001.jpg' again"),
        ("list_eval_partition.txt", lambda text: text + "000001.jpg 0\n", "line 7 lists '000001.jpg' again"),
    ],
)
def test_the_error_names_a_broken_list(root, name, change, message):
    (root / name).write_text(change((root / name).read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(CorruptDataError, match=rf"{name}.*{message}"):
        celeba(root)


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("split", ["train", "all"])
def test_a_truncated_list_of_parts_is_refused(root, count, split):
    """Also where the part asked for is whole."""
    path = root / "list_eval_partition.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    with pytest.raises(CorruptDataError, match=rf"list_attr_celeba.txt: it lists '00000{count + 1}.jpg', which list_eval"):
        celeba(root, split)
