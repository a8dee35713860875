"""The squared 2-Wasserstein distance, against quantile couplings and matrix square roots."""

import pyro.distributions as dist
import pytest
import torch

from pyro_kd.divergences import wasserstein2
from pyro_kd.errors import UnsupportedDivergenceError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("family", "p", "q"), [(dist.Normal, (1.0, 2.0), (-0.5, 0.7)), (dist.Uniform, (-1.0, 3.0), (0.5, 1.0))]
)
def test_wasserstein2_of_one_dimension_is_that_of_the_quantile_coupling(family, p, q):
    p, q = family(*map(torch.tensor, p)), family(*map(torch.tensor, q))
    u = (torch.arange(200_000) + 0.5) / 200_000
    quantile = (p.icdf(u) - q.icdf(u)).square().mean()
    assert torch.allclose(wasserstein2(p, q, None), quantile, rtol=1e-3)


def test_wasserstein2_of_diagonal_and_full_covariances_agree():
    loc, scale = torch.randn(2, 5, 4).unbind(), (torch.rand(2, 5, 4) + 0.1).unbind()
    diagonal = [dist.Normal(m, s).to_event(1) for m, s in zip(loc, scale, strict=True)]
    full = [dist.MultivariateNormal(m, scale_tril=s.diag_embed()) for m, s in zip(loc, scale, strict=True)]
    expected = wasserstein2(*diagonal, None)
    assert expected.shape == (5,)
    for p, q in ((full[0], full[1]), (diagonal[0], full[1]), (full[0], diagonal[1])):
        assert torch.allclose(wasserstein2(p, q, None), expected)


def test_wasserstein2_of_full_covariances_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    a, b = torch.randn(2, 3, 3).unbind()
    s, t = a @ a.T + torch.eye(3), b @ b.T + torch.eye(3)
    root = torch.as_tensor(sqrtm(s.numpy()).real)
    bures = torch.trace(s + t) - 2 * torch.as_tensor(sqrtm((root @ t @ root).numpy()).real).trace()
    p, q = dist.MultivariateNormal(torch.zeros(3), s), dist.MultivariateNormal(torch.ones(3), t)
    assert torch.allclose(wasserstein2(p, q, None), bures + 3)
    low_rank = dist.LowRankMultivariateNormal(
        torch.ones(3), torch.linalg.cholesky(t - 0.5 * torch.eye(3)), torch.full((3,), 0.5)
    )
    assert torch.allclose(wasserstein2(p, low_rank, None), bures + 3)


def test_the_gradient_of_wasserstein2_agrees_with_finite_differences():
    mean = torch.randn(3, requires_grad=True)
    factor = (torch.eye(3) + 0.3 * torch.randn(3, 3)).tril().detach().requires_grad_()
    p = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5)
    assert torch.autograd.gradcheck(
        lambda m, f: wasserstein2(p, dist.MultivariateNormal(m, scale_tril=f.tril()), None), (mean, factor)
    )


def test_wasserstein2_of_points_is_their_squared_distance():
    p, q = dist.Delta(torch.zeros(5, 2, 3), event_dim=2), dist.Delta(torch.ones(5, 2, 3), event_dim=2)
    assert torch.equal(wasserstein2(p, q, None), torch.full((5,), 6.0))
    assert torch.equal(
        wasserstein2(dist.Delta(torch.zeros(4)), dist.Normal(torch.ones(4), 2.0), None), torch.full((4,), 5.0)
    )


def test_wasserstein2_refuses_families_without_a_closed_form():
    with pytest.raises(UnsupportedDivergenceError, match="not for Gamma.*Use kl"):
        wasserstein2(dist.Gamma(1.0, 1.0), dist.Gamma(2.0, 1.0), None)
    with pytest.raises(UnsupportedDivergenceError, match="not for Uniform"):
        wasserstein2(dist.Uniform(0.0, 1.0), dist.Normal(2.0, 1.0), None)


def test_wasserstein2_of_uniforms_sums_over_the_event():
    p = dist.Uniform(torch.zeros(4, 3), torch.ones(4, 3)).to_event(1)
    q = dist.Uniform(torch.zeros(4, 3), 2 * torch.ones(4, 3)).to_event(1)
    torch.testing.assert_close(wasserstein2(p, q, None), torch.full((4,), 3 * (0.25 + 1 / 12)))
