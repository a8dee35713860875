"""The digits are scikit-learn's, at both sizes."""

import sys

import pytest
import torch

from pyro_kd.datasets import digits, digits_32


def test_digits_are_those_of_scikit_learn():
    data = digits()
    assert data.images.shape == (1797, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 1)
    assert data.labels[:10].tolist() == list(range(10))
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_enlarged_are_the_digits():
    """Averaged back over 4 x 4 pixels, and in the order of scikit-learn's."""
    large, small = digits_32(), digits()
    assert large.images.shape == (1797, 1, 32, 32)
    assert large.images.dtype == torch.uint8
    assert (large.images.min(), large.images.max()) == (0, 255)
    assert torch.equal(large.labels, small.labels)
    assert large.classes == tuple("0123456789")
    inner = torch.nn.functional.interpolate(small.images[:, None], (32, 32), mode="bilinear")
    assert (large.floats() - inner).abs().max() <= 0.5 / 255 + 1e-6
    back = torch.nn.functional.avg_pool2d(large.floats(), 4)[:, 0]
    assert torch.corrcoef(torch.stack([back.flatten(), small.images.flatten()]))[0, 1] > 0.95


def test_digits_split_into_disjoint_parts():
    data = digits()
    first, second = data.split(360, seed=1)
    assert (len(first.images), len(second.labels)) == (1437, 360)
    together = torch.cat([first.images, second.images]).sum((1, 2)).sort().values
    assert torch.equal(together, data.images.sum((1, 2)).sort().values)
    again, other = data.split(360, seed=1)[1], data.split(360, seed=2)[1]
    assert torch.equal(second.images, again.images)
    assert not torch.equal(second.images, other.images)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        digits()
