"""Earth mover's distance against closed forms and all permutations."""

import itertools
import math
import sys

import pytest
import torch

from pyro_kd.metrics import emd


def test_a_translation_costs_its_length():
    x, shift = torch.randn(60, 2, 2).double(), torch.randn(2, 2).double()
    assert emd(x, x + shift) == pytest.approx(float(shift.norm()), rel=1e-12)


def test_emd_is_the_least_over_all_permutations():
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    costs = [(x - y[list(order)]).norm(dim=1).mean() for order in itertools.permutations(range(5))]
    assert emd(x, y) == pytest.approx(float(min(costs)), rel=1e-12)


def test_order_and_direction_do_not_matter():
    x, y = torch.randn(40, 2), torch.randn(40, 2) + 1
    distance = emd(x, y)
    assert distance > 0.5
    assert emd(x[torch.randperm(40)], y[torch.randperm(40)]) == pytest.approx(distance, rel=1e-12)
    assert emd(y, x) == pytest.approx(distance, rel=1e-12)
    assert emd(x, x[torch.randperm(40)]) == 0.0


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1)], ids=str)
def test_one_dimension_matches_sorted_values(shape):
    x, y = torch.randn(50).double(), torch.randn(50).double() * 2
    expected = float((x.sort().values - y.sort().values).abs().mean())
    assert emd(x.reshape(shape), y.reshape(shape)) == pytest.approx(expected, rel=1e-12)


def test_one_dimension_takes_samples_of_different_sizes():
    """0, 1 against 0, 0, 3: the distribution functions differ by 1/6 on [0, 1] and by 1/3 on [1, 3]."""
    assert emd(torch.tensor([0, 1]), torch.tensor([3, 0, 0])) == pytest.approx(1 / 6 + 2 / 3, rel=1e-12)


def test_assignment_agrees_with_one_dimension():
    """A constant second number leaves the distance as it is."""
    x, y = torch.randn(2, 30).double()
    flat = torch.zeros(30).double()
    assert emd(torch.stack([x, flat], 1), torch.stack([y, flat], 1)) == pytest.approx(emd(x, y), rel=1e-12)


def test_emd_of_gaussians_in_one_dimension_is_exact():
    """Of N(0, 1) and N(0, 4) the quantiles differ by |z|, whose mean is sqrt(2 / pi)."""
    values = torch.tensor([emd(torch.randn(4000), 2 * torch.randn(4000)) for _ in range(30)])
    assert abs(float(values.mean()) - math.sqrt(2 / math.pi)) < 5 * float(values.std()) / 30**0.5


def test_small_distances_far_from_the_origin_keep_their_digits():
    x = torch.rand(50, 2).double() + 1e6
    assert emd(x, x + torch.tensor([3e-4, 4e-4])) == pytest.approx(5e-4, rel=1e-5)


def test_invalid_samples_of_emd_are_refused():
    with pytest.raises(ValueError, match=r"need samples of equal size, not 5 and 4; use the first 4"):
        emd(torch.zeros(5, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"shape \(2,\) and \(3,\)"):
        emd(torch.zeros(5, 2), torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(5,), (5, 2)], ids=str)
def test_without_scipy_the_error_names_the_install_line(monkeypatch, shape):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install scipy, or pyro-kd\[metrics\]"):
        emd(torch.zeros(shape), torch.zeros(shape))
