"""MMD and the nearest-neighbour test against closed forms, brute force and trusted libraries."""

import math

import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from pyro_kd.metrics import (
    gaussian,
    laplacian,
    mmd,
    nearest_neighbour_accuracy,
    rational_quadratic,
)

KERNELS = pytest.mark.parametrize("kernel", [gaussian, laplacian, rational_quadratic], ids=lambda kernel: kernel.__name__)


def _gaussian_closed_form(shift, h):
    """E k(x, y) of a Gaussian kernel between N(0, 1) and N(shift, 1) is itself a Gaussian density."""

    def kernel_mean(mean):
        return h / math.sqrt(h**2 + 2) * math.exp(-(mean**2) / (2 * (h**2 + 2)))

    return 2 * kernel_mean(0.0) - 2 * kernel_mean(shift)


def test_mmd_agrees_with_the_closed_form_for_gaussians():
    estimates = torch.tensor([mmd(torch.randn(500, 1), torch.randn(400, 1) + 1.5, 0.8) for _ in range(60)])
    truth = _gaussian_closed_form(1.5, 0.8)
    assert abs(float(estimates.mean()) - truth) < 5 * float(estimates.std()) / 60**0.5


@KERNELS
def test_mmd_is_unbiased(kernel):
    values = torch.tensor([mmd(torch.randn(40, 2), torch.randn(30, 2), 1.0, kernel) for _ in range(400)])
    assert abs(values.mean()) < 5 * values.std() / 20
    assert (values < 0).any()


NAIVE = {
    gaussian: lambda r, h: math.exp(-(r**2) / (2 * h**2)),
    laplacian: lambda r, h: math.exp(-r / h),
    rational_quadratic: lambda r, h: 1 / (1 + r**2 / (2 * h**2)),
}


@KERNELS
@pytest.mark.parametrize("bandwidth", [None, 0.7])
def test_mmd_agrees_with_a_double_loop(kernel, bandwidth):
    """By default the bandwidth is the median distance."""
    x, y = torch.randn(7, 2, 3), torch.randn(9, 2, 3) + 1
    rows = torch.cat([x, y]).flatten(1).double()
    distances = torch.tensor([float((a - b).norm()) for i, a in enumerate(rows) for b in rows[:i]], dtype=torch.float64)
    h = bandwidth or float(distances.median())

    def k(a, b):
        return NAIVE[kernel](float((a - b).norm()), h)

    p, q = rows[:7], rows[7:]
    within_p = sum(k(a, b) for i, a in enumerate(p) for j, b in enumerate(p) if i != j) / 42
    within_q = sum(k(a, b) for i, a in enumerate(q) for j, b in enumerate(q) if i != j) / 72
    across = sum(k(a, b) for a in p for b in q) / 63
    assert mmd(x, y, bandwidth, kernel) == pytest.approx(within_p + within_q - 2 * across, rel=1e-10)


def test_mmd_takes_a_kernel_that_is_not_1_at_0():
    """The kernel -r^2 / 2 gives the squared distance of the means without its bias, by hand for four values."""
    x, y = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 7.0])
    expected = -(2**2) / 2 - 4**2 / 2 + (9 + 49 + 1 + 25) / 4
    assert mmd(x, y, 1.0, lambda squared, h: 5 - squared / 2) == pytest.approx(expected)


@KERNELS
def test_mmd_keeps_its_digits_far_from_the_origin(kernel):
    x, y = torch.randn(50, 2).double(), torch.randn(50, 2).double() + 1
    assert mmd(x + 1e6, y + 1e6, kernel=kernel) == pytest.approx(mmd(x, y, kernel=kernel), rel=1e-6)


