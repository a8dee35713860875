"""The data are those of R, and standardisation can be reversed."""

import pytest
import torch

from pyro_kd.datasets import Standardisation, old_faithful


def test_old_faithful_is_that_of_r():
    """Row count, means and ends as R prints them: summary(faithful), head, tail."""
    data = old_faithful()
    assert data.rows.shape == (272, 2)
    assert round(float(data.eruptions.mean()), 6) == 3.487783
    assert round(float(data.waiting.mean()), 5) == 70.89706
    assert data.rows[0].tolist() == torch.tensor([3.6, 79.0]).tolist()
    assert data.rows[-1].tolist() == torch.tensor([4.467, 74.0]).tolist()
    assert (float(data.eruptions.min()), float(data.waiting.max())) == (torch.tensor(1.6).item(), 96.0)


def test_standardisation_can_be_reversed():
    rows = old_faithful().rows
    scale = Standardisation.of(rows)
    z = scale(rows)
    assert torch.allclose(z.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(z.std(0), torch.ones(2))
    assert torch.allclose(scale.restore(z), rows)


def test_a_column_that_does_not_vary_becomes_zero():
    rows = torch.stack([torch.full((7,), 0.1), torch.arange(7.0)], 1)
    scale = Standardisation.of(rows)
    assert scale(rows)[:, 0].tolist() == [0.0] * 7
    assert torch.allclose(scale.restore(scale(rows)), rows)
    assert scale(torch.tensor([[0.6, 3.0]]))[0, 0].item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (torch.ones(1, 2), ValueError, "from two on"),
        (torch.arange(6).reshape(3, 2), TypeError, "floating-point"),
        (torch.tensor([[1.0, 2.0], [1.0, float("nan")]]), ValueError, "column 1"),
    ],
)
def test_rows_without_a_scale_are_refused(rows, error, text):
    with pytest.raises(error, match=text):
        Standardisation.of(rows)
