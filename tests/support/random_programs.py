"""Random Pyro programs as plain data: what tests/integration/test_random_programs.py tries the laws of the library on.

A :class:`Recipe` says which sites a program has, in which plates and loops, with which parents, masks and scales. It is a
frozen dataclass whose ``repr`` is the code that makes it, so that a failure can be pasted into a list. :func:`recipes` is the
Hypothesis strategy that draws one, :func:`tables` the numbers that its parameters have (a different seed makes the student), and
:func:`program` the interpreter that turns both into a Pyro model. All of this is in one file because the strategy, the
interpreter and the table of families must agree on every field of a recipe: a field that one of them does not know is not tested.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor
from torch.nn.functional import softplus

from tests.support.families import GAMMA_ACCURACY

# Families: a distribution from unconstrained tensors, so that any sum of features of its parents will do.


@dataclass(frozen=True)
class Kind:
    """A family of distributions with batch shape (any) and what the laws must know of it.

    Attributes:
        make: from unconstrained tensors, one for each entry of ``params``, to the distribution.
        params: the event shapes of these tensors.
        support: families of one support may stand for each other at a site.
        gradient: what autograd gives through a draw, as in tests/support/families.py.
        discrete: whether its values are.
        states: the values of one event, where they can be enumerated.
        example: a value within the support, for observations; broadcast over the event.
        fixed_support: whether the support is the same for all parameters. Else one program's draw may be impossible in another.
        density: whether it has ``log_prob``.
        atol: accuracy of its derivative.
        batched: whether plates, ``to_event`` and local parameters may give it a batch shape.
        rounds: whether the closed form of the KL to itself is 0 up to rounding only.
    """

    make: Callable[..., Any]
    params: tuple[tuple[int, ...], ...]
    support: str
    gradient: str = "exact"
    discrete: bool = False
    states: Tensor | None = None
    example: Any = 0.3
    fixed_support: bool = True
    density: bool = True
    atol: float = 1e-6
    batched: bool = True
    rounds: bool = False


def _pos(x):
    return softplus(x) + 0.2


def _unit(x):
    return 0.02 + 0.96 * x.sigmoid()


def _tril(x):
    return x.tril(-1) + torch.diag_embed(_pos(x.diagonal(dim1=-2, dim2=-1)))


def _eye(x, n=2):
    return torch.eye(n, dtype=x.dtype)


def _scalar(make, n, support, **options):
    return Kind(make, ((),) * n, support, **options)


_G = {"atol": GAMMA_ACCURACY}
_NONE = {"gradient": "none"}
_BITS = torch.tensor([0.0, 1.0], dtype=torch.float64)
_THREE = torch.tensor([0, 1, 2])

KINDS = {
    # real
    "Normal": _scalar(lambda m, s: dist.Normal(m, _pos(s)), 2, "real"),
    "Laplace": _scalar(lambda m, s: dist.Laplace(m, _pos(s)), 2, "real"),
    "Cauchy": _scalar(lambda m, s: dist.Cauchy(m, _pos(s)), 2, "real"),
    "StudentT": _scalar(lambda d, m, s: dist.StudentT(1 + _pos(d), m, _pos(s)), 3, "real", **_G),
    "Logistic": _scalar(lambda m, s: dist.Logistic(m, _pos(s)), 2, "real"),
    "SkewLogistic": _scalar(lambda m, s, a: dist.SkewLogistic(m, _pos(s), _pos(a)), 3, "real"),
    "Gumbel": _scalar(lambda m, s: dist.Gumbel(m, _pos(s)), 2, "real"),
    "AsymmetricLaplace": _scalar(lambda m, s, a: dist.AsymmetricLaplace(m, _pos(s), _pos(a)), 3, "real"),
    "SoftLaplace": _scalar(lambda m, s: dist.SoftLaplace(m, _pos(s)), 2, "real"),
    "NanMaskedNormal": _scalar(lambda m, s: dist.NanMaskedNormal(m, _pos(s)), 2, "real"),
    "Affine": _scalar(lambda m, s: dist.TransformedDistribution(dist.Normal(torch.zeros_like(m), 1.0), [dist.transforms.AffineTransform(m, _pos(s))]), 2, "real"),
    "Mixture": Kind(lambda w, m, s: dist.MixtureSameFamily(dist.Categorical(logits=w), dist.Normal(m, _pos(s))), ((2,), (2,), (2,)), "real", gradient="none"),
    "MaskedMixture": _scalar(lambda m, s: dist.MaskedMixture(torch.ones(m.shape, dtype=torch.bool), dist.Normal(m, _pos(s)), dist.Laplace(m, _pos(s))), 2, "real"),
    "Stable": _scalar(lambda a, b, s, m: dist.Stable(1.2 + 0.7 * a.sigmoid(), b.tanh() * 0.9, _pos(s), m), 4, "real", density=False),
    "Delta": _scalar(lambda m: dist.Delta(m), 1, "point"),
    # positive
    "Gamma": _scalar(lambda a, b: dist.Gamma(_pos(a), _pos(b)), 2, "positive", example=0.7, **_G),
    "Exponential": _scalar(lambda r: dist.Exponential(_pos(r)), 1, "positive", example=0.7),
    "LogNormal": _scalar(lambda m, s: dist.LogNormal(m, _pos(s)), 2, "positive", example=0.7),
    "InverseGamma": _scalar(lambda a, b: dist.InverseGamma(1 + _pos(a), _pos(b)), 2, "positive", example=0.7, **_G),
    "HalfNormal": _scalar(lambda s: dist.HalfNormal(_pos(s)), 1, "positive", example=0.7),
    "HalfCauchy": _scalar(lambda s: dist.HalfCauchy(_pos(s)), 1, "positive", example=0.7),
    "Weibull": _scalar(lambda a, b: dist.Weibull(_pos(a), _pos(b)), 2, "positive", example=0.7),
    "Chi2": _scalar(lambda d: dist.Chi2(_pos(d)), 1, "positive", example=0.7, **_G),
    "FisherSnedecor": _scalar(lambda a, b: dist.FisherSnedecor(1 + _pos(a), 1 + _pos(b)), 2, "positive", example=0.7, **_G),
    "Folded": _scalar(lambda m, s: dist.FoldedDistribution(dist.Normal(m, _pos(s))), 2, "positive", example=0.7),
    "Pareto": _scalar(lambda s, a: dist.Pareto(_pos(s), 1 + _pos(a)), 2, "pareto", example=50.0, fixed_support=False),
    # intervals and circles
    "Beta": _scalar(lambda a, b: dist.Beta(_pos(a), _pos(b)), 2, "unit", **_G),
    "AffineBeta": _scalar(lambda a, b: dist.AffineBeta(_pos(a), _pos(b), 2.0, 3.0), 2, "affine unit", example=3.0, **_G),
    "Kumaraswamy": _scalar(lambda a, b: dist.Kumaraswamy(_pos(a), _pos(b)), 2, "unit"),
    "ContinuousBernoulli": _scalar(lambda x: dist.ContinuousBernoulli(_unit(x)), 1, "unit"),
    "RelaxedBernoulli": _scalar(lambda x: dist.RelaxedBernoulli(torch.tensor(0.7, dtype=x.dtype), logits=x), 1, "unit"),
    "Uniform": _scalar(lambda a, w: dist.Uniform(0.2 - _pos(a), 0.4 + _pos(w)), 2, "uniform", fixed_support=False),
    "VonMises": _scalar(lambda m, k: dist.VonMises(3 * m.tanh(), _pos(k)), 2, "circle", **_NONE),
    # vectors and matrices
    "MultivariateNormal": Kind(lambda m, s: dist.MultivariateNormal(m, scale_tril=_tril(s)), ((2,), (2, 2)), "vector", rounds=True),
    "LowRankMultivariateNormal": Kind(lambda m, f, d: dist.LowRankMultivariateNormal(m, f, _pos(d)), ((2,), (2, 1), (2,)), "vector", rounds=True),
    "MultivariateStudentT": Kind(lambda d, m, s: dist.MultivariateStudentT(2 + _pos(d), m, _tril(s)), ((), (2,), (2, 2)), "vector", **_G),
    "NormalVector": Kind(lambda m, s: dist.Normal(m, _pos(s)).to_event(1), ((2,), (2,)), "vector"),
    "MixtureOfDiagNormals": Kind(lambda m, s, w: dist.MixtureOfDiagNormals(m, _pos(s), w), ((2, 2), (2, 2), (2,)), "vector", gradient="none", batched=False),
    "Dirichlet": Kind(lambda c: dist.Dirichlet(_pos(c)), ((3,),), "simplex", example=1 / 3, **_G),
    "LogisticNormal": Kind(lambda m, s: dist.LogisticNormal(m, _pos(s)), ((2,), (2,)), "simplex", example=1 / 3),
    "RelaxedOneHotCategorical": Kind(lambda x: dist.RelaxedOneHotCategorical(torch.tensor(0.7, dtype=x.dtype), logits=x), ((3,),), "simplex", example=1 / 3),
    "ProjectedNormal": Kind(lambda m: dist.ProjectedNormal(m), ((2,),), "sphere", example=0.5**0.5),
    "LKJCholesky": Kind(lambda c: dist.LKJCholesky(2, _pos(c)), ((),), "corr", example=[[1.0, 0.0], [0.0, 1.0]], **_NONE),
    "Wishart": Kind(lambda d, s: dist.Wishart(5 + _pos(d), scale_tril=_eye(s) + 0.3 * s.tril().tanh()), ((), (2, 2)), "wishart", example=[[1.0, 0.0], [0.0, 1.0]], **_G),
    "GaussianHMM": Kind(lambda m, f: dist.GaussianHMM(dist.MultivariateNormal(m, _eye(m)), f.tanh(), dist.MultivariateNormal(m, _eye(m)), _eye(m), dist.MultivariateNormal(m, _eye(m)), duration=2), ((2,), (2, 2)), "hmm", batched=False),
    # discrete
    "Bernoulli": _scalar(lambda x: dist.Bernoulli(_unit(x)), 1, "bit", discrete=True, states=_BITS, example=1.0, **_NONE),
    "BernoulliLogits": _scalar(lambda x: dist.Bernoulli(logits=x), 1, "bit", discrete=True, states=_BITS, example=1.0, **_NONE),
    "Categorical": Kind(lambda x: dist.Categorical(x.softmax(-1)), ((3,),), "category", discrete=True, states=_THREE, example=1, **_NONE),
    "CategoricalLogits": Kind(lambda x: dist.Categorical(logits=x), ((3,),), "category", discrete=True, states=_THREE, example=1, **_NONE),
    "OrderedLogistic": _scalar(lambda x: dist.OrderedLogistic(x, torch.tensor([-1.0, 1.0], dtype=x.dtype)), 1, "category", discrete=True, example=1, states=_THREE, **_NONE),
    "OneHotCategorical": Kind(lambda x: dist.OneHotCategorical(logits=x), ((3,),), "one-hot", discrete=True, states=torch.eye(3, dtype=torch.float64), example=[0.0, 1.0, 0.0], **_NONE),
    "OneHotStraightThrough": Kind(lambda x: dist.OneHotCategoricalStraightThrough(logits=x), ((3,),), "one-hot", gradient="straight-through", discrete=True, example=[0.0, 1.0, 0.0]),
    "Binomial": _scalar(lambda x: dist.Binomial(2, _unit(x)), 1, "two", discrete=True, states=_THREE.double(), example=1.0, **_NONE),
    "BinomialLogits": _scalar(lambda x: dist.Binomial(2, logits=x), 1, "two", discrete=True, states=_THREE.double(), example=1.0, **_NONE),
    "BetaBinomial": _scalar(lambda a, b: dist.BetaBinomial(_pos(a), _pos(b), 2), 2, "two", discrete=True, states=_THREE.double(), example=1.0, **_NONE),
    "Multinomial": Kind(lambda x: dist.Multinomial(3, logits=x), ((3,),), "counts", discrete=True, example=1.0, **_NONE),
    "DirichletMultinomial": Kind(lambda x: dist.DirichletMultinomial(_pos(x), 3), ((3,),), "counts", discrete=True, example=1.0, **_NONE),
    "Poisson": _scalar(lambda x: dist.Poisson(_pos(x)), 1, "count", discrete=True, example=1.0, **_NONE),
    "Geometric": _scalar(lambda x: dist.Geometric(_unit(x)), 1, "count", rounds=True, discrete=True, example=1.0, **_NONE),
    "NegativeBinomial": _scalar(lambda x: dist.NegativeBinomial(3.0, _unit(x)), 1, "count", discrete=True, example=1.0, **_NONE),
    "GammaPoisson": _scalar(lambda a, b: dist.GammaPoisson(_pos(a), _pos(b)), 2, "count", discrete=True, example=1.0, **_NONE),
    "ZeroInflatedPoisson": _scalar(lambda r, g: dist.ZeroInflatedPoisson(_pos(r), gate=_unit(g)), 2, "count", discrete=True, example=1.0, **_NONE),
    "ZeroInflatedNegativeBinomial": _scalar(lambda p, g: dist.ZeroInflatedNegativeBinomial(3.0, probs=_unit(p), gate=_unit(g)), 2, "count", discrete=True, example=1.0, **_NONE),
}  # fmt: skip


# Recipes.


@dataclass(frozen=True)
class Plate:
    """A plate: its full size, the size of its subsample if it has one, and its dimension if it is declared."""

    size: int
    subsample: int | None = None
    dim: int | None = None


@dataclass(frozen=True)
class Site:
    """A sample statement.

    Attributes:
        name: of the site; in a loop the step is added.
        kind: key of KINDS, or "deterministic" or "factor".
        role: "latent", "target", or "input" (observed, and no target).
        observed: whether a target is given with ``obs=``.
        plates: indices of the plates around it, outermost first.
        parents: names of the sites whose values it depends on.
        event: shape of the events that ``to_event`` makes of independent copies.
        local: whether each index of the innermost plate has parameters of its own.
        other: a family of the same support that is taken where the first parent is below its threshold.
        mask: "site", "all false", "none" (``mask=False``) by poutine.mask, or "inside" by ``fn.mask``, under ``to_event``
            "inner"; "half" is the observed part of an ``obs_mask``.
        scale: a factor, or "rows" for one of each index of the innermost plate.
        enumerate: Pyro's annotation.
    """

    name: str
    kind: str
    role: str = "latent"
    observed: bool = False
    plates: tuple[int, ...] = ()
    parents: tuple[str, ...] = ()
    event: tuple[int, ...] = ()
    local: bool = False
    other: str | None = None
    mask: str | None = None
    scale: float | str | None = None
    enumerate: str | None = None

    @property
    def is_imputed(self) -> bool:
        """Whether Pyro splits it in two by its ``obs_mask``."""
        return self.mask == "half" and bool(self.plates) and (self.observed or self.role == "input")


@dataclass(frozen=True)
class Block:
    """Sites in sequence, or as the body of a loop: "range", "markov", or "plate" (a sequential one)."""

    sites: tuple[Site, ...]
    loop: str | None = None
    steps: int = 1


@dataclass(frozen=True)
class Recipe:
    """A program.

    Attributes:
        blocks: its sites.
        plates: those that sites refer to by index.
        by_observation: whether the losses find the targets by ``obs=`` (targets=None) or by name.
        spread: how far parameters lie from 0: large ones bring the edges of the supports.
        single: whether it computes in float32.
    """

    blocks: tuple[Block, ...]
    plates: tuple[Plate, ...] = ()
    by_observation: bool = False
    spread: float = 1.0
    single: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and continuous values."""
        return torch.float32 if self.single else torch.float64

    @property
    def sites(self) -> list[Site]:
        """The statements of all blocks."""
        return [site for block in self.blocks for site in block.sites]

    @property
    def kinds(self) -> list[Kind]:
        """The families that it draws from, alternatives included."""
        names = [name for site in self.sites for name in (site.kind, site.other) if name in KINDS]
        return [KINDS[name] for name in names]

    def names(self, role: str | None = None) -> list[str]:
        """The names of the sites that draw, as a trace has them, of one role or of all."""
        return [
            _name(block, site, step) + ("_observed" if site.is_imputed else "")
            for block in self.blocks
            for step in range(block.steps)
            for site in block.sites
            if site.kind in KINDS and role in (None, site.role)
        ]

    @property
    def targets(self) -> list[str] | None:
        """As a loss takes them."""
        return None if self.by_observation else self.names("target")


