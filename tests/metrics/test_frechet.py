"""The Fréchet distance against closed forms and torchmetrics."""

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from pyro_kd.metrics import fid, frechet_distance

pytestmark = pytest.mark.usefixtures("float64")


def _rotation(d):
    return torch.linalg.qr(torch.randn(d, d)).Q


def _covariance(d):
    a = torch.randn(d, d)
    return a @ a.T


# Two Gaussians.


def test_the_distance_of_diagonal_covariances_is_exact():
    a, b = torch.rand(6) + 0.1, torch.rand(6) + 0.1
    m1, m2 = torch.randn(2, 6)
    expected = float((m1 - m2).square().sum() + (a - b).square().sum())
    assert frechet_distance(m1, (a**2).diag(), m2, (b**2).diag()) == pytest.approx(expected, rel=1e-12)


def test_the_distance_of_commuting_covariances_is_exact():
    a, b, q = torch.rand(6) + 0.1, torch.rand(6) + 0.1, _rotation(6)
    m = torch.zeros(6)
    cov1, cov2 = q @ (a**2).diag() @ q.T, q @ (b**2).diag() @ q.T
    assert frechet_distance(m, cov1, m, cov2) == pytest.approx(float((a - b).square().sum()), rel=1e-10)


def test_the_distance_of_covariances_that_do_not_commute_is_exact():
    """tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt(det C1 C2)) in two dimensions."""
    cov1, cov2 = torch.tensor([[2.0, 0.5], [0.5, 1.0]]), torch.tensor([[1.0, -0.8], [-0.8, 3.0]])
    assert float((cov1 @ cov2 - cov2 @ cov1).abs().max()) > 0.1
    product = cov1 @ cov2
    expected = cov1.trace() + cov2.trace() - 2 * (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(float(expected), rel=1e-12)


def test_it_is_symmetric_zero_on_itself_and_needs_no_full_rank():
    m1, m2 = torch.randn(2, 5)
    cov1, cov2 = _covariance(5), torch.zeros(5, 5)
    assert frechet_distance(m1, cov1, m1, cov1) == pytest.approx(0.0, abs=1e-12)
    assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(frechet_distance(m2, cov2, m1, cov1), rel=1e-12)
    assert frechet_distance(m1, cov1, m2, cov2) == pytest.approx(float((m1 - m2).square().sum() + cov1.trace()), rel=1e-12)


def test_invalid_gaussians_are_refused():
    zero, eye = torch.zeros(2), torch.eye(2)
    with pytest.raises(ValueError, match=r"\(2,\), \(2, 2\), \(3,\), \(2, 2\); they must be \(d,\), \(d, d\)"):
        frechet_distance(zero, eye, torch.zeros(3), eye)
    with pytest.raises(ValueError, match=r"cov2 is not symmetric"):
        frechet_distance(zero, eye, zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="cov1 has the negative eigenvalue -1"):
        frechet_distance(zero, -eye, zero, eye)
    with pytest.raises(ValueError, match="cov2 has 1 values of 2 that are NaN or infinite"):
        frechet_distance(zero, eye, zero, torch.tensor([[1.0, 0.0], [0.0, torch.nan]]))


# Two samples.


class _Features(torch.nn.Module):
    """Two layers with modes of their own: dropout makes a forward pass in training mode differ."""

    def __init__(self, d, width):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(d, width), torch.nn.Dropout(0.5), torch.nn.Tanh())
        self.num_features = width

    def forward(self, x):
        return self.layers(x.flatten(1))


