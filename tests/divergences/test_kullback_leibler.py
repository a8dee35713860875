"""Divergences of densities: closed forms against Monte Carlo, unbiased values and gradients, 0 if p equals q."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_kd.divergences import jensen_shannon, kl, reverse_kl
from tests.support.families import FAMILIES

pytestmark = pytest.mark.usefixtures("float64")

PAIRS = {
    "Normal": lambda: (dist.Normal(0.0, 1.0), dist.Normal(0.7, 1.5)),
    "Normal.to_event": lambda: (dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.Normal(torch.ones(3), 2.0).to_event(1)),
    "MultivariateNormal": lambda: (
        dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, -0.3], [-0.3, 1.5]])),
    ),
    "Bernoulli": lambda: (dist.Bernoulli(torch.tensor(0.3)), dist.Bernoulli(torch.tensor(0.6))),
    "Bernoulli(logits)": lambda: (dist.Bernoulli(logits=torch.tensor(-1.0)), dist.Bernoulli(logits=torch.tensor(0.5))),
    "Categorical": lambda: (dist.Categorical(torch.tensor([0.2, 0.8, 0.0])), dist.Categorical(torch.tensor([0.5, 0.4, 0.1]))),
    "Categorical(logits)": lambda: (dist.Categorical(torch.tensor([0.2, 0.8])), dist.Categorical(logits=torch.tensor([0.5, 0.4]))),
    "OneHotCategorical": lambda: (dist.OneHotCategorical(torch.tensor([0.2, 0.8])), dist.OneHotCategorical(logits=torch.tensor([0.5, 0.4]))),
    "Gamma": lambda: (dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 2.0)),
    "HalfNormal": lambda: (dist.HalfNormal(1.0), dist.HalfNormal(1.5)),
    "LogNormal": lambda: (dist.LogNormal(0.0, 1.0), dist.LogNormal(0.5, 1.5)),
    "Poisson": lambda: (dist.Poisson(torch.tensor(3.0)), dist.Poisson(torch.tensor(4.0))),
    # the registry lacks or fails these
    "FoldedDistribution": lambda: (dist.FoldedDistribution(dist.Normal(0.3, 1.0)), dist.FoldedDistribution(dist.Normal(1.0, 1.5))),
    "Weibull": lambda: (dist.Weibull(1.0, 2.0), dist.Weibull(1.3, 1.7)),
    "StudentT": lambda: (dist.StudentT(5.0), dist.StudentT(5.0, 0.5, 1.2)),
    "Normal, StudentT": lambda: (dist.Normal(0.0, 1.0), dist.StudentT(5.0)),
    "Kumaraswamy": lambda: (dist.Kumaraswamy(2.0, 3.0), dist.Kumaraswamy(2.5, 2.5)),
}  # fmt: skip
each_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
N = 200_000


def rows(pair):
    """The same pair in each of N rows, so that every estimate has draws of its own."""
    return [fn.expand(torch.Size([N])) for fn in pair]


def assert_equal_in_mean(first, second):
    error = math.sqrt(float(first.var() + second.var()) / N)
    assert abs(float(first.mean() - second.mean())) <= 5 * error + 1e-9


@each_pair
def test_kl_equals_its_definition(make):
    p, q = rows(make())
    x = p.sample()
    assert_equal_in_mean(kl(p, q, p.sample()), p.log_prob(x) - q.log_prob(x))


@each_pair
def test_reverse_kl_equals_its_definition(make):
    p, q = rows(make())
    y = q.sample()
    truth = q.log_prob(y) - p.log_prob(y)
    if isinstance(p, dist.Categorical) and bool((p.probs == 0).any()):
        assert reverse_kl(p, q, p.sample()).isinf().all()
    else:
        assert_equal_in_mean(reverse_kl(p, q, p.sample()), truth)


@each_pair
def test_jensen_shannon_equals_its_definition(make):
    p, q = rows(make())

    def log_mixture(value):
        return torch.logaddexp(p.log_prob(value), q.log_prob(value)) - math.log(2)

    x, y = p.sample(), q.sample()
    truth = 0.5 * (p.log_prob(x) - log_mixture(x)) + 0.5 * (q.log_prob(y) - log_mixture(y))
    ours = jensen_shannon(p, q, p.sample())
    assert (ours >= -1e-12).all()
    if isinstance(p, dist.Categorical):  # the estimate lacks the mass of q where p has none
        ours = ours + (q.probs * (p.probs == 0)).sum(-1) * 0.5 * math.log(2)
    assert_equal_in_mean(ours, truth)


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's own Wishart sampler
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.parametrize("divergence", [kl, reverse_kl, jensen_shannon], ids=lambda d: d.__name__)
def test_equal_distributions_have_divergence_0(family, divergence):
    p, q = family(), family()
    value = p.sample()
    try:
        p.log_prob(value)
    except NotImplementedError:
        pytest.skip("the family has no density")
    try:
        result = divergence(p, q, value)
    except NotImplementedError:
        pytest.skip("the density has no value at a draw")
    assert torch.allclose(result, torch.zeros_like(result), atol=1e-9)


@pytest.mark.parametrize("divergence", [kl, reverse_kl, jensen_shannon], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["Poisson", "Weibull", "Bernoulli"])
def test_gradients_are_unbiased(divergence, name):
    """Against finite differences of the exact divergence, from enumeration or quadrature."""
    make, first, second, grid, weight = {
        "Poisson": (dist.Poisson, 3.0, 4.0, torch.arange(60.0), 1.0),
        "Bernoulli": (dist.Bernoulli, 0.3, 0.6, torch.arange(2.0), 1.0),
        "Weibull": (lambda scale: dist.Weibull(scale, 2.0), 1.0, 1.2, torch.linspace(1e-4, 8.0, 40_000), 8.0 / 40_000),
    }[name]
    p = make(torch.tensor(first))

    def exact(value):
        q = make(torch.tensor(value))
        lp, lq = p.log_prob(grid), q.log_prob(grid)
        if divergence is kl:
            return float((lp.exp() * (lp - lq)).sum() * weight)
        if divergence is reverse_kl:
            return float((lq.exp() * (lq - lp)).sum() * weight)
        lm = torch.logaddexp(lp, lq) - math.log(2)
        return float((lp.exp() * (lp - lm) + lq.exp() * (lq - lm)).sum() * weight / 2)

    truth = (exact(second + 1e-4) - exact(second - 1e-4)) / 2e-4
    n = 100_000
    param = torch.full((n,), second).requires_grad_()
    p_many = make(torch.full((n,), first))
    (gradients,) = torch.autograd.grad(divergence(p_many, make(param), p_many.sample()).sum(), param)
    error = gradients.std() / math.sqrt(n)
    assert abs(float(gradients.mean()) - truth) <= 5 * float(error) + 1e-4 * abs(truth)


def test_kl_with_saturated_logits_is_finite_and_accurate():
    """In float32 torch's registry says infinite from a logit of 17 on, though the divergence and its gradient are finite."""
    p = dist.Bernoulli(logits=torch.tensor(0.0, dtype=torch.float32))
    logit = torch.tensor(30.0, dtype=torch.float32, requires_grad=True)
    value = kl(p, dist.Bernoulli(logits=logit), torch.tensor(0.0))
    assert torch.distributions.kl_divergence(p, dist.Bernoulli(logits=logit)).isinf()
    assert value.item() == pytest.approx(15.0 - math.log(2), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logit)
    assert float(gradient) == pytest.approx(0.5, rel=1e-6)
    p = dist.Categorical(logits=torch.zeros(2, dtype=torch.float32))
    q = dist.Categorical(logits=torch.tensor([0.0, -120.0], dtype=torch.float32))
    assert float(kl(p, q, torch.tensor(0))) == pytest.approx(60.0 - math.log(2), rel=1e-6)


