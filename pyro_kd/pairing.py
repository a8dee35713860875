"""Which sites of the two programs belong together, and whether they can be compared.

Input: the trace of the teacher, and that of the student on the teacher's noise. Output: a list of :class:`SitePair` in
the teacher's execution order, with the plain distributions, the teacher's draw, and the scale and mask that both
programs agree on. Pairing knows traces and no divergences.
"""

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.poutine import Trace
from pyro.poutine.util import is_validation_enabled, site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_kd.errors import (
    PlateMismatchError,
    SupportMismatchError,
    UnpairedSiteError,
    UnsupportedDivergenceError,
    listing,
    nearest,
)
from pyro_kd.recoding import recoded
from pyro_kd.samplers import unwrapped

__all__ = [
    "SitePair",
    "check_comparable",
    "check_same_rows",
    "check_same_weighting",
    "compared_sites",
    "names_in_student",
    "pair_sites",
    "support_mismatch",
]


class SitePair(NamedTuple):
    """One sample site of the teacher with its counterpart in the student.

    Attributes:
        name: the teacher's name of the site.
        is_target: whether the site is a target; else it is a latent.
        p: the teacher's distribution given its parents.
        q: the student's distribution given its parents, which are functions of the same noise; categories in the teacher's
            coding.
        value: the teacher's draw, of shape ``batch_shape + event_shape``.
        student_value: the student's value: equal to ``value`` at targets.
        scale: the factor that plates and ``poutine.scale`` put on the student's site; :func:`check_same_weighting`.
        mask: boolean mask of the student's site over ``batch_shape``, or None; likewise.
        teacher_scale, teacher_mask: the teacher's.
        plates: the plates around the teacher's site, as Pyro's traces hold them.
    """

    name: str
    is_target: bool
    p: Any
    q: Any
    value: Tensor
    student_value: Tensor
    scale: Any
    mask: Any
    plates: tuple[Any, ...]
    teacher_scale: Any
    teacher_mask: Any

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the structural checks depend on."""
        p, q = self.p, self.q
        p_shapes = getattr(p, "batch_shape", None), getattr(p, "event_shape", None)
        q_shapes = getattr(q, "batch_shape", None), getattr(q, "event_shape", None)
        return (self.name, type(p), type(q), p_shapes, q_shapes)


def compared_sites(trace: Trace, named: Container[str] = ()) -> dict[str, Any]:
    """The sample sites of a trace that draw, or are given a draw of the other program, in execution order.

    Observed inputs, ``pyro.deterministic``, ``pyro.factor`` and plate indices draw nothing and are left out. So is a Delta
    that is a function of an auxiliary draw, whose own term covers it: one with a log density, or the way that Pyro's
    autoguides write a latent.

    Args:
        trace: the trace of a program.
        named: sites that are compared in any case: targets, and those given the other program's values.
    """
    sites, auxiliary = {}, dict[str, Any]()
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        if name not in named:
            if site["is_observed"] or is_statement(site):
                continue
            if is_point(site["fn"]) and _is_covered(name, site, auxiliary):
                continue
        if (site["infer"] or {}).get("is_auxiliary"):
            auxiliary[name] = site["value"]
        sites[name] = site
    return sites


def _is_covered(name: str, site: Any, auxiliary: Mapping[str, Tensor]) -> bool:
    """Whether a Delta is a function of an auxiliary draw.

    By its density, by the names that Pyro's autoguides give, or because its value is a view of the draw.
    """
    if bool(unwrapped(site["fn"]).log_density.any()) or f"{name}_unconstrained" in auxiliary:
        return True
    if any(draw.startswith("_") and draw.endswith("_latent") for draw in auxiliary):
        return True
    memory = site["value"].untyped_storage().data_ptr()
    return any(draw.untyped_storage().data_ptr() == memory for draw in auxiliary.values())


def observed_inputs(trace: Trace) -> dict[str, Any]:
    """The values of sites that a program observes: inputs of both programs. ``pyro.deterministic`` and factors are none."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not is_bookkeeping(site)
    }


def is_bookkeeping(site: Any) -> bool:
    """Whether a sample site is never a draw.

    That is a ``pyro.deterministic``, a ``pyro.factor``, a plate's indices, and a Delta that is observed at its own point:
    ``poutine.reparam`` leaves one in place of the site that it takes apart.
    """
    if is_statement(site):
        return True
    fn = unwrapped(site["fn"])
    if isinstance(fn, dist.Delta) and site["is_observed"]:
        return site["value"] is fn.v or bool((fn.v == site["value"]).all())
    return False


def is_statement(site: Any) -> bool:
    """Whether a sample site is a ``pyro.deterministic``, a ``pyro.factor`` or a plate's indices."""
    if (site["infer"] or {}).get("_deterministic") or site_is_subsample(site):
        return True
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def names_in_student(site_map: Mapping[str, str]) -> dict[str, str]:
    """The student's name of each of the teacher's sites, where it is another one.

    A name that the student maps away belongs to no site of the teacher's of that name: it gets one that no site has.
    """
    away = {student: f"{student} (mapped to {teacher})" for student, teacher in site_map.items()}
    return away | {teacher: student for student, teacher in site_map.items()}


