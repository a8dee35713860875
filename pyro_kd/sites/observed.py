"""What the two programs observe: data, which is the same in both and depends on nothing that is trained or drawn.

A loss draws targets from the teacher and compares the laws at each site. So a site ``obs=data - prediction`` would compare the
laws of the residuals alone, in which the prediction does not occur: whatever it is, the loss would be 0.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_kd.errors import ObservedValueError, PlateMismatchError, listing
from pyro_kd.noise.statements import is_bookkeeping, is_factor
from pyro_kd.sites.categories import recoded_value
from pyro_kd.sites.plates import undeclared_dims
from pyro_kd.utils import guards
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.tensors import tensors_in
from pyro_kd.utils.torch_internals import is_same_storage
from pyro_kd.utils.warning import warn_once

__all__ = ["Observed", "check_observed", "check_observed_shapes", "observed_by", "warn_of_factors"]


class Observed(NamedTuple):
    """The value at a site that a program observes, and the site's distribution."""

    value: Any
    fn: Any
    plates: tuple[Any, ...]


def observed_by(msg: Any) -> dict[str, Observed]:
    """What a program observes at a site: one entry, or none where it draws or states a value."""
    if not msg["is_observed"] or is_bookkeeping(msg):
        return {}
    return {str(msg["name"]): Observed(msg["value"], msg["fn"], msg["cond_indep_stack"])}


def check_observed(
    student: Mapping[str, Observed], teacher: Mapping[str, Observed], to_student: Mapping[str, str], arguments: Any
) -> None:
    """Raise ObservedValueError where an observed value depends on what is trained, or differs between the programs.

    Args:
        student: what the student observes, under its own names.
        teacher: what the teacher observes.
        to_student: the student's names of the teacher's sites.
        arguments: of both programs, which may need gradients for reasons of their own.
    """
    for name, mine in student.items():
        needs_grad = isinstance(mine.value, Tensor) and mine.value.requires_grad
        if needs_grad and leaves_of([mine.value]) - leaves_of(tensors_in(arguments)):
            raise ObservedValueError(_message(name, "in the student depends on its parameters or draws"))
    for name, theirs in teacher.items():
        own = student.get(to_student.get(name, name))
        if own is not None and not _same(theirs, own):
            raise ObservedValueError(_message(name, "differs between teacher and student"))


def check_observed_shapes(teacher: Mapping[str, Observed]) -> None:
    """Raise PlateMismatchError where an observed value is repeated along a dimension that no plate declares.

    There the distribution has broadcast by mistake, and the program draws more than it observes. As Pyro's own losses, only while
    validation is on.
    """
    if not is_validation_enabled():
        return
    for name, site in teacher.items():
        if not isinstance(site.value, Tensor):
            continue
        batch_shape = torch.Size(getattr(site.fn, "batch_shape", ()))
        shape = site.value.shape[: max(site.value.dim() - len(getattr(site.fn, "event_shape", ())), 0)]
        for dim in undeclared_dims(batch_shape, site.plates):
            if -dim > len(shape) or shape[dim] == 1:
                raise PlateMismatchError(
                    f"site {name!r} has batch shape {tuple(batch_shape)}, and observes a value of batch shape {tuple(shape)}: along "
                    f"dimension {dim}, which no plate declares, the distribution has broadcast, and each value would count "
                    f"{batch_shape[dim]} times. Index parents so that they broadcast with the plates, or declare the dimension: "
                    ".to_event(1) on the distribution, or pyro.plate."
                )


def warn_of_factors(student: Trace, teacher: Trace, told: set[str]) -> None:
    """Warn that a ``pyro.factor`` has no part in a loss.

    Args:
        student, teacher: the traces.
        told: the warnings that were given, which are not repeated; added to.
    """
    names = {name for trace in (student, teacher) for name, site in trace.nodes.items() if is_factor(site)}
    text = (
        f"pyro.factor {listing(sorted(names))} has no part in the loss: it compares the distributions at the sample sites, from "
        "which the programs draw, as if there were no factor. Put what it says about a variable into the distribution of that "
        "variable; add a penalty on parameters to the loss."
    )
    if names:
        warn_once(text, told)


def _same(theirs: Observed, mine: Observed) -> bool:
    if mine.value is theirs.value or not isinstance(mine.value, Tensor) or not isinstance(theirs.value, Tensor):
        return guards.equal(theirs.value, mine.value, "observed values that are no tensors are equal")
    value: Any = recoded_value(theirs.value, theirs.fn, mine.fn).detach()
    other = mine.value.detach()
    if _is_same_view(value, other):
        return True
    try:
        value, other = torch.broadcast_tensors(value, other)
    except RuntimeError:
        return False
    if value.dtype != other.dtype:  # a program in a different precision: compare in the lower one
        lower = value.dtype if torch.promote_types(value.dtype, other.dtype) == other.dtype else other.dtype
        value, other = value.to(lower), other.to(lower)
    other = other.to(value.device)
    # Missing data may be NaN.
    return guards.equal(value, other, "observed values are equal") or (
        value.is_floating_point()
        and guards.equal(value.nan_to_num(), other.nan_to_num(), "observed values are equal but for NaN")
    )


def _is_same_view(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors show the same memory, as slices of one batch do."""
    return (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.storage_offset() == second.storage_offset()
        and first.dtype == second.dtype
        and is_same_storage(first, second)
    )


def _message(name: str, what: str) -> str:
    return (
        f"the observed value at site {name!r} {what}. A loss compares the distributions at a site; what enters through the observed "
        f"value would not be trained. Observe the data as they are, and put the prediction into the distribution: not "
        f'pyro.sample("{name}", dist.Normal(0, scale), obs=data - prediction) but pyro.sample("{name}", dist.Normal(prediction, '
        "scale), obs=data); for a distribution without a location, dist.TransformedDistribution(noise, "
        "[AffineTransform(prediction, 1)]). Prepare data before the call, and pass the same to both programs."
    )
