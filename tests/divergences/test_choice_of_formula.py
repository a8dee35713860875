"""Which formula a divergence takes: the user's first, none that the density does not fit, and 0 for equal laws."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.divergences import jensen_shannon, kl, reverse_kl


def test_a_kl_that_a_user_registers_has_priority():
    class Mine(dist.Gamma):
        pass

    @torch.distributions.register_kl(Mine, Mine)
    def _kl(p, q):
        return torch.full(p.batch_shape, 7.0)

    p = Mine(torch.tensor(2.0), torch.tensor(1.0))
    assert kl(p, p, None) == 7.0
    del torch.distributions.kl._KL_REGISTRY[Mine, Mine]


def test_a_subclass_with_its_own_density_does_not_use_the_formula_of_its_base():
    class Truncated(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) - 1

    p = Truncated(torch.tensor(0.0), torch.tensor(1.0))
    assert not kl.is_exact(p, dist.Normal(0.0, 1.0))
    assert kl(p, dist.Normal(0.0, 1.0), torch.tensor(0.3)).item() == pytest.approx(-1)


WIDE = torch.linspace(-25.0, 25.0, 9)
OF_LOGITS = {
    "Geometric": lambda: dist.Geometric(logits=WIDE),
    "Bernoulli": lambda: dist.Bernoulli(logits=WIDE),
    "Binomial": lambda: dist.Binomial(10, logits=WIDE),
    "NegativeBinomial": lambda: dist.NegativeBinomial(2.0, logits=WIDE / 5),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(logits=WIDE),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(torch.full((9,), 2.0), gate_logits=WIDE),
    "ZeroInflatedNegativeBinomial": lambda: dist.ZeroInflatedNegativeBinomial(torch.full((9,), 2.0), logits=WIDE / 5, gate_logits=WIDE),
    "ZeroInflatedDistribution": lambda: dist.ZeroInflatedDistribution(dist.Normal(torch.zeros(9), 1.0), gate_logits=WIDE),
}  # fmt: skip


@pytest.mark.parametrize("make", OF_LOGITS.values(), ids=OF_LOGITS.keys())
def test_drawing_from_a_law_does_not_change_its_divergence(make):
    """Some keep the probabilities that they have drawn with beside the logits, rounded."""
    p, q = make(), make()
    value = p.sample()
    for divergence in (kl, reverse_kl, jensen_shannon):
        assert (divergence(p, q, value) == 0).all()


def test_the_density_of_a_zero_inflated_count_is_pyros():
    gate = torch.tensor([0.0, 1e-6, 0.3, 0.9], requires_grad=True)
    p, q = (dist.ZeroInflatedPoisson(torch.tensor(rate), gate=gate.detach()) for rate in (2.0, 3.0))
    for value in (torch.zeros(4), torch.full((4,), 3.0)):
        torch.testing.assert_close(kl(p, q, value), p.log_prob(value) - q.log_prob(value))
    found = kl(p, dist.ZeroInflatedPoisson(torch.tensor(3.0), gate=gate), torch.zeros(4)).sum()
    right = -dist.ZeroInflatedPoisson(torch.tensor(3.0), gate=gate).log_prob(torch.zeros(4)).sum()
    for ours, pyros in zip(torch.autograd.grad(found, gate)[0][1:], torch.autograd.grad(right, gate)[0][1:], strict=True):
        torch.testing.assert_close(ours, pyros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_gaussians_over_vectors_have_divergence_0(dtype):
    """Also where the factors' squares do not sum to the dimension, for rounding."""
    pyro.set_rng_seed(0)
    tril = (torch.randn(200, 3, 3, dtype=dtype) * 30).tril(-1) + (3 * torch.randn(200, 3, dtype=dtype)).exp().diag_embed()
    factor, noise, loc = (
        torch.randn(200, 3, 2, dtype=dtype) * 1e3,
        torch.rand(200, 3, dtype=dtype) + 0.1,
        torch.zeros(200, 3, dtype=dtype),
    )
    for make in (
        lambda: dist.MultivariateNormal(loc, scale_tril=tril),
        lambda: dist.LowRankMultivariateNormal(loc, factor, noise),
    ):
        assert (kl(make(), make(), None) == 0).all()
