"""Which values a site of an exported density may take: checked before its graph runs.

Outside of a support, a graph reads past the end of a table, or gives a number that means nothing. The bounds of a support travel with
the description. Knows sites of a trace and arrays; no programs and no graphs.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export.description import Support, Value
from pyro_kd.noise.samplers import unwrapped
from pyro_kd.sites.weighting import inner_mask

__all__ = ["check_values", "common_support"]


def common_support(sites: Iterable[Any], arguments: Iterable[Tensor] = ()) -> Support | None:
    """The support of a site in several runs, as far as it is the same in all calls; None where every number is allowed.

    Args:
        sites: the site in each of the runs, which all have the same arguments.
        arguments: the tensors among these, of any shapes. A bound that may be computed from one of them is left out.
    """
    has_numbers = any(tensor.numel() == 1 for tensor in arguments)
    found = [_support_at(site, has_numbers) for site in sites]
    lows, highs = {each.low for each in found}, {each.high for each in found}
    low, high = (bounds.pop() if len(bounds) == 1 else None for bounds in (lows, highs))
    support = Support(low, high, all(each.is_whole for each in found))
    return None if support == Support() else support


def _support_at(site: Any, has_numbers: bool) -> Support:
    fn = site["fn"]
    try:
        support = fn.support
    except (AttributeError, NotImplementedError):
        return Support()
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    is_index = isinstance(support, constraints.integer_interval) and isinstance(support.upper_bound, int)
    is_loose = not getattr(unwrapped(fn), "_validate_args", True)  # as of a Bernoulli that is given shades of grey
    if not is_index and (is_loose or site["mask"] is not None or inner_mask(fn) is not None):
        return Support()  # what a mask hides may be anything
    if support in (constraints.boolean, constraints.one_hot):
        return Support(0.0, 1.0, True)
    if support is constraints.simplex:
        return Support(0.0, None, False)
    is_whole = bool(getattr(support, "is_discrete", False))
    low, high = (_number(getattr(support, name, None), is_whole, has_numbers) for name in ("lower_bound", "upper_bound"))
    return Support(0.0 if isinstance(support, constraints.multinomial) else low, high, is_whole)


def _number(bound: Any, is_whole: bool, has_numbers: bool) -> float | None:
    """A bound, if it is one for all rows and calls. Between bounds that are computed, a density of real numbers is right: it is 0
    outside.

    Args:
        bound: a number, or a tensor of any shape, which is constant if it is a single number, perhaps broadcast to the rows.
        is_whole: whether it bounds whole numbers.
        has_numbers: whether single numbers may be computed from an argument.
    """
    if isinstance(bound, Tensor):
        is_one = is_whole and bound.numel() > 0 and not has_numbers and not any(bound.stride())
        return float(bound.reshape(-1)[0]) if is_one else None
    return float(bound) if isinstance(bound, int | float) else None


def check_values(item: Value, values: Any) -> None:
    """Raise UnsupportedExportError where values are outside of the support of an input.

    Args:
        item: the input.
        values: a tensor or an array of any shape.
    """
    if item.support is None:
        return
    low, high, is_whole = item.support.low, item.support.high, item.support.is_whole
    wrong = values != values
    if low is not None:
        wrong = wrong | (values < low)
    if high is not None:
        wrong = wrong | (values > high)
    if is_whole:
        wrong = wrong | (values != values // 1)
    if wrong.any():
        raise UnsupportedExportError(
            f"input {item.name!r} holds {values[wrong].reshape(-1)[0].item():.6g}, which is outside of the support of its site: "
            f"{item.support}. Pass values that the site can take."
        )
