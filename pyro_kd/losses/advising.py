"""What errors may advise to those who evaluate a loss: the options that its class takes, and what they are now."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pyro_kd.losses.interface import Loss
from pyro_kd.utils.advice import Advice, begin, end

__all__ = ["advice_of", "with_advice"]

Method = TypeVar("Method", bound=Callable[..., Any])


def advice_of(loss: Loss) -> Advice:
    """What errors may advise to those who evaluate a loss."""
    options = _options_of(type(loss)) - set(loss.refused_options)
    if not vars(loss).get("control_variate"):
        options -= {"control_variate"}
    weights: list[tuple[str, Any]] = [("latent_weight", loss.latent_weight)] if "latent_weight" in options else []
    if "given_weight" in options and (loss.teacher_forcing != 0 or "teacher_forcing" in loss.scheduled):
        weights.append(("given_weight", loss.given_weight))
    shown = tuple((name, _shown(value)) for name, value in weights if not _is_zero(value))
    return Advice(type(loss).__name__, options, tuple(sorted(loss.fresh)), shown)


def with_advice(method: Method) -> Method:
    """Decorate a method of what has the attribute ``loss``: errors inside advise what the loss takes."""

    @functools.wraps(method)
    def advised(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = begin(functools.partial(advice_of, self.loss))
        try:
            return method(self, *args, **kwargs)
        finally:
            end(token)

    return advised  # type: ignore[return-value]


@functools.cache
def _options_of(kind: type) -> frozenset[str]:
    """The names of a class's options, those that it passes on included."""
    found = set[str]()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
            if not any(each.kind is each.VAR_KEYWORD for each in parameters):
                break
    return frozenset(found - {"self"})


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _shown(value: Any) -> str:
    """The value of a weight at other sites, as code; empty for a mapping or a function."""
    return f"{float(value)!r}" if isinstance(value, int | float) else ""
