"""Every family of pyro.distributions whose noise can be shared, as named factories with the parameters to vary.

A case makes its distribution from tensors, so that tests can shift and differentiate them. ``gradient`` says what autograd
gives through ``rsample`` at frozen noise: the derivative of the value, an estimator by design ("straight-through"), or
nothing where the family has no ``rsample``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    name: str
    make: Callable[..., Any]
    params: tuple[list[Any], ...]
    gradient: str = "exact"
    discrete: bool = False
    atol: float = 1e-6
    reference: Callable[[Any, int], Tensor] | None = None  # n independent draws; None: by the family's own sampler
    size: int = 50_000  # of the samples that are compared
    ordered: bool = False  # discrete values that are counts
    batched: bool = True  # log_prob takes many values at once

    def tensors(self) -> list[Tensor]:
        return [torch.tensor(value, dtype=torch.float64) for value in self.params]

    def __call__(self) -> Any:
        return self.make(*self.tensors())

    def draws(self, n: int) -> Tensor:
        """Independent draws from the law, without pyro_kd."""
        return self()(torch.Size([n])) if self.reference is None else self.reference(self(), n)


def _case(name, make, *params, **options):
    return Family(name, make, params, **options)


def _simplex(x):
    return x / x.sum(-1, keepdim=True)


def _on_torus(fn, n, grid=400):
    """Draws of two angles by their density on a grid."""
    angle = (torch.arange(grid, dtype=torch.float64) + 0.5) * (2 * math.pi / grid) - math.pi
    points = torch.cartesian_prod(angle, angle)
    which = torch.multinomial(fn.log_prob(points).exp(), n, replacement=True)
    return points[which] + (torch.rand(n, 2, dtype=torch.float64) - 0.5) * (2 * math.pi / grid)


def _trees(fn, n):
    """Spanning trees by enumeration."""
    trees = fn.enumerate_support()
    return trees[torch.multinomial(fn.log_prob(trees).exp(), n, replacement=True)]


CHOLESKY = [[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 1.2]]
GAMMA_ACCURACY = 5e-4  # of torch's own implicit derivative, see test_the_gamma_derivative_is_that_of_torch

CONTINUOUS = [
    _case("AffineBeta", lambda a, b: dist.AffineBeta(a, b, 2.0, 3.0), [2.0, 0.7], [3.0, 0.8], atol=GAMMA_ACCURACY),
    _case("AsymmetricLaplace", dist.AsymmetricLaplace, [0.5, -1.0], [1.0, 2.0], [2.0, 0.5]),
    _case("AVFMultivariateNormal", lambda m, s: dist.AVFMultivariateNormal(m, s.tril(), torch.zeros(2, 1, 3)), [1.0, 2.0, -1.0], CHOLESKY),
    _case("Beta", dist.Beta, [2.0, 0.3], [3.0, 0.6], atol=GAMMA_ACCURACY),
    _case("Cauchy", dist.Cauchy, [0.5, -1.0], [1.0, 2.0]),
    _case("Chi2", dist.Chi2, [3.0, 0.8], atol=GAMMA_ACCURACY),
    _case("ContinuousBernoulli", dist.ContinuousBernoulli, [0.3, 0.8]),
    _case("Dirichlet", dist.Dirichlet, [[2.0, 1.0, 0.5], [0.2, 0.3, 4.0]], atol=GAMMA_ACCURACY),
    _case("Exponential", dist.Exponential, [1.0, 3.0]),
    _case("FisherSnedecor", dist.FisherSnedecor, [3.0, 6.0], [5.0, 7.0], atol=GAMMA_ACCURACY),
    _case("FoldedDistribution", lambda m, s: dist.FoldedDistribution(dist.Normal(m, s)), [0.5, -1.0], [1.0, 2.0]),
    _case("Gamma", dist.Gamma, [2.0, 0.4], [1.0, 3.0], atol=GAMMA_ACCURACY),
    _case("GaussianHMM", lambda m, f: _gaussian_hmm(m, f), [0.5, -0.5], [[0.9, 0.1], [-0.2, 0.7]]),
    _case("GeneralizedPareto", dist.GeneralizedPareto, [0.0, 1.0], [1.0, 2.0], [0.2, 0.3]),
    _case("Gumbel", dist.Gumbel, [0.5, -1.0], [1.0, 2.0]),
    _case("HalfCauchy", dist.HalfCauchy, [1.0, 2.0]),
    _case("HalfNormal", dist.HalfNormal, [1.0, 2.0]),
    _case("Independent", lambda m, s: dist.Normal(m, s).to_event(1), [0.5, -1.0], [1.0, 2.0]),
    _case("InverseGamma", dist.InverseGamma, [3.0, 1.5], [1.0, 3.0], atol=GAMMA_ACCURACY),
    _case("Kumaraswamy", dist.Kumaraswamy, [2.0, 0.7], [3.0, 0.8]),
    _case("Laplace", dist.Laplace, [0.5, -1.0], [1.0, 2.0]),
    _case("LinearHMM", lambda m, f: _linear_hmm(m, f), [0.5, -0.5], [[0.9, 0.1], [-0.2, 0.7]]),
    _case("Logistic", dist.Logistic, [0.5, -1.0], [1.0, 2.0]),
    _case("LogisticNormal", dist.LogisticNormal, [0.5, -1.0], [1.0, 2.0]),
    _case("LogNormal", dist.LogNormal, [0.5, -1.0], [1.0, 0.5]),
    _case("LowRankMultivariateNormal", dist.LowRankMultivariateNormal, [1.0, 2.0, -1.0], [[1.0], [0.5], [2.0]], [1.0, 0.5, 2.0]),
    _case("MaskedDistribution", lambda m, s: dist.Normal(m, s).mask(torch.tensor([True, False])), [0.5, -1.0], [1.0, 2.0]),
    _case("MaskedMixture", lambda m, s: dist.MaskedMixture(torch.tensor([True, False]), dist.Normal(m, s), dist.Normal(s, 1.0)), [0.5, -1.0], [1.0, 2.0]),
    _case("MultivariateNormal", lambda m, s: dist.MultivariateNormal(m, scale_tril=s.tril()), [1.0, 2.0, -1.0], CHOLESKY),
    _case("MultivariateStudentT", lambda d, m, s: dist.MultivariateStudentT(d, m, s.tril()), 4.0, [1.0, 2.0, -1.0], CHOLESKY, atol=GAMMA_ACCURACY),
    _case("NanMaskedMultivariateNormal", lambda m, s: dist.NanMaskedMultivariateNormal(m, scale_tril=s.tril()), [1.0, 2.0, -1.0], CHOLESKY),
    _case("NanMaskedNormal", dist.NanMaskedNormal, [0.5, -1.0], [1.0, 2.0]),
    _case("Normal", dist.Normal, [0.5, -1.0], [1.0, 2.0]),
    _case("OMTMultivariateNormal", lambda m, s: dist.OMTMultivariateNormal(m, s.tril()), [1.0, 2.0, -1.0], CHOLESKY),
    _case("Pareto", dist.Pareto, [1.0, 2.0], [3.0, 4.0]),
    _case("ProjectedNormal", dist.ProjectedNormal, [[1.0, 2.0], [-1.0, 0.5]]),
    _case("IndependentHMM", lambda m, f: dist.IndependentHMM(_scalar_hmm(m, f)), [0.5, -0.5], [0.9, 0.4]),
    _case("Rejector", lambda m: _skew_normal(m), [0.3, 0.8]),
    _case("RelaxedBernoulli", lambda t, p: dist.RelaxedBernoulli(t, p), 0.7, [0.3, 0.6]),
    _case("RelaxedOneHotCategorical", lambda t, p: dist.RelaxedOneHotCategorical(t, _simplex(p)), 0.7, [0.3, 0.6, 0.5]),
    _case("SkewLogistic", dist.SkewLogistic, [0.5, -1.0], [1.0, 2.0], [2.0, 0.5]),
    _case("SoftAsymmetricLaplace", dist.SoftAsymmetricLaplace, [0.5, -1.0], [1.0, 2.0], [2.0, 0.5], [1.0, 0.7]),
    _case("SoftLaplace", dist.SoftLaplace, [0.5, -1.0], [1.0, 2.0]),
    _case("Stable", dist.Stable, [1.5, 0.8], [0.3, -0.5], [1.0, 2.0], [0.5, -1.0]),
    _case("StableWithLogProb", dist.StableWithLogProb, [1.5, 0.8], [0.3, -0.5], [1.0, 2.0], [0.5, -1.0]),
    _case("StudentT", dist.StudentT, [4.0, 3.0], [0.5, -1.0], [1.0, 2.0], atol=GAMMA_ACCURACY),
    _case("TransformedDistribution", lambda m, s: dist.TransformedDistribution(dist.Normal(m, s), dist.transforms.ExpTransform()), [0.5, -1.0], [1.0, 0.5]),
    _case("Uniform", dist.Uniform, [0.5, -1.0], [1.0, 2.0]),
    _case("Weibull", dist.Weibull, [1.0, 2.0], [1.5, 0.7]),
    _case("Wishart", lambda d, s: dist.Wishart(d, scale_tril=s.tril()), 4.5, CHOLESKY, atol=GAMMA_ACCURACY),
    # continuous, without rsample
    _case("VonMises", dist.VonMises, [0.5, -3.0], [2.0, 0.1], gradient="none"),
    _case("VonMises(concentrated)", dist.VonMises, [0.5, -3.0], [200.0, 1e4], gradient="none"),
    _case("SineSkewed", lambda m, c, s: dist.SineSkewed(dist.VonMises(m, c).to_event(1), s), [0.5, -1.0], [2.0, 0.7], [0.3, -0.6], gradient="none"),
    _case("SineBivariateVonMises", lambda m, c, r: dist.SineBivariateVonMises(m[0], m[1], c[0], c[1], r), [0.3, -0.5], [2.0, 3.0], 1.5, gradient="none", reference=_on_torus),
    _case("SineBivariateVonMises(concentrated)", lambda m, c, r: dist.SineBivariateVonMises(m[0], m[1], c[0], c[1], r), [0.3, -0.5], [20.0, 30.0], -15.0, gradient="none", reference=_on_torus),
    _case("CoalescentTimes", lambda t: dist.CoalescentTimes(t), [0.0, 0.5, 0.7], gradient="none"),
    _case("LKJ", lambda c: dist.LKJ(3, c), 1.5, gradient="none"),
    _case("LKJCholesky", lambda c: dist.LKJCholesky(3, c), 1.5, gradient="none"),
    _case("MixtureSameFamily", lambda p, m: dist.MixtureSameFamily(dist.Categorical(_simplex(p)), dist.Normal(m, 1.0)), [0.3, 0.6], [-1.0, 2.0], gradient="none"),
    _case("GaussianScaleMixture", dist.GaussianScaleMixture, [1.0, 0.5, 2.0], [0.3, -0.3], [0.5, 2.0], gradient="none"),
    _case("MixtureOfDiagNormals", dist.MixtureOfDiagNormals, [[0.0, 1.0], [3.0, -2.0]], [[1.0, 0.5], [0.3, 2.0]], [0.3, -0.3], gradient="none"),
    _case("MixtureOfDiagNormalsSharedCovariance", dist.MixtureOfDiagNormalsSharedCovariance, [[0.0, 1.0], [3.0, -2.0]], [1.0, 0.5], [0.3, -0.3], gradient="none"),
    _case("TruncatedPolyaGamma", dist.TruncatedPolyaGamma, [1.0, 2.0], gradient="none"),
]  # fmt: skip

DISCRETE = [
    _case("Bernoulli", dist.Bernoulli, [0.3, 0.9]),
    _case("Bernoulli(logits)", lambda x: dist.Bernoulli(logits=x), [-1.0, 3.0]),
    _case("BetaBinomial", lambda a, b: dist.BetaBinomial(a, b, 10), [2.0, 0.7], [3.0, 0.5], ordered=True),
    _case("Binomial", lambda p: dist.Binomial(10, p), [0.3, 0.9], ordered=True),
    _case("Categorical", lambda p: dist.Categorical(_simplex(p)), [[0.3, 0.6, 0.1], [1.0, 0.0, 3.0]]),
    _case("Categorical(logits)", lambda x: dist.Categorical(logits=x), [0.3, -1.0, 2.0]),
    _case("DirichletMultinomial", lambda c: dist.DirichletMultinomial(c, 6), [1.0, 0.5, 2.0]),
    _case("DiscreteHMM", lambda x: dist.DiscreteHMM(x, torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=x.dtype, device=x.device), dist.Categorical(logits=torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=x.dtype, device=x.device)), duration=4), [0.3, -1.0]),
    _case("Empirical", lambda w: dist.Empirical(torch.tensor([0.1, 0.5, 0.7], dtype=w.dtype, device=w.device), w), [0.0, 1.0, -1.0], batched=False),
    _case("ExtendedBetaBinomial", lambda a, b: dist.ExtendedBetaBinomial(a, b, 10), [2.0, 0.7], [3.0, 0.5], ordered=True),
    _case("ExtendedBinomial", lambda p: dist.ExtendedBinomial(torch.tensor(10.0, dtype=p.dtype, device=p.device), p), [0.3, 0.9], ordered=True),
    _case("GammaPoisson", dist.GammaPoisson, [2.0, 0.7], [1.0, 0.5], ordered=True),
    _case("Geometric", dist.Geometric, [0.3, 0.6], ordered=True),
    _case("Multinomial", lambda p: dist.Multinomial(6, _simplex(p)), [0.3, 0.6, 0.1]),
    _case("NegativeBinomial", lambda p: dist.NegativeBinomial(5.0, p), [0.3, 0.6], ordered=True),
    _case("OneHotCategorical", lambda p: dist.OneHotCategorical(_simplex(p)), [0.3, 0.6, 0.1]),
    _case("OneHotCategoricalStraightThrough", lambda p: dist.OneHotCategoricalStraightThrough(_simplex(p)), [0.3, 0.6, 0.1], gradient="straight-through"),
    _case("OneOneMatching", dist.OneOneMatching, [[0.3, -1.0, 0.2], [1.0, 0.0, -0.5], [0.4, 0.1, 2.0]]),
    _case("OneTwoMatching", dist.OneTwoMatching, [[0.3, -1.0], [1.0, 0.0], [0.4, 0.1], [-0.2, 0.6]]),
    _case("SpanningTree", dist.SpanningTree, [0.3, -1.0, 0.2, 1.0, 0.0, -0.5], reference=_trees, size=2000, batched=False),
    _case("OrderedLogistic", lambda x: dist.OrderedLogistic(x, torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device)), [0.3, -0.4]),
    _case("Poisson", dist.Poisson, [0.5, 20.0], ordered=True),
    _case("RelaxedBernoulliStraightThrough", lambda t, p: dist.RelaxedBernoulliStraightThrough(t, p), 0.7, [0.3, 0.6], gradient="straight-through"),
    _case("RelaxedOneHotCategoricalStraightThrough", lambda t, p: dist.RelaxedOneHotCategoricalStraightThrough(t, _simplex(p)), 0.7, [0.3, 0.6, 0.5], gradient="straight-through"),
    _case("ZeroInflatedNegativeBinomial", lambda p, g: dist.ZeroInflatedNegativeBinomial(5.0, probs=p, gate=g), [0.3, 0.6], [0.2, 0.5], ordered=True),
    _case("ZeroInflatedPoisson", lambda r, g: dist.ZeroInflatedPoisson(r, gate=g), [0.5, 20.0], [0.2, 0.5], ordered=True),
    _case("ZeroInflatedDistribution", lambda r, g: dist.ZeroInflatedDistribution(dist.Poisson(r), gate=g), [0.5, 20.0], [0.2, 0.5], ordered=True),
]  # fmt: skip
DISCRETE = [
    replace(family, gradient="none" if family.gradient == "exact" else family.gradient, discrete=True) for family in DISCRETE
]

FAMILIES = {family.name: family for family in CONTINUOUS + DISCRETE}


def _gaussian_hmm(mean, transition):
    one = torch.eye(2, dtype=mean.dtype)
    normal = dist.MultivariateNormal(mean, one)
    return dist.GaussianHMM(normal, transition, normal, one, normal, duration=3)


def _linear_hmm(mean, transition):
    one = torch.eye(2, dtype=mean.dtype)
    normal = dist.Normal(mean, torch.ones_like(mean)).to_event(1)
    return dist.LinearHMM(normal, transition, normal, one, normal, duration=3)


def _scalar_hmm(mean, transition):
    one = torch.ones(1, 1, dtype=mean.dtype)
    initial = dist.Normal(mean.unsqueeze(-1), torch.ones_like(mean).unsqueeze(-1)).to_event(1)
    noise = dist.Normal(torch.zeros_like(one), one).to_event(1)
    return dist.GaussianHMM(initial, transition.reshape(2, 1, 1, 1), noise, one, noise, duration=3)


def _skew_normal(loc):
    """Density 2 N(x; loc, 1) sigmoid(x - loc), by rejection from a normal."""
    return dist.Rejector(dist.Normal(loc, 1.0), lambda x: torch.nn.functional.logsigmoid(x - loc), torch.tensor(0.5).log())


_NORMAL = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
WITHOUT_SAMPLER = {
    "CoalescentTimesWithRate": lambda: dist.CoalescentTimesWithRate(torch.tensor([0.0, 0.5]), torch.ones(2)),
    "GammaGaussianHMM": lambda: dist.GammaGaussianHMM(dist.Gamma(2.0, 1.0), _NORMAL, torch.eye(2), _NORMAL, torch.eye(2), _NORMAL, duration=2),
    "GaussianMRF": lambda: dist.GaussianMRF(dist.MultivariateNormal(torch.zeros(1), torch.eye(1)), _NORMAL, _NORMAL),
    "GroupedNormalNormal": lambda: dist.GroupedNormalNormal(torch.zeros(2), torch.ones(2), torch.ones(3), torch.tensor([0, 1, 1])),
    "ImproperUniform": lambda: dist.ImproperUniform(dist.constraints.real, (), ()),
    "LogNormalNegativeBinomial": lambda: dist.LogNormalNegativeBinomial(torch.tensor(5.0), torch.tensor(0.0), torch.tensor(0.3)),
    "VonMises3D": lambda: dist.VonMises3D(torch.tensor([1.0, 0.0, 0.0])),
}  # fmt: skip