def check_same_rows(teacher: Trace, student: Trace, to_student: Mapping[str, str], fresh: Container[str]) -> None:
    """Raise PlateMismatchError where a subsampled plate takes other rows in the student than in the teacher."""
    for name, site in teacher.nodes.items():
        if site["type"] != "sample" or not site_is_subsample(site) or name in fresh:
            continue
        twin: Any = student.nodes.get(to_student.get(name, name))
        if twin is None or not site_is_subsample(twin):
            continue
        same = _equal(torch.as_tensor(site["value"]), torch.as_tensor(twin["value"]))
        if not same and not (_takes_all_rows(site) and _takes_all_rows(twin)):
            raise PlateMismatchError(
                f"plate {name!r} takes other rows in the student than in the teacher, so that the draws inside it do not belong "
                "together. Give both the same subsample=, or neither: then they share the noise behind the rows."
            )


def _takes_all_rows(site: Any) -> bool:
    rows = torch.as_tensor(site["value"])
    return torch.equal(rows, torch.arange(len(rows), device=rows.device))


def is_point(fn: Any) -> bool:
    """Whether a distribution is a point mass (Delta)."""
    return isinstance(unwrapped(fn), dist.Delta)


def pair_sites(
    p_sites: Mapping[str, Any],
    q_sites: Mapping[str, Any],
    targets: Container[str],
    to_student: Mapping[str, str],
    fresh: Container[str],
) -> list[SitePair]:
    """Pair the sites of two traces by name.

    Args:
        p_sites: the teacher's :func:`compared_sites`.
        q_sites: the student's, run on the teacher's noise and targets.
        targets: names of the target sites, in the teacher's naming.
        to_student: :func:`names_in_student`.
        fresh: latent sites of either program that stand alone.

    Raises:
        UnpairedSiteError: a site has no counterpart.
    """
    pairs, used = [], set()
    for name, p_site in p_sites.items():
        if name in fresh and name not in targets:
            continue
        twin = to_student.get(name, name)
        if twin not in q_sites:
            raise UnpairedSiteError(_unpaired(name, "teacher", "student", p_sites, q_sites))
        used.add(twin)
        pairs.append(_pair(name, p_site, q_sites[twin], name in targets))
    for name in q_sites:
        if name not in used and name not in fresh:
            raise UnpairedSiteError(_unpaired(name, "student", "teacher", q_sites, p_sites))
    return pairs


def check_comparable(pair: SitePair, needs_support: bool) -> None:
    """Raise where the two distributions of a pair are over different spaces.

    Raises:
        UnsupportedDivergenceError: one of them is no distribution.
        PlateMismatchError: the batch shapes differ, or have, with Pyro's validation on, a dimension that no plate declares.
        SupportMismatchError: event shapes differ, one is discrete and the other not, or, with ``needs_support``, the
            teacher's support reaches outside the student's.
    """
    p, q = pair.p, pair.q
    _require_distribution(p, pair, "teacher")
    _require_distribution(q, pair, "student")
    if not (hasattr(p, "batch_shape") and hasattr(q, "batch_shape")):  # Pyro asks for log_prob alone
        return
    if p.batch_shape != q.batch_shape:
        raise PlateMismatchError(
            f"site {pair.name!r} has batch shape {tuple(p.batch_shape)} in the teacher and {tuple(q.batch_shape)} in the "
            "student. Put the site in the same plates in both programs, and declare other dimensions with .to_event()."
        )
    declared = {frame.dim for frame in pair.plates if frame.vectorized}
    for dim in range(-len(p.batch_shape), 0):
        if p.batch_shape[dim] != 1 and dim not in declared and is_validation_enabled():
            raise PlateMismatchError(
                f"site {pair.name!r} has batch shape {tuple(p.batch_shape)}, and no plate around it for dimension {dim}: the draws "
                "along it are taken as independent, and with vectorize_particles the loss would count them more than once. Declare "
                "it: .to_event(1) on the distribution, or pyro.plate; index parents so that they broadcast with the plates."
            )
    reason = None
    if p.event_shape != q.event_shape:
        reason = f"events of shape {tuple(p.event_shape)} against {tuple(q.event_shape)}"
    else:
        p_support, q_support = _support(p), _support(q)
        if p_support is not None and q_support is not None:
            if p_support.is_discrete != q_support.is_discrete:
                reason = "one is discrete and the other continuous"
            elif needs_support and not _contained(p_support, q_support):
                reason = "the teacher's support reaches outside the student's, so that KL(teacher || student) is infinite"
    if reason is not None:
        raise support_mismatch(pair.name, p, q, reason, needs_value=pair.is_target)


