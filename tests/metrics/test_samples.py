"""What every comparison of two samples accepts, and what it refuses."""

import pytest
import torch

from pyro_kd.metrics import (
    PrincipalComponents,
    count_kl,
    density_ratio_kl,
    emd,
    fid,
    histogram_kl,
    mmd,
    nearest_neighbour_accuracy,
)

COMPARISONS = [count_kl, density_ratio_kl, emd, fid, histogram_kl, mmd, nearest_neighbour_accuracy]
EVERY = pytest.mark.parametrize("compare", COMPARISONS, ids=lambda compare: compare.__name__)


def _samples():
    x, y = torch.randint(0, 9, (60, 1)), torch.randint(0, 6, (60, 1))
    x[0], y[0] = 0, 8  # both reach the ends, so that no bin is empty at either
    return x, y


@EVERY
def test_the_dtype_does_not_matter_nor_a_gradient(compare):
    x, y = _samples()
    expected = compare(x, y)
    assert compare(x.int(), y.to(torch.uint8)) == expected
    assert compare(x.double(), y.float()) == expected
    assert compare(x.half(), y.bfloat16()) == expected
    leaf = x.float().requires_grad_()
    assert compare(leaf * 1, y.float()) == expected
    assert leaf.grad is None


@EVERY
def test_the_shape_of_a_value_does_not_matter(compare):
    x, y = _samples()
    assert compare(x[:, 0], y[:, 0]) == compare(x, y) == compare(x[..., None], y[..., None])


@EVERY
def test_samples_and_random_state_are_left_alone(compare):
    x, y = (value.double() for value in _samples())
    before, state = (x.clone(), y.clone()), torch.random.get_rng_state()
    assert compare(x, y) == compare(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.gpu
@EVERY
def test_the_device_does_not_matter_but_must_be_the_same(compare):
    x, y = (value.cuda() for value in _samples())
    expected, actual = compare(x.cpu(), y.cpu()), compare(x, y)
    mean = getattr(expected, "mean", expected)
    assert getattr(actual, "mean", actual) == pytest.approx(mean, rel=1e-9, abs=1e-9)
    with pytest.raises(ValueError, match=r"x is on cuda:0 and y on cpu; move one of them: y.to\(x.device\)"):
        compare(x, y.cpu())


@EVERY
def test_invalid_samples_are_refused(compare):
    x = torch.randn(20, 1).round()
    with pytest.raises(ValueError, match=r"values of shape \(1,\) and \(3,\); they must agree"):
        compare(x, torch.zeros(20, 3))
    with pytest.raises(ValueError, match=r"x is a scalar; a sample has shape \(n, \.\.\.\)"):
        compare(torch.tensor(1.0), x)
    with pytest.raises(ValueError, match=r"each sample needs at least .* values?, but y has 0"):
        compare(x, x[:0])
    with pytest.raises(ValueError, match=r"x holds no numbers: its shape is \(20, 0\)"):
        compare(x[:, :0], x[:, :0])
    with pytest.raises(TypeError, match=r"y must be a real tensor of shape \(n, \.\.\.\), not torch.complex64"):
        compare(x, x.to(torch.complex64))
    with pytest.raises(TypeError, match="x must be a real tensor.*not list"):
        compare([1.0, 2.0], x)


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(compare, bad):
    x = torch.randn(20).round()
    y = x.clone()
    y[[3, 7]] = bad
    message = r"y has 2 values of 20 that are NaN or infinite, the first at index 3.*to drop them: y\[y\."
    with pytest.raises(ValueError, match=message + r"isfinite\(\)\]"):
        compare(x, y)
    with pytest.raises(ValueError, match=message):
        compare(x[:, None], y[:, None])


def test_the_line_that_drops_values_works():
    x = torch.randn(20, 2)
    x[4, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN") as error:
        PrincipalComponents.of(x, 1)
    line = str(error.value).split("drop them: ")[1]
    assert eval(line, {"x": x}).shape == (19, 2)
