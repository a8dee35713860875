"""Closed forms of the KL against 60 digits, at the ends of parameters, in both precisions, with gradients."""

import itertools
from dataclasses import dataclass
from typing import Any

import mpmath as mp
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_kd.divergences import kl, reverse_kl
from tests.support import reference_kl as reference

LOCATIONS = [(0.0, 1e-6), (0.0, 1.0), (1e4, 1e-2), (1e4, 3e-2), (-5.0, 1e6), (0.3, 1.001)]
SCALES = [(1e-6,), (1.0,), (1.001,), (1e6,), (0.3,)]
SHAPES = [1e-3, 1e-2, 0.3, 1.0, 7.0, 1e3, 1.01e3, 1e6, 1.001e6, 1e8]
PROBABILITIES = [0.0, 1e-30, 1e-10, 2e-10, 1e-6, 2e-6, 1e-4, 0.3, 0.3001, 1 - 1e-6, 1.0]
LOGITS = [-200.0, -30.123, -29.0, -1e-3, 0.0, 2.0, 17.0, 31.456, 200.0]
INTERVALS = [(0.0, 1.0), (1e-6, 1.0), (0.25, 0.25 + 2**-20), (0.0, 1e-6), (0.5, 1.0), (1e4, 1e4 + 0.25), (-1.0, 3.0)]
GAMMAS = [(a, b) for a in SHAPES for b in (1e-4, 1.0)] + [(1e6, 1e6), (1.001e6, 1e6)]
BETAS = list(itertools.product([1e-3, 0.5, 1.0, 1e3, 1.01e3, 1e6, 1.001e6], repeat=2))
SIMPLEX = [(0.2, 0.8, 0.0), (1e-10, 0.5, 0.5), (3e-10, 0.5, 0.5), (1.0, 0.0, 0.0), (0.3, 0.3, 0.4), (1e-30, 1e-20, 1.0)]
PARETOS = [(1e-3, 0.5), (1.0, 1e-3), (1.0, 2.5), (1.001, 2.5), (1.0, 1e6), (1e6, 1.00001e6)]


@dataclass(frozen=True)
class Case:
    """Laws of p and of q, made from tuples of numbers, and the reference of both tuples."""

    p: Any
    q: Any
    reference: Any
    ps: list[tuple[Any, ...]]
    qs: list[tuple[Any, ...]]


def same(family, formula, grid):
    return Case(family, family, formula, grid, grid)


def one_by_one(values):
    return [(value,) for value in values]


def cross(p, q, ps, qs):
    return Case(getattr(dist, p), getattr(dist, q), reference.cross(p, q), ps, qs)