def support_mismatch(name: str, p: Any, q: Any, reason: str, *, needs_value: bool) -> SupportMismatchError:
    """The error for a site whose distributions are over different values.

    Args:
        name: of the site.
        p: the teacher's distribution.
        q: the student's.
        reason: how they differ.
        needs_value: whether the student must be given the teacher's value there, so that sharing noise is no way out.
    """
    alone = f"fresh=[{name!r}] leaves it out of the comparison"
    shared = f"latent_weight=lambda site: 0.0 if site == {name!r} else 0.1 leaves it out, its noise stays shared; {alone} altogether"
    return SupportMismatchError(
        f"supports differ at site {name!r}: teacher {_describe(p)}, student {_describe(q)}: {reason}. Give the student a "
        f"distribution over the same values at this site. If it is a latent, {alone if needs_value else shared}."
    )


def _pair(name: str, p_site: dict[str, Any], q_site: dict[str, Any], is_target: bool) -> SitePair:
    p, p_mask = _unmask(p_site["fn"], p_site["mask"])
    q, q_mask = _unmask(recoded(q_site["fn"], p_site["fn"]), q_site["mask"])
    values, frames = (p_site["value"], q_site["value"]), p_site["cond_indep_stack"]
    return SitePair(name, is_target, p, q, *values, q_site["scale"], q_mask, frames, p_site["scale"], p_mask)


def check_same_weighting(pair: SitePair) -> None:
    """Raise PlateMismatchError where scale or mask of a pair differ.

    They may depend on what was drawn: so this is checked in every run.
    """
    _require_equal(pair.teacher_scale, pair.scale, pair.name, "scale")
    _require_equal(pair.teacher_mask, pair.mask, pair.name, "mask")
    _require_equal(_inner_mask(pair.p), _inner_mask(pair.q), pair.name, "mask")


def _require_distribution(fn: Any, pair: SitePair, role: str) -> None:
    if not isinstance(fn, Distribution | PyroDistribution):
        raise UnsupportedDivergenceError(
            f"site {pair.name!r} of the {role} samples from {fn!r:.60}, which is no distribution, so it has no divergence. "
            "Sample from a pyro.distributions object"
            + (
                "."
                if pair.is_target
                else f", or leave the site out of the comparison: fresh=[{pair.name!r}] or latent_weight 0."
            )
        )


def _require_equal(mine: Any, yours: Any, name: str, what: str) -> None:
    if not _equal(mine, yours):
        raise PlateMismatchError(
            f"the {what} of site {name!r} differs: teacher {_short(mine)}, student {_short(yours)}. Use the same plate sizes, "
            f"subsamples and poutine.{what} in both programs. Where "
            f"draws decide on the {what}, make them targets; weight 0 leaves a latent out of the comparison."
        )


def _unmask(fn: Any, mask: Any) -> tuple[Any, Any]:
    """Split ``fn.mask(...)`` into the distribution and a mask, joined with the site's."""
    while isinstance(fn, dist.MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return fn, None if mask is True else mask


def _inner_mask(fn: Any) -> Any:
    """The mask of ``fn.mask(...).to_event(...)``, or None."""
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return _unmask(fn, None)[1]


def _equal(mine: Any, yours: Any) -> bool:
    if mine is yours or (type(mine) is float and mine == yours):
        return True
    if isinstance(mine, Tensor) and isinstance(yours, Tensor):
        return mine.shape == yours.shape and torch.equal(mine, yours)
    if mine is None or yours is None:
        return False
    return bool(torch.as_tensor(mine == yours).all())


def _support(fn: Any) -> Any:
    if is_point(fn):
        return None  # a Delta says that it is over all real numbers, and may as well be a category or a count
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support if hasattr(support, "is_discrete") else None


def _contained(inner: Any, outer: Any) -> bool:
    """Whether an interval lies in another; supports that are no intervals of numbers pass."""
    (low, high), (outer_low, outer_high) = _bounds(inner), _bounds(outer)
    return bool(torch.all(torch.as_tensor(low >= outer_low)) and torch.all(torch.as_tensor(high <= outer_high)))


def _bounds(support: Any) -> tuple[Any, Any]:
    low = getattr(support, "lower_bound", -torch.inf)
    high = getattr(support, "upper_bound", torch.inf)
    if support is constraints.boolean:
        low, high = 0, 1
    return low, high


def _describe(fn: Any) -> str:
    support, name = _support(fn), type(unwrapped(fn)).__name__
    return f"{name} over {support}" if support is not None else name


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)


_PATHS = "Where draws decide which sites a run has, make the deciding sites targets, so that both programs take one path."


def _unpaired(name: str, has: str, lacks: str, own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    alone = [site for site in other if site not in own]
    mapping = "{'student_name': 'teacher_name'}"
    return (
        f"site {name!r} is in the {has} only; the {lacks} has {listing(other)}.{nearest(name, alone)} Name the site alike in "
        f"both programs, map the names (site_map={mapping}), or leave it out of the comparison (fresh=[{name!r}]). {_PATHS}"
    )
