"""Pictures of images: values that are not finite, arrays of any layout."""

import math

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

from pyro_kd import plots  # noqa: E402


@pytest.fixture(autouse=True)
def closed():
    """No figure stays open."""
    yield
    pyplot.close("all")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite_are_red_and_leave_the_others(bad):
    images = np.linspace(0.0, 1.0, 2 * 4).reshape(2, 2, 2)
    images[0, 0, 0] = bad
    shown = plots.sample_grid(images).images[0].get_array()
    assert shown[0, 0].tolist() == [1.0, 0.0, 0.0]
    assert shown[1, 1].tolist() == pytest.approx([(images[0, 1, 1] - images[0, 0, 1]) / (1.0 - images[0, 0, 1])] * 3)


@pytest.mark.parametrize(
    "images",
    [np.ones((3, 4, 4))[:, ::-1], np.ones((3, 4, 4), dtype=">f4"), [torch.ones(4, 4)] * 3],
    ids=["flipped", "big", "list"],
)
def test_images_of_any_layout_are_drawn(images):
    assert plots.sample_grid(images, columns=3).images[0].get_array().shape == (4, 14)


@pytest.mark.parametrize("columns", [0, -1])
def test_a_grid_without_columns_is_refused(columns):
    with pytest.raises(ValueError, match="columns must be at least 1"):
        plots.sample_grid(np.ones((3, 4, 4)), columns=columns)