def _name(block: Block, site: Site, step: int) -> str:
    """The name in the program's sample statement."""
    return site.name if block.loop is None else f"{site.name}_{step}"


# Programs.

BRANCH = 0.1
Tables = dict[str, list[Tensor]]


def tables(recipe: Recipe, seed: int) -> Tables:
    """Random parameters of a recipe's sites: name -> the base value of each of the family's tensors, and the weights of parents."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (recipe.spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(recipe.dtype)

    values = {}
    for site in recipe.sites:
        if site.kind not in KINDS:
            values[site.name] = [normal(max(len(site.parents), 1))]
            continue
        rows = (recipe.plates[site.plates[-1]].size,) if site.local else ()
        values[site.name] = [
            tensor
            for kind in (site.kind, site.other)
            if kind is not None
            for shape in KINDS[kind].params
            for tensor in (normal(*rows, *site.event, *shape), normal(max(len(site.parents), 1)))
        ]
    return values


def program(
    recipe: Recipe, numbers: Tables, style: str = "param", prefix: str = "", rename: str = ""
) -> Callable[[], dict[str, Tensor]]:
    """The Pyro model of a recipe.

    Args:
        recipe: the program.
        numbers: its parameters, from :func:`tables`.
        style: where the parameters live: "param" statements, the "closure", a "module" that ``pyro.module`` registers, or an
            nn.Module that nobody registers ("bare").
        prefix: of the parameters' names.
        rename: prefix of the sites' names.

    Returns:
        A function of no arguments that returns the values by site. Its attribute ``leaves()`` gives the unconstrained parameters,
        of "param" style those of Pyro's store, once it has run.
    """
    module = None
    if style in ("module", "bare"):
        flat = {f"{name}__{i}": torch.nn.Parameter(t.clone()) for name, ts in numbers.items() for i, t in enumerate(ts)}
        module = torch.nn.ParameterDict(flat)

    def lookup(name: str, i: int) -> Tensor:
        if style == "param":
            return pyro.param(f"{prefix}{name}__{i}", lambda: numbers[name][i].detach().clone())
        if style == "closure":
            return numbers[name][i]
        return module[f"{name}__{i}"]

    def model() -> dict[str, Tensor]:
        if style == "module":
            pyro.module(f"{prefix}net", module)
        return _Run(recipe, lookup, rename).run()

    def leaves() -> list[Tensor]:
        if module is not None:
            return list(module.parameters())
        if style == "closure":
            return [t for ts in numbers.values() for t in ts]
        store = pyro.get_param_store()
        names = [f"{prefix}{name}__{i}" for name, ts in numbers.items() for i in range(len(ts))]
        return [store._params[name] for name in names if name in store]

    model.leaves = leaves  # type: ignore[attr-defined]
    return model


class _Run:
    """One run of a program."""

    def __init__(self, recipe: Recipe, lookup: Callable[[str, int], Tensor], rename: str) -> None:
        self.recipe = recipe
        self.rename = rename
        self.lookup = lookup
        self.plates: dict[int, Any] = {}
        self.latest: dict[str, tuple[Tensor, int, dict[int, int]]] = {}  # name -> value, event dimensions, plate -> dim
        self.values: dict[str, Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        for i, block in enumerate(self.recipe.blocks):
            for step in self._steps(block, i):
                for site in block.sites:
                    self._statement(site, self.rename + _name(block, site, int(step)))
        return self.values

    def _steps(self, block: Block, i: int) -> Iterator[int]:
        if block.loop == "markov":
            yield from pyro.markov(range(block.steps))
        elif block.loop == "plate":
            yield from pyro.plate(f"loop_{i}", block.steps)
        else:
            yield from range(block.steps)

    def _statement(self, site: Site, name: str) -> None:
        with ExitStack() as stack:
            dims = {i: self._enter(stack, i) for i in site.plates}
            features = [self._feature(parent, dims) for parent in site.parents if parent in self.latest]
            if site.kind == "deterministic":
                value = pyro.deterministic(name, sum((torch.tanh(f) for f in features), torch.zeros(())))
                self.latest[site.name], self.values[name] = (value, 0, dims), value
                return
            if site.kind == "factor":
                pyro.factor(name, sum(features, torch.zeros(())) * self.lookup(site.name, 0)[0])
                return
            rows = self._rows(site, dims)
            fn, kind = self._fn(site, features, dims, rows)
            obs = None
            if site.observed or site.role == "input":
                example = torch.as_tensor(
                    kind.example, dtype=torch.int64 if isinstance(kind.example, int) else self.recipe.dtype
                )
                obs = example.expand(fn.shape())
            if rows is not None and site.mask in ("inside", "half"):
                obs_mask = rows % 2 == 0
                if site.mask == "inside":
                    fn = dist.MaskedDistribution(fn, obs_mask)
            infer = {} if site.enumerate is None else {"enumerate": site.enumerate}
            if site.mask in ("site", "all false", "none"):
                mask = False if site.mask == "none" else rows % 2 == 0 if site.mask == "site" and rows is not None else None
                stack.enter_context(poutine.mask(mask=torch.tensor(site.mask == "site") if mask is None else mask))
            if site.scale is not None:
                scale = 0.5 + rows.to(self.recipe.dtype) if site.scale == "rows" and rows is not None else site.scale
                stack.enter_context(poutine.scale(scale=2.0 if scale == "rows" else scale))
            if site.is_imputed:
                value = pyro.sample(name, fn, obs=obs, obs_mask=obs_mask, infer=infer)
            else:
                value = pyro.sample(name, fn, obs=obs, infer=infer)
            self.latest[site.name], self.values[name] = (value, fn.event_dim, dims), value

    def _enter(self, stack: ExitStack, i: int) -> int:
        if i not in self.plates:
            plate = self.recipe.plates[i]
            self.plates[i] = pyro.plate(f"plate_{i}", plate.size, subsample_size=plate.subsample, dim=plate.dim)
        stack.enter_context(self.plates[i])
        return self.plates[i].dim

    def _rows(self, site: Site, dims: dict[int, int]) -> Tensor | None:
        """The indices of the innermost plate, along its dimension."""
        if not site.plates:
            return None
        i = site.plates[-1]
        return self.plates[i]._indices.reshape(-1, *(1,) * (-dims[i] - 1))

    def _feature(self, parent: str, dims: dict[int, int]) -> Tensor:
        """A bounded number for each row that a child shares with the parent: the mean over what it does not share."""
        value, event_dim, parent_dims = self.latest[parent]
        value = torch.tanh(value.double() / 2)
        if event_dim:
            value = value.flatten(-event_dim)
            order = torch.arange(1.0, value.shape[-1] + 1)  # tells the categories of a one-hot vector from each other
            value = (value * order).sum(-1) / max(value.shape[-1], 1)
        for i, dim in parent_dims.items():
            if dims.get(i) != dim and value.dim() >= -dim:
                value = value.sum(dim, keepdim=True) / max(value.shape[dim], 1)
        return value

    def _fn(self, site: Site, features: list[Tensor], dims: dict[int, int], rows: Tensor | None) -> tuple[Any, Kind]:
        kind, first = KINDS[site.kind], 0
        if site.other is not None and features and float(features[0].detach().mean()) < BRANCH:
            first = 2 * len(kind.params)
            kind = KINDS[site.other]
        arguments = []
        for i, shape in enumerate(kind.params):
            value, weights = self.lookup(site.name, first + 2 * i), self.lookup(site.name, first + 2 * i + 1)
            inner = len(site.event) + len(shape)
            if site.local:
                value = value[rows.flatten()].reshape(rows.shape + value.shape[1:])
            for weight, feature in zip(weights, features, strict=False):
                value = value + (weight * feature.to(weight.dtype))[(..., *(None,) * inner)]
            arguments.append(value)
        fn = kind.make(*_aligned(arguments, [len(site.event) + len(shape) for shape in kind.params]))
        if site.mask == "inner":
            mask = torch.arange(torch.Size(fn.batch_shape).numel()).reshape(fn.batch_shape) % 2 == 0
            fn = dist.MaskedDistribution(fn, mask)  # a MaskedMixture has another attribute named mask
        return fn.to_event(len(site.event)), kind


def _aligned(arguments: list[Tensor], inner: list[int]) -> list[Tensor]:
    """Give tensors of different event ranks one batch shape."""
    batch = torch.broadcast_shapes(*(x.shape[: x.dim() - n] for x, n in zip(arguments, inner, strict=True)))
    return [x.expand(batch + x.shape[x.dim() - n :]) for x, n in zip(arguments, inner, strict=True)]


# The strategy.


@st.composite
def recipes(
    draw: st.DrawFn,
    *,
    kinds: list[str] | None = None,
    max_sites: int = 4,
    structure: bool = True,
    masks: bool = True,
    declared: bool | None = None,
    small: bool = False,
    spreads: tuple[float, ...] = (1.0, 1.0, 0.3, 3.0),
    single: bool | None = False,
) -> Recipe:
    """Draw a recipe.

    Args:
        kinds: families to draw from; all of them by default.
        max_sites: number of statements at most.
        structure: whether there are loops, alternatives, and statements of deterministic values and factors.
        masks: whether there are masks, scales, subsampled plates and observed inputs.
        declared: whether plates declare their dimensions; None draws it.
        small: for enumeration: few states, and nothing but latents and targets that every plate holds in full.
        spreads: of the parameters.
        single: whether programs compute in float32; None draws it.
    """
    kinds = kinds or list(KINDS)
    if small:
        max_sites, masks = min(max_sites, 3), False
    declared = draw(st.booleans()) if declared is None else declared
    plates = draw(st.lists(_plates(declared, masks, 2 if small else 4), max_size=3))
    stacks = _stacks(plates, declared)
    names: list[str] = []
    blocks = []
    while len(names) < max_sites and (not names or draw(st.integers(0, 3))):
        loop = draw(st.sampled_from([None, None, None, "range", "markov", "plate"])) if structure else None
        size = draw(st.integers(1, 2)) if loop else 1
        block = []
        for _ in range(min(size, max_sites - len(names))):
            name = "abcdefgh"[len(names)]
            before = [*names, name] if loop else names
            block.append(draw(_site(name, kinds, before, plates, stacks, structure, masks)))
            names.append(name)
        blocks.append(Block(tuple(block), loop, draw(st.integers(1, 3)) if loop else 1))
    recipe = Recipe(tuple(blocks), tuple(plates), False, draw(st.sampled_from(spreads)))
    recipe = replace(recipe, single=draw(st.booleans()) if single is None else single)
    if small:
        recipe = _countable(recipe)
    return _with_targets(recipe, kinds[0], draw(st.booleans()))


@st.composite
def _plates(draw: st.DrawFn, declared: bool, subsampled: bool, largest: int) -> Plate:
    size = draw(st.integers(1, largest))
    subsample = draw(st.sampled_from([None, None, *range(1, size + 1)])) if subsampled else None
    return Plate(size, subsample, draw(st.integers(-3, -1)) if declared else None)


def _stacks(plates: list[Plate], declared: bool) -> list[tuple[int, ...]]:
    """The ways in which plates may be nested."""
    if not declared:  # Pyro keeps the dimension that a plate first gets: two that met in another order would collide
        return [(), *(tuple(range(n + 1)) for n in range(len(plates)))]
    stacks: list[tuple[int, ...]] = [()]
    for i, plate in enumerate(plates):
        stacks += [(*stack, i) for stack in stacks if plate.dim not in {plates[j].dim for j in stack}]
    return stacks


@st.composite
def _site(
    draw: st.DrawFn,
    name: str,
    kinds: list[str],
    before: list[str],
    plates: list[Plate],
    stacks: list[tuple[int, ...]],
    structure: bool,
    masks: bool,
) -> Site:
    parents = tuple(draw(st.lists(st.sampled_from(before), max_size=2, unique=True))) if before else ()
    stack = draw(st.sampled_from(stacks[::-1]))
    site = Site(name, "Normal", plates=stack, parents=parents)
    if structure and not draw(st.integers(0, 7)):
        return replace(site, kind=draw(st.sampled_from(["deterministic", "factor"])))
    kind = draw(st.sampled_from(kinds))
    if not KINDS[kind].batched:
        return replace(site, kind=kind, plates=(), parents=(), role=draw(st.sampled_from(["latent", "target"])))
    role = draw(st.sampled_from(["latent", "latent", "target", "target", "input"] if masks else ["latent", "target"]))
    event = draw(st.sampled_from([(), (), (), (2,), (1,), (2, 1), (0,)]))
    if 0 in event and (any(KINDS[kind].params) or KINDS[kind].support not in ("real", "positive", "bit", "count", "point")):
        event = ()  # torch's own validation of simplices and matrices fails on empty batches
    local = bool(stack) and draw(st.booleans())
    site = replace(site, kind=kind, role=role, event=event, local=local, observed=role == "target" and draw(st.booleans()))
    if structure and parents and not draw(st.integers(0, 3)):
        same = [k for k in kinds if KINDS[k].support == KINDS[kind].support and KINDS[k].batched]
        same = [kind] if 0 in event else same
        site = replace(site, other=draw(st.sampled_from(same)))
    if masks:
        site = replace(
            site,
            mask=draw(st.sampled_from([None] * 6 + ["site", "all false", "none", "inside", "inner", "half"])),
            scale=draw(st.sampled_from([None] * 5 + [0.5, 3.0, "rows"])),
            enumerate=draw(st.sampled_from([None] * 4 + ["parallel", "sequential"])),
        )
    return site


def _with_targets(recipe: Recipe, default: str, by_observation: bool) -> Recipe:
    """A recipe with at least one target; ``by_observation`` makes ``obs=`` tell targets, so that there are no inputs."""
    sites = [site for site in recipe.sites if site.kind in KINDS]
    last = sites[-1] if sites else recipe.sites[-1]

    def change(site: Site) -> Site:
        if site is last and not any(s.role == "target" for s in sites):
            site = replace(site, role="target", kind=site.kind if site.kind in KINDS else default)
        if by_observation and site.kind in KINDS:
            site = replace(site, role="target" if site.role == "input" else site.role, observed=site.role != "latent")
        if "Delta" in (site.kind, site.other) and site.observed and 0 in site.event:
            site = replace(site, kind=default, other=None)  # observed at its own point, whatever the value: no draw
        return site

    blocks = tuple(replace(block, sites=tuple(change(site) for site in block.sites)) for block in recipe.blocks)
    return replace(recipe, blocks=blocks, by_observation=by_observation)


def _countable(recipe: Recipe) -> Recipe:
    """The recipe without what enumeration cannot follow: factors, and choices by a mean."""
    blocks = []
    for block in recipe.blocks:
        sites = tuple(replace(s, kind="deterministic" if s.kind == "factor" else s.kind, other=None) for s in block.sites)
        blocks.append(replace(block, sites=sites, steps=min(block.steps, 2)))
    return replace(recipe, blocks=tuple(blocks))


@st.composite
def pairs(draw: st.DrawFn, *, kinds: list[str], **options: Any) -> tuple[Recipe, Recipe]:
    """Draw the recipes of a teacher and of a student, which may have other families of the same support at its sites.

    Args:
        kinds: as for :func:`recipes`.
        **options: likewise.
    """
    teacher = draw(recipes(kinds=kinds, **options))
    blocks = []
    for block in teacher.blocks:
        sites = []
        for site in block.sites:
            if site.kind in KINDS and KINDS[site.kind].batched and not draw(st.integers(0, 2)):
                same = [k for k in kinds if KINDS[k].support == KINDS[site.kind].support and KINDS[k].batched]
                same = [site.kind] if 0 in site.event else same
                site = replace(site, kind=draw(st.sampled_from(same)))
            sites.append(site)
        blocks.append(replace(block, sites=tuple(sites)))
    return teacher, replace(teacher, blocks=tuple(blocks))