def test_kl_with_infinite_logits_of_the_teacher_is_finite():
    """Masked units: the teacher is certain, the divergence finite."""
    p = dist.Bernoulli(logits=torch.tensor([-torch.inf, torch.inf, 0.0]))
    logits = torch.tensor([-5.0, 5.0, -torch.inf], requires_grad=True)
    value = kl(p, dist.Bernoulli(logits=logits), torch.tensor([0.0, 1.0, 1.0]))
    assert torch.allclose(value[:2], torch.nn.functional.softplus(torch.tensor(-5.0)))
    assert value[2] == torch.inf
    (gradient,) = torch.autograd.grad(value[:2].sum(), logits)
    assert gradient.isfinite().all()


def test_kl_of_binomials_with_saturated_logits_is_accurate():
    p, q = (dist.Binomial(5, logits=torch.tensor(x, dtype=torch.float32)) for x in (20.0, 1.0))
    for a, b, la, lb in ((p, q, 20.0, 1.0), (q, p, 1.0, 20.0)):
        single = kl(dist.Bernoulli(logits=torch.tensor(la)), dist.Bernoulli(logits=torch.tensor(lb)), torch.tensor(1.0))
        assert kl(a, b, torch.tensor(1.0)).item() == pytest.approx(5 * single.item(), rel=1e-5)


