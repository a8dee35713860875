"""The data are those of R, and standardisation can be reversed."""

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
