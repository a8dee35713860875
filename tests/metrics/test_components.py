"""Principal components as a feature map: those of the covariance, and a distance that they keep."""

import pytest
import torch

from pyro_kd.metrics import PrincipalComponents, fid

pytestmark = pytest.mark.usefixtures("float64")


def test_components_are_the_eigenvectors_of_the_covariance():
    x = torch.randn(300, 2, 3) * torch.tensor([3.0, 2.0, 1.0])
    components = PrincipalComponents.of(x, 4)
    values, vectors = torch.linalg.eigh(x.flatten(1).T.cov())
    assert torch.allclose(components.variances, values.flip(0)[:4])
    assert torch.allclose((components.directions.T @ vectors.flip(1)[:, :4]).abs(), torch.eye(4), atol=1e-8)
    scores = components(x)
    assert torch.allclose(scores.T.cov(), values.flip(0)[:4].diag(), atol=1e-10)
    assert torch.allclose(scores.mean(0), torch.zeros(4), atol=1e-12)


def test_all_components_keep_the_distance():
    x, y = torch.randn(100, 5), torch.randn(80, 5) * 2 + 1
    assert fid(x, y, PrincipalComponents.of(x, 5)) == pytest.approx(fid(x, y), rel=1e-10)


def test_components_are_a_feature_map_of_float32_and_integers():
    x = torch.randint(0, 256, (50, 4, 4), dtype=torch.uint8)
    components = PrincipalComponents.of(x, 3)
    assert torch.equal(components(x), components(x.float()))
    assert fid(x, x, components) == pytest.approx(0.0, abs=1e-8)


def test_invalid_components_are_refused():
    with pytest.raises(ValueError, match="from 1 to 4 for 5 values of 7 numbers, not 5"):
        PrincipalComponents.of(torch.randn(5, 7), 5)
    with pytest.raises(ValueError, match="from 1 to 2 for 5 values of 2 numbers, not 0"):
        PrincipalComponents.of(torch.randn(5, 2), 0)
    components = PrincipalComponents.of(torch.randn(5, 2), 1)
    with pytest.raises(ValueError, match=r"values of shape \(3,\) have 3 numbers, but the components were fitted on 2"):
        components(torch.zeros(4, 3))