def test_kl_of_binomials_with_unequal_counts_is_estimated():
    p, q = dist.Binomial(5, torch.tensor(0.3)).expand([N]), dist.Binomial(7, torch.tensor(0.4)).expand([N])
    x = p.sample()
    truth = (p.log_prob(x) - q.log_prob(x)).mean()
    assert kl(p, q, p.sample()).mean().item() == pytest.approx(truth.item(), abs=0.05)


def test_kl_is_estimated_if_the_teacher_lacks_categories():
    p, q = dist.Categorical(torch.tensor([0.5, 0.5])), dist.Categorical(torch.tensor([0.4, 0.4, 0.2]))
    assert kl(p, q, torch.tensor(1)).item() == pytest.approx(math.log(0.5 / 0.4))
    assert not kl.is_exact(p, q)


@pytest.mark.parametrize("divergence", [reverse_kl, jensen_shannon])
def test_divergences_have_finite_limits_where_the_student_has_no_mass(divergence):
    """Both integrands have a finite limit at q = 0, and its gradient must not be NaN."""
    p, logits = dist.Categorical(torch.tensor([0.5, 0.5])), torch.tensor([0.0, -torch.inf])
    value = divergence(p, dist.Categorical(logits=logits), torch.tensor(1))
    limit = {reverse_kl: math.log(2), jensen_shannon: 0.5 * math.log(2)}[divergence]
    assert value.item() == pytest.approx(limit)
    logits = torch.tensor([0.0, -200.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence(p, dist.Categorical(logits=logits), torch.tensor(1)), logits)
    assert gradient.isfinite().all()


def test_parameters_of_equal_transforms_have_a_gradient():
    """The registry's KL between images under equal transforms is that of the bases, without the transforms' parameters."""
    loc, two = torch.tensor(0.0, requires_grad=True), torch.tensor(2.0)

    def image(base, shift):
        return dist.TransformedDistribution(dist.Normal(base, 1.0), [dist.transforms.AffineTransform(shift, two)])

    value = kl(image(1.0, torch.tensor(0.0)), image(0.0, loc), torch.tensor(2.0))
    (gradient,) = torch.autograd.grad(value, loc)
    assert gradient.item() == pytest.approx(-0.5)


def test_kl_is_infinite_where_a_probability_is_zero():
    p = dist.Categorical(torch.tensor([0.5, 0.5]))
    assert kl(p, dist.Categorical(torch.tensor([1.0, 0.0])), torch.tensor(0)).isinf()
    assert kl(dist.Bernoulli(torch.tensor(0.5)), dist.Bernoulli(torch.tensor(1.0)), torch.tensor(0.0)).isinf()


def test_is_exact_is_false_for_estimates():
    normal, folded = dist.Normal(0.0, 1.0), dist.FoldedDistribution(dist.Normal(0.0, 1.0))
    assert kl.is_exact(normal, normal)
    assert not kl.is_exact(folded, folded)
    assert reverse_kl.is_exact(normal, normal)
    assert not jensen_shannon.is_exact(normal, normal)