@KERNELS
@pytest.mark.parametrize("bandwidth", [None, 1.0])
def test_mmd_keeps_its_digits_next_to_far_outliers(kernel, bandwidth):
    """The rows next to each other have distances of size 1, which matrix products over rows of size 1e8 lose."""
    x, y = torch.randn(50, 2).double(), torch.randn(50, 2).double()
    x[:5] += 1e8
    joint = torch.cat([x, y])
    squared = (joint[:, None] - joint).square().sum(-1)
    h = bandwidth or float(squared[tuple(torch.triu_indices(100, 100, 1))].median().sqrt())
    values = kernel(squared, h).fill_diagonal_(0)
    expected = (values[:50, :50].sum() + values[50:, 50:].sum()) / (50 * 49) - 2 * values[:50, 50:].mean()
    assert mmd(x, y, bandwidth, kernel) == pytest.approx(float(expected), rel=1e-9)


def test_nearest_neighbour_accuracy_agrees_with_scikit_learn():
    """Without ties."""
    x, y = torch.randn(50, 2), torch.randn(50, 2) + 0.7
    values, labels = torch.cat([x, y]).double().numpy(), [0] * 50 + [1] * 50
    expected = cross_val_score(KNeighborsClassifier(1), values, labels, cv=LeaveOneOut()).mean()
    assert 0.5 < expected < 1
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(expected, rel=1e-12)


def test_ties_count_by_the_fraction_with_the_right_label():
    """Integers repeat, within and across the samples."""
    x, y = torch.randint(0, 4, (30, 2)), torch.randint(1, 5, (30, 2))
    rows, right = torch.cat([x, y]), 0.0
    for i, a in enumerate(rows):
        squared = {j: int((a - b).square().sum()) for j, b in enumerate(rows) if j != i}
        nearest = [j for j, value in squared.items() if value == min(squared.values())]
        right += sum((j < 30) == (i < 30) for j in nearest) / len(nearest)
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(right / 60, rel=1e-12)
    assert nearest_neighbour_accuracy(y, x) == pytest.approx(right / 60, rel=1e-12)


def test_ties_far_from_the_origin_stay_ties():
    """Distances by matrix products would round: 1e8 squared leaves no digits below 1."""
    x, y = torch.randint(0, 4, (40, 2)), torch.randint(1, 5, (40, 2))
    assert nearest_neighbour_accuracy(x + 10**8, y + 10**8) == nearest_neighbour_accuracy(x, y)


def test_ties_of_equal_laws_have_accuracy_one_half():
    """200 zeros against 200 zeros: 199 of the 399 nearest have the right label."""
    assert nearest_neighbour_accuracy(torch.zeros(200), torch.zeros(200)) == pytest.approx(199 / 399, rel=1e-12)


def test_nearest_neighbours_do_not_depend_on_blocks(monkeypatch):
    x, y = torch.randn(50, 2), torch.randn(50, 2) + 0.7
    whole = nearest_neighbour_accuracy(x, y)
    monkeypatch.setattr("pyro_kd.metrics.two_sample._CHUNK", 700)
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(whole, rel=1e-12)


def test_nearest_neighbour_accuracy_reaches_0_and_1():
    x = torch.randn(200, 3)
    assert nearest_neighbour_accuracy(x, x + 100) == 1.0
    assert nearest_neighbour_accuracy(x, x.clone()) == 0.0
    same = torch.tensor([nearest_neighbour_accuracy(torch.randn(200, 3), torch.randn(200, 3)) for _ in range(50)])
    # a neighbour is one of the 199 others of the sample or the 200 of the other one
    assert abs(float(same.mean()) - 199 / 399) < 5 * float(same.std()) / 50**0.5


def test_invalid_pairs_of_samples_are_refused():
    with pytest.raises(ValueError, match="bandwidth must be positive, but half of the distances are zero; pass bandwidth=h"):
        mmd(torch.zeros(5, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="bandwidth must be positive and finite, not -1"):
        mmd(torch.zeros(5, 2), torch.ones(5, 2), bandwidth=-1.0)
    with pytest.raises(ValueError, match="equal size"):
        nearest_neighbour_accuracy(torch.zeros(5, 2), torch.zeros(4, 2))