GRIDS = {
    "Exponential": one_by_one([1e-6, 1.0, 1.001, 1e6]),
    "Gamma": [*GAMMAS[::3], (1e6, 1e6)],
    "Beta": BETAS[::4],
    "ContinuousBernoulli": one_by_one([1e-6, 1e-3, 0.3, 0.4995, 0.5, 0.999, 0.999999]),
    "Gumbel": LOCATIONS,
    "Laplace": LOCATIONS,
    "Normal": LOCATIONS,
    "Pareto": PARETOS,
    "Uniform": INTERVALS,
}
PAIRS = [
    ("Beta", ["ContinuousBernoulli", "Exponential", "Gamma", "Normal", "Uniform", "Pareto"]),
    ("ContinuousBernoulli", ["Exponential", "Normal", "Uniform", "Pareto"]),
    ("Exponential", ["Gamma", "Gumbel", "Normal", "Beta", "ContinuousBernoulli", "Pareto", "Uniform"]),
    ("Gamma", ["Exponential", "Gumbel", "Normal", "Beta", "ContinuousBernoulli", "Pareto", "Uniform"]),
    ("Gumbel", ["Normal", "Beta", "ContinuousBernoulli", "Exponential", "Gamma", "Pareto", "Uniform"]),
    ("Laplace", ["Normal", "Beta", "ContinuousBernoulli", "Exponential", "Gamma", "Pareto", "Uniform"]),
    ("Normal", ["Gumbel", "Laplace", "Beta", "ContinuousBernoulli", "Exponential", "Gamma", "Pareto", "Uniform"]),
    ("Pareto", ["Exponential", "Gamma", "Normal", "Beta", "ContinuousBernoulli", "Uniform"]),
    ("Uniform", ["Beta", "ContinuousBernoulli", "Exponential", "Gamma", "Gumbel", "Normal", "Pareto"]),
]  # fmt: skip
CASES = {
    "Bernoulli": same(dist.Bernoulli, reference.binary, one_by_one(PROBABILITIES)),
    "Bernoulli(logits)": same(lambda x: dist.Bernoulli(logits=x), lambda p, q: reference.binary(*map(reference.sigmoid, (p, q))), one_by_one(LOGITS)),
    "Bernoulli, logits and probs": Case(dist.Bernoulli, lambda x: dist.Bernoulli(logits=x), lambda p, q: reference.binary(p, reference.sigmoid(q)), one_by_one(PROBABILITIES), one_by_one(LOGITS)),
    "Binomial": same(lambda p: dist.Binomial(1000, p), lambda p, q: 1000 * reference.binary(p, q), one_by_one(PROBABILITIES)),
    "Geometric": same(dist.Geometric, reference.geometric, one_by_one(PROBABILITIES[1:])),
    "Geometric(logits)": same(lambda x: dist.Geometric(logits=x), lambda p, q: reference.geometric(*map(reference.sigmoid, (p, q))), one_by_one(LOGITS[1:-2])),
    "Categorical": same(dist.Categorical, reference.categorical, one_by_one(SIMPLEX)),
    "OneHotCategorical": same(dist.OneHotCategorical, reference.categorical, one_by_one(SIMPLEX)),
    "Categorical(logits)": same(lambda x: dist.Categorical(logits=x), lambda p, q: reference.categorical(*[[mp.exp(x) for x in row] for row in (p, q)]), one_by_one([(0.0, -80.0, 1.0), (50.0, 50.001, -30.0), (0.0, 0.0, 0.0)])),
    "Poisson": same(dist.Poisson, reference.poisson, one_by_one([0.0, 1e-10, 1e-3, 1.0, 1e3, 1.01e3, 1e6, 1.001e6, 1e9])),
    "Bernoulli, Poisson": Case(dist.Bernoulli, dist.Poisson, lambda p, r: reference.times_log(p, p) + reference.times_log(1 - p, 1 - p) - reference.times_log(p, r) + r, one_by_one(PROBABILITIES), one_by_one([1e-6, 1.0, 1e6])),
    "Normal": same(dist.Normal, reference.normal, LOCATIONS),
    "HalfNormal": same(dist.HalfNormal, lambda s, t: reference.normal(0, s, 0, t), SCALES),
    "LogNormal": same(dist.LogNormal, reference.normal, LOCATIONS),
    "Laplace": same(dist.Laplace, reference.laplace, LOCATIONS),
    "Cauchy": same(dist.Cauchy, reference.cauchy, LOCATIONS),
    "HalfCauchy": same(dist.HalfCauchy, lambda s, t: reference.cauchy(0, s, 0, t), SCALES),
    "Gumbel": same(dist.Gumbel, reference.gumbel, [(0.0, 1.0), (1e4, 1e2), (1e4, 1.01e2), (0.3, 1.001), (-1.0, 0.1)]),
    "Weibull": same(lambda k, a: dist.Weibull(a, k), reference.weibull, [(0.05, 1.0), (1.0, 1.0), (1.001, 1e4), (20.0, 1.001), (1e3, 1.0)]),
    "VonMises": same(dist.VonMises, reference.von_mises, [(0.0, 1e-6), (3.0, 1.0), (-3.0, 300.0), (-3.001, 301.0), (1.0, 1e4)]),
    "Exponential": same(dist.Exponential, lambda p, q: q / p - 1 - mp.log(q / p), GRIDS["Exponential"]),
    "Gamma": same(dist.Gamma, reference.gamma, GAMMAS),
    "InverseGamma": same(dist.InverseGamma, reference.gamma, GAMMAS[::2]),
    "Chi2": same(dist.Chi2, lambda p, q: reference.gamma(p / 2, mp.mpf("0.5"), q / 2, mp.mpf("0.5")), one_by_one(SHAPES)),
    "Beta": same(dist.Beta, lambda a, b, c, d: reference.dirichlet((a, b), (c, d)), BETAS),
    "Dirichlet": same(dist.Dirichlet, reference.dirichlet, one_by_one([(1e-3, 1e-3, 1e-3), (1e-3, 1.0, 1e6), (1e3, 2e3, 1e3), (1.01e3, 2.02e3, 1.01e3), (1e6, 2e6, 1e6), (1.01e6, 2.02e6, 1.01e6), (1e8, 1e8, 1.0)])),
    "ContinuousBernoulli": same(dist.ContinuousBernoulli, reference.continuous_bernoulli, GRIDS["ContinuousBernoulli"]),
    "ContinuousBernoulli(logits)": same(lambda x: dist.ContinuousBernoulli(logits=x), lambda p, q: reference.continuous_bernoulli(*map(reference.sigmoid, (p, q))), one_by_one([-60.0, -1e-3, 0.0, 0.29, 0.31, 30.0])),
    "Uniform": same(dist.Uniform, reference.uniform, INTERVALS),
    "Pareto": same(dist.Pareto, reference.pareto, PARETOS),
    **{f"{p}, {q}": cross(p, q, GRIDS[p], GRIDS[q]) for p, qs in PAIRS for q in qs},
}  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def tensors(tuples, dtype):
    """One tensor for each parameter, over all tuples."""
    return [torch.tensor(values, dtype=dtype) for values in zip(*tuples, strict=True)]


