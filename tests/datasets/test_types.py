"""Images and Strokes check their tensors, and cut, split and pad without losing a value."""

import pytest
import torch

from pyro_kd.datasets import Images, Standardisation, Strokes


def some_images(n=10):
    pixels = torch.arange(n * 3 * 2 * 2).remainder(256).to(torch.uint8).reshape(n, 3, 2, 2)
    return Images(pixels, torch.arange(n) % 2, ("even", "odd"))


def some_strokes(n=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=generator)
    moves = torch.randn(int(lengths.sum()), 2, generator=generator) * torch.tensor([3.0, 0.5]) + 1
    pen = torch.rand(len(moves), 1, generator=generator).round()
    return Strokes(torch.cat([moves, pen], -1), lengths)


def test_images_become_floats_from_0_to_1():
    images = some_images(30)
    floats = images.floats()
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (0, 1)
    assert torch.equal((floats * 255).round().to(torch.uint8), images.images)


def test_images_where_and_subset():
    images = some_images()
    odd = images.where(images.labels == 1)
    assert len(odd) == 5
    assert torch.equal(odd.images, images.images[1::2])
    assert odd.classes == images.classes
    assert torch.equal(images.subset(torch.tensor([3, 0])).images, images.images[[3, 0]])
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(10,\)"):
        images.where(torch.ones(9, dtype=torch.bool))


@pytest.mark.parametrize("make", [some_images, some_strokes])
def test_split_is_disjoint_and_seeded(make):
    data = make(10)
    state = torch.get_rng_state()
    first, second = data.split(3, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert (len(first), len(second)) == (7, 3)

    def rows(part):
        if isinstance(part, Images):
            return [tuple(image.flatten().tolist()) for image in part.images]
        return [tuple(part[i].flatten().tolist()) for i in range(len(part))]

    assert sorted(rows(first) + rows(second)) == sorted(rows(data))
    assert rows(data.split(3, seed=1)[1]) == rows(second) != rows(data.split(3, seed=2)[1])
    with pytest.raises(ValueError, match="held_out must lie in 0 to 10"):
        data.split(11, seed=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 2, 2)}, "uint8 of shape .* not float32"),
        ({"images": torch.zeros(2, 2, 2, dtype=torch.uint8)}, r"not uint8 of shape \(2, 2, 2\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64 of shape \(2,\)"),
        ({"labels": torch.zeros(2)}, "not float32"),
        ({"labels": torch.tensor([0, 2])}, "labels must lie in 0 to 1, and go from 0 to 2"),
        ({"labels": torch.tensor([-1, 0])}, "go from -1 to 0"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, "3 columns of attributes and 2 names"),
        ({"labels": torch.full((2, 2), 2)}, "labels must lie in 0 to 1"),
    ],
)
def test_invalid_images_are_refused(change, message):
    right = {"images": torch.zeros(2, 3, 2, 2, dtype=torch.uint8), "labels": torch.tensor([0, 1]), "classes": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        Images(**right | change)


def test_strokes_one_by_one():
    strokes = some_strokes()
    assert torch.equal(torch.cat([strokes[i] for i in range(len(strokes))]), strokes.points)
    assert torch.equal(torch.stack([torch.tensor(len(points)) for points in strokes]), strokes.lengths)
    assert torch.equal(strokes[-1], strokes[len(strokes) - 1])
    with pytest.raises(IndexError):
        strokes[20]


@pytest.mark.parametrize("length", [None, 0, 1, 4, 30])
def test_strokes_padded(length):
    strokes = some_strokes()
    values, mask = strokes.padded(length)
    length = int(strokes.lengths.max()) if length is None else length
    assert values.shape == (20, length, 3)
    assert mask.shape == (20, length)
    for i in range(len(strokes)):
        points = strokes[i][:length]
        assert torch.equal(values[i, : len(points)], points)
        assert mask[i].sum() == len(points)
        assert not values[i, len(points) :].any()
        assert mask[i, : len(points)].all()


def test_strokes_subset_and_where():
    strokes = some_strokes()
    picked = strokes.subset(torch.tensor([7, 7, 0]))
    assert all(torch.equal(picked[i], strokes[j]) for i, j in enumerate([7, 7, 0]))
    long = strokes.where(strokes.lengths > 4)
    kept = [i for i in range(20) if strokes.lengths[i] > 4]
    assert 0 < len(kept) < 20
    assert all(torch.equal(long[i], strokes[j]) for i, j in enumerate(kept))
    none = strokes.where(torch.zeros(20, dtype=torch.bool))
    assert len(none) == 0
    assert none.padded()[0].shape == (0, 0, 3)
    with pytest.raises(ValueError, match="mask must be bool"):
        strokes.where(torch.ones(20))


def test_strokes_standardised():
    strokes = some_strokes(200)
    z, scale = strokes.standardised()
    assert isinstance(scale, Standardisation)
    assert torch.allclose(z.points[:, :2].mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(z.points[:, :2].std(0), torch.ones(2))
    assert torch.equal(z.points[:, 2], strokes.points[:, 2])
    assert torch.allclose(scale.restore(z.points[:, :2]), strokes.points[:, :2], atol=1e-5)
    other, again = some_strokes(5, seed=1).standardised(scale.mean, scale.std)
    assert torch.equal(other.points[:, :2], scale(some_strokes(5, seed=1).points[:, :2]))
    assert again.mean is scale.mean
    with pytest.raises(ValueError, match="mean and std, or neither"):
        strokes.standardised(scale.mean)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        strokes.standardised(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="std must be positive"):
        strokes.standardised(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("points", "lengths", "message"),
    [
        (torch.zeros(3, 3), torch.tensor([2]), "the lengths sum to 2, and there are 3 points"),
        (torch.zeros(3, 3), torch.tensor([3, 0]), "a drawing has 0 points"),
        (torch.zeros(3, 3), torch.tensor([4, -1]), "a drawing has -1 points"),
        (torch.zeros(3, 3), torch.tensor([3.0]), "lengths must be int64"),
        (torch.zeros(3, 2), torch.tensor([3]), r"not float32 of shape \(3, 2\)"),
        (torch.zeros(3, 3, dtype=torch.float64), torch.tensor([3]), "not float64"),
        (torch.full((3, 3), 2.0), torch.tensor([3]), "must be 0 or 1, and goes from 2 to 2"),
        (torch.full((3, 3), float("nan")), torch.tensor([3]), "NaN"),
    ],
)
def test_invalid_strokes_are_refused(points, lengths, message):
    with pytest.raises(ValueError, match=message):
        Strokes(points, lengths)
