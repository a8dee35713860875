"""The loaders by name: the same data as from the loaders, disjoint parts, and errors that list the names."""

import numpy
import pytest
import torch

from pyro_kd.datasets import IMAGES, STROKES, digits_32, hershey_strokes, load_images, load_strokes
from pyro_kd.errors import CorruptDataError, MissingDataError
from tests.support.data_files import drawings, line, pixels, write_end_to_end


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images.images}


def test_digits_parts_are_disjoint_and_fixed():
    train, test = load_images("digits"), load_images("digits", train=False)
    assert rows(train).isdisjoint(rows(test))
    assert rows(train) | rows(test) == rows(digits_32())
    assert torch.equal(train.images, load_images("digits", root="anywhere").images)


def test_hershey_parts_are_disjoint_and_fixed():
    parts = {split: load_strokes("hershey", split=split, num=30) for split in ("train", "valid", "test")}
    seen = [{tuple(part[i].flatten().tolist()) for i in range(30)} for part in parts.values()]
    assert len(set.union(*seen)) == 90
    assert torch.equal(parts["valid"].points, hershey_strokes(30, seed=1).points)
    assert torch.equal(parts["test"].points, load_strokes("hershey", split="test", num=30).points)
    assert not torch.equal(parts["test"].points[:5], load_strokes("hershey", split="test", num=30, seed=1).points[:5])
    assert len(load_strokes("hershey", split="valid", words=["a"], step=5.0)) == 500


def test_files_by_name(tmp_path):
    train, test = pixels(3, 2, 2), pixels(2, 2, 2)
    numpy.savez(tmp_path / "images.npz", train_images=train, test_images=test)
    assert torch.equal(load_images("images-npz", tmp_path / "images.npz").images[:, 0], torch.from_numpy(train))
    assert len(load_images("images-npz", tmp_path / "images.npz", train=False)) == 2
    write_end_to_end(tmp_path / "cat.npz", "valid", drawings(4))
    assert len(load_strokes("stroke3", tmp_path / "cat.npz", "valid")) == 4


def test_iam_ondb_parts_are_disjoint_by_form(tmp_path):
    for form in range(20):
        folder = tmp_path / "lineStrokes" / "a01" / f"a01-{form:03d}"
        folder.mkdir(parents=True)
        for number in (1, 2):
            (folder / f"a01-{form:03d}u-{number:02d}.xml").write_text(line([(0, 0), (form, number)]), encoding="latin1")
    parts = {split: load_strokes("iam-ondb", tmp_path, split) for split in ("train", "valid", "test")}
    assert [len(part) for part in parts.values()] == [32, 4, 4]
    forms = [{float(part[i][1, 0]) for i in range(len(part))} for part in parts.values()]
    assert len(set.union(*forms)) == sum(map(len, forms)) == 20
    assert len(load_strokes("iam-ondb", tmp_path, limit=5)) == 5


def test_iam_ondb_with_too_few_forms_is_refused(tmp_path):
    folder = tmp_path / "lineStrokes" / "a01" / "a01-000"
    folder.mkdir(parents=True)
    (folder / "a01-000u-01.xml").write_text(line([(0, 0)]), encoding="latin1")
    with pytest.raises(CorruptDataError, match="holds 1 forms, and three parts need at least 3"):
        load_strokes("iam-ondb", tmp_path)


@pytest.mark.parametrize("name", sorted(IMAGES.keys() - {"digits"}))
@pytest.mark.parametrize("train", [True, False])
def test_missing_images_say_what_to_fetch(name, train, tmp_path):
    with pytest.raises(MissingDataError, match=r"--data-root, is missing(.|\n)*fetch(.|\n)*ROOT"):
        load_images(name, train=train)
    with pytest.raises(MissingDataError, match=r"nothing.* is missing(.|\n)*fetch(.|\n)*ROOT"):
        load_images(name, tmp_path / "nothing", train=train)


@pytest.mark.parametrize("name", sorted(STROKES.keys() - {"hershey"}))
def test_missing_drawings_say_what_to_fetch(name, tmp_path):
    with pytest.raises(MissingDataError, match=r"--data-root, is missing(.|\n)*fetch(.|\n)*ROOT"):
        load_strokes(name)
    with pytest.raises(MissingDataError, match=r"nothing.* is missing(.|\n)*fetch(.|\n)*ROOT"):
        load_strokes(name, tmp_path / "nothing")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no data set 'cifar'. Did you mean 'cifar10'\? There are 'digits', 'cifar10', 'svhn'"
    ):
        load_images("cifar")
    with pytest.raises(ValueError, match="There are 'hershey', 'iam-ondb', 'stroke3'"):
        load_strokes("digits")
    with pytest.raises(ValueError, match="split must be one of 'train', 'valid', 'test'"):
        load_strokes("hershey", split="extra")