def points(case, most=80):
    """Pairs of parameters: all, or a regular choice of them."""
    grid = list(itertools.product(case.ps, case.qs))
    return grid[:: -(-len(grid) // most)]


def exact(tensor):
    return tuple(mp.mpf(x) for x in tensor.tolist()) if tensor.dim() else mp.mpf(float(tensor))


def assert_close(found, right, limit, where):
    if abs(right) > limit:  # out of the dtype's range
        assert abs(found) > limit / 10, (where, found, mp.nstr(right))
    else:
        assert abs(found - right) <= 1e-3 * abs(right) + 1e-6, (where, found, mp.nstr(right))


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kl_is_accurate_at_the_ends_of_the_parameters(case, dtype):
    grid = points(case)
    ps, qs = tensors([p for p, _ in grid], dtype), [t.requires_grad_() for t in tensors([q for _, q in grid], dtype)]
    p, q = case.p(*ps), case.q(*qs)
    assert kl.is_exact(p, q)
    values = kl(p, q, None)
    assert values.dtype == dtype
    assert values.shape == (len(grid),)
    gradients = torch.autograd.grad(values[values.isfinite()].sum(), qs) if values.isfinite().any() else None
    limit = torch.finfo(dtype).max / 1e3
    with mp.workdps(120):
        for index in range(len(grid)):
            params = [exact(t[index]) for t in (*ps, *[t.detach() for t in qs])]
            right = case.reference(*params)
            assert_close(float(values[index].detach()), right, limit, grid[index])
            if gradients is None or index % 4 or not mp.isfinite(right) or abs(right) > limit:
                continue
            for number, gradient in enumerate(gradients):
                slope = differentiate(case.reference, params, len(ps) + number)
                for found, wanted in zip(gradient[index].reshape(-1).tolist(), slope, strict=True):
                    if wanted is not None:
                        assert abs(found - wanted) <= 2e-3 * abs(wanted) + 1e-5 * scale_of(
                            params, len(ps) + number, right
                        ), (grid[index], number, found, mp.nstr(wanted))


def scale_of(params, index, value):
    """A change of the KL by 1e-6 of what it is made of, a unit of the parameter: what is lost where terms of that size cancel."""
    entries = params[index] if isinstance(params[index], tuple) else (params[index],)
    smallest = min((abs(x) for x in entries if x != 0), default=mp.mpf(1))
    return max(1, abs(value)) * max(1, 1 / smallest)


def differentiate(formula, params, index):
    """The derivative with respect to each number of a parameter; None where the formula ends there."""
    entries = params[index] if isinstance(params[index], tuple) else (params[index],)
    found = []
    for place, entry in enumerate(entries):
        step = abs(entry) * mp.mpf(10) ** -20 or mp.mpf(10) ** -20

        def moved(delta):
            changed = list(params)
            new = [x + (delta if i == place else 0) for i, x in enumerate(entries)]
            changed[index] = tuple(new) if isinstance(params[index], tuple) else new[0]
            return formula(*changed)

        try:
            up, down = moved(step), moved(-step)
            is_inside = mp.isfinite(up) and mp.isfinite(down) and not isinstance(up, mp.mpc) and not isinstance(down, mp.mpc)
            found.append((up - down) / (2 * step) if is_inside else None)
        except (ValueError, ZeroDivisionError):
            found.append(None)
    return found


MODERATE = {
    "Exponential": (1.5,), "Gamma": (2.5, 1.5), "Beta": (2.5, 1.7), "ContinuousBernoulli": (0.3,), "Gumbel": (0.3, 1.2),
    "Laplace": (0.4, 0.7), "Normal": (0.2, 1.1), "Pareto": (0.6, 3.5), "Uniform": (0.2, 0.9),
    "Cauchy": (0.2, 1.1), "Weibull": (1.5, 0.8), "VonMises": (0.4, 2.0),
}  # fmt: skip
OTHER = MODERATE | {
    "Exponential": (0.7,), "Gamma": (1.2, 0.8), "Beta": (1.5, 2.1), "ContinuousBernoulli": (0.8,), "Gumbel": (-0.2, 0.9), "Laplace": (0.1, 1.3),
    "Normal": (-0.4, 0.8), "Pareto": (0.1, 2.5), "Uniform": (-0.1, 1.4), "Cauchy": (-0.3, 0.6), "Weibull": (1.1, 1.3), "VonMises": (-0.6, 1.1),
}  # fmt: skip
FORMULAS = {
    ("Gamma", "Gamma"): reference.gamma, ("Gumbel", "Gumbel"): reference.gumbel, ("Laplace", "Laplace"): reference.laplace,
    ("Normal", "Normal"): reference.normal, ("Pareto", "Pareto"): reference.pareto, ("Uniform", "Uniform"): reference.uniform,
    ("Cauchy", "Cauchy"): reference.cauchy, ("Weibull", "Weibull"): reference.weibull, ("VonMises", "VonMises"): reference.von_mises,
    ("ContinuousBernoulli", "ContinuousBernoulli"): reference.continuous_bernoulli,
    ("Beta", "Beta"): lambda a, b, c, d: reference.dirichlet((a, b), (c, d)),
    **{(p, q): reference.cross(p, q) for p, qs in PAIRS for q in qs},
}  # fmt: skip


@pytest.mark.parametrize("pair", FORMULAS, ids=", ".join)
def test_the_reference_agrees_with_the_definition(pair):
    """At moderate parameters, where quadrature is good."""
    with mp.workdps(20):
        ps, qs = ([mp.mpf(x) for x in table[family]] for table, family in zip((MODERATE, OTHER), pair, strict=True))
        right = FORMULAS[pair](*ps, *qs)
        if mp.isfinite(right):
            assert abs(right - reference.by_quadrature(pair[0], ps, pair[1], qs)) < 1e-7


# Gaussians over vectors.


def gaussians(dtype):
    """Laws, each with its mean and covariance as nested tuples of the numbers that it is made of."""
    loc, tril = (
        torch.tensor([1.0, -2.0, 0.5], dtype=dtype),
        torch.tensor([[1e3, 0, 0], [5.0, 1.0, 0], [0.3, -0.2, 1e-3]], dtype=dtype),
    )
    std, factor = (
        torch.tensor([1e-3, 1.0, 1e3], dtype=dtype),
        torch.tensor([[1.0, 0.0], [3.0, 1e3], [0.0, 1e-3]], dtype=dtype),
    )
    small = torch.tensor([1e-6, 1e-6, 1e-4], dtype=dtype)

    def low_rank(moved, diagonal):
        matrix, noise = exact_matrix(factor), [mp.mpf(x) for x in diagonal.tolist()]
        return dist.LowRankMultivariateNormal(loc + moved, factor, diagonal), loc + moved, matrix * matrix.T + mp.diag(noise)

    def full(moved, scale):
        matrix = exact_matrix(tril * scale)
        return dist.MultivariateNormal(loc + moved, scale_tril=tril * scale), loc + moved, matrix * matrix.T

    def diagonal(moved, scale):
        deviations = [mp.mpf(x) ** 2 for x in (std * scale).tolist()]
        return dist.Normal(loc + moved, std * scale).to_event(1), loc + moved, mp.diag(deviations)

    return [
        full(0.0, 1.0),
        full(1e-3, 1.001),
        diagonal(0.0, 1.0),
        diagonal(0.1, 1.001),
        low_rank(0.0, std),
        low_rank(0.0, small),
        low_rank(0.1, small * 2),
    ]


def exact_matrix(tensor):
    return mp.matrix([[mp.mpf(x) for x in row] for row in tensor.tolist()])


@DTYPES
def test_kl_of_gaussians_is_accurate_at_the_ends_of_the_parameters(dtype):
    with mp.workdps(60):
        for (p, loc_p, cov_p), (q, loc_q, cov_q) in itertools.product(gaussians(dtype), repeat=2):
            right = reference.multivariate_normal(list(exact(loc_p)), cov_p, list(exact(loc_q)), cov_q)
            value = kl(p, q, None)
            assert value.dtype == dtype
            assert_close(float(value), right, torch.finfo(dtype).max / 1e3, (p, q))


def test_kl_of_zero_inflated_densities_agrees_with_the_formula():
    """A point mass at 0 and a density: the base's density at 0 has no part in it."""
    p, q = (
        dist.ZeroInflatedDistribution(dist.Gamma(a, torch.tensor(1.0)), gate=g)
        for a, g in ((torch.tensor(2.0), torch.tensor(0.3)), (torch.tensor(3.0), torch.tensor(0.5)))
    )
    right = reference.binary(mp.mpf(0.3), mp.mpf(0.5)) + 0.7 * reference.gamma(2, 1, 3, 1)
    assert kl(p, q, None).item() == pytest.approx(float(right), rel=1e-5)


READ = ("Binomial", "InverseGamma")
"""Whether counts are equal, or the exponents of torch's transforms, is read; the library's own capture verifies that in each call."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in READ])
def test_closed_forms_have_no_branch_on_values(name):
    """A graph made at one point of the grid holds at the others."""
    case = CASES[name]
    grid = points(case)
    ps, qs = tensors([p for p, _ in grid], torch.float64), tensors([q for _, q in grid], torch.float64)

    def value(*params):
        return kl(case.p(*params[: len(ps)]), case.q(*params[len(ps) :]), None)

    with pyro.validation_enabled(False):
        graph = make_fx(value)(*[t[:1].expand_as(t) for t in (*ps, *qs)])
        torch.testing.assert_close(graph(*ps, *qs), value(*ps, *qs))


def test_the_reverse_divergence_has_the_gradient_of_both_arguments():
    p = dist.Gamma(torch.tensor(2.0), torch.tensor(1.0))
    a = torch.tensor(3.0, requires_grad=True)
    value = reverse_kl(p, dist.Gamma(a, torch.tensor(1.0)), None)
    (gradient,) = torch.autograd.grad(value, a)
    with mp.workdps(30):
        right = mp.diff(lambda x: reference.gamma(x, 1, 2, 1), 3)
    assert gradient.item() == pytest.approx(float(right), rel=1e-5)