@pytest.mark.parametrize(("n", "m"), [(500, 300), (40, 500), (6, 5)], ids=["tall", "one wide", "both wide"])
def test_fid_agrees_with_torchmetrics(n, m):
    """Where there are fewer values than features, too."""
    features = _Features(12, 20).eval().requires_grad_(False)
    x, y = torch.randn(n, 3, 4), torch.randn(m, 3, 4) * 1.5 + 0.3
    metric = FrechetInceptionDistance(feature=features, input_img_size=(3, 4)).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    # torchmetrics takes roots of 20 eigenvalues of the product, which are off by rounding where they are zero
    scale = torch.linalg.matrix_norm(features(x).T.cov(), 2) * torch.linalg.matrix_norm(features(y).T.cov(), 2)
    rounding = 20 * float(20 * torch.finfo(torch.float64).eps * scale) ** 0.5
    assert fid(x, y, features, batch_size=37) == pytest.approx(float(metric.compute()), abs=rounding)


def test_raw_values_are_the_default():
    x, y = torch.randn(50, 2, 2), torch.randn(60, 2, 2) + 1
    expected = frechet_distance(x.flatten(1).mean(0), x.flatten(1).T.cov(), y.flatten(1).mean(0), y.flatten(1).T.cov())
    assert fid(x, y) == pytest.approx(expected, rel=1e-10)


def test_fid_of_shifted_and_scaled_samples_is_exact():
    """x to a x + b in one dimension: (m - a m - b)^2 + (s - a s)^2."""
    x = torch.randn(30)
    expected = (x.mean() - 3 * x.mean() - 2).square() + (2 * x.std()).square()
    assert fid(x, 3 * x + 2) == pytest.approx(float(expected), rel=1e-12)


def test_fid_of_equal_samples_in_any_order_is_0():
    x = torch.randn(100, 30)
    assert fid(x, x[torch.randperm(100)]) == pytest.approx(0.0, abs=1e-10)


def test_a_module_is_evaluated_without_gradient_and_keeps_its_modes():
    features = _Features(4, 3).train()
    features.layers[0].eval()
    modes = [module.training for module in features.modules()]
    x, y = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4)
    first = fid(x, y, features)
    assert first == fid(x, y, features)  # no dropout
    assert [module.training for module in features.modules()] == modes
    assert x.grad is None
    assert all(p.grad is None for p in features.parameters())


def test_modes_are_restored_after_an_error():
    features = _Features(5, 3).train()
    with pytest.raises(RuntimeError):
        fid(torch.randn(9, 4), torch.randn(9, 4), features)
    assert all(module.training for module in features.modules())


def test_features_get_batches_in_the_dtype_of_the_values():
    seen = []

    def features(batch):
        seen.append((len(batch), batch.dtype, torch.is_grad_enabled()))
        return batch.double().unsqueeze(-1)

    fid(torch.arange(20).reshape(10, 2), torch.arange(8).reshape(4, 2), features, batch_size=4)
    assert seen == [(size, torch.int64, False) for size in (4, 4, 2, 4)]


def test_the_bias_falls_with_the_number_of_values():
    """For equal laws the expectation is positive, and so values at different n cannot be compared."""
    small, large = ([fid(torch.randn(n, 10), torch.randn(n, 10)) for _ in range(20)] for n in (20, 200))
    assert min(small) > max(large) > 0


def test_invalid_samples_and_features_are_refused():
    with pytest.raises(ValueError, match=r"at least two values, but y has 1"):
        fid(torch.zeros(5, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="batch_size must be positive, not 0"):
        fid(torch.zeros(5, 2), torch.zeros(5, 2), batch_size=0)
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"must map 5 values to 5 rows.*returned shape \(2,\)"):
        fid(x, x, lambda batch: batch.mean(0))
    with pytest.raises(ValueError, match="returned float"):
        fid(x, x, lambda batch: float(batch.mean()))
    with pytest.raises(ValueError, match=r"features\(x\) has 5 values of 5 that are NaN"):
        fid(x, x, lambda batch: batch * torch.nan)
    with pytest.raises(ValueError, match=r"features has widths \[1, 3\] for x"):
        fid(x[:4], x, lambda batch: torch.ones(len(batch), len(batch)), batch_size=3)
