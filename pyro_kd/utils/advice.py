"""What an error may advise: the options of the objective, the report or the metric that runs the programs.

Code that looks at a site knows no losses, and the remedy for a fault there depends on who runs the programs: LocalKD has no
``given_weight``, MarginalKD no ``fresh``, and in a report no different loss can be used. So whoever runs the programs says in
:func:`advising` what it takes, and messages ask :func:`advice`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

__all__ = ["Advice", "advice", "advising", "begin", "end"]


@dataclass(frozen=True)
class Advice:
    """What can be advised.

    Attributes:
        name: of what runs the programs, such as ``LocalKD``.
        options: the names of the options that it takes.
        fresh: what its option of this name has now.
        weights: for each option that leaves a latent out when it is 0 there, its value elsewhere as code; empty for a mapping.
        instead: what to do in place of it, where no different loss can be used, as in a report.
        is_final: whether what runs inside has no options of its own to offer.
    """

    name: str = "run_pair"
    options: frozenset[str] = frozenset(("site_map", "fresh"))
    fresh: tuple[str, ...] = ()
    weights: tuple[tuple[str, str], ...] = ()
    instead: str = ""
    is_final: bool = False

    @property
    def taker(self) -> str:
        """What takes the options, in a sentence."""
        return self.name if self.is_final else "the loss"

    def takes(self, option: str) -> bool:
        """Whether there is an option of this name."""
        return option in self.options

    def leaving_out(self, site: str) -> str:
        """How to leave a latent out of the comparison, as the end of a sentence: empty if there is no way."""
        if self.takes("control_variate"):
            return "; or leave out control_variate"
        zero = [
            f"{option}=lambda site: 0.0 if site == {site!r} else {other}" if other else f"{option} of 0 at {site!r}"
            for option, other in self.weights
        ]
        ways = [f"by {', '.join(zero)}, which keeps its noise shared"] if zero else []
        if self.takes("fresh"):
            ways.append(f"by {self.with_fresh(site)}, so that each program draws its own noise")
        return f"; or leave the latent out: {', or '.join(ways)}" if ways else ""

    def with_fresh(self, *sites: str) -> str:
        """The option ``fresh`` with further sites."""
        return f"fresh={[*self.fresh, *dict.fromkeys(sites)]}"

    def rather(self, other: str) -> str:
        """What to do in place of this: to use a different loss, unless there is a better way."""
        return self.instead or f"use {other}"


_CURRENT: ContextVar[Advice | Callable[[], Advice] | None] = ContextVar("advice", default=None)


def advice() -> Advice:
    """What can be advised to those who run the programs."""
    found = _CURRENT.get()
    return found if isinstance(found, Advice) else Advice() if found is None else found()


def begin(found: Advice | Callable[[], Advice]) -> Token[Any] | None:
    """As :func:`advising`, until :func:`end` is called with what this returns: in each step, where a context costs too much."""
    outer = _CURRENT.get()
    return None if isinstance(outer, Advice) and outer.is_final else _CURRENT.set(found)


def end(token: Token[Any] | None) -> None:
    """Return to what could be advised before :func:`begin`."""
    if token is not None:
        _CURRENT.reset(token)


@contextmanager
def advising(found: Advice | Callable[[], Advice]) -> Iterator[None]:
    """Say inside the context what can be advised. A report holds for the losses that it evaluates.

    Args:
        found: what can be advised, or a function that says it, which is called only if there is an error.
    """
    token = begin(found)
    try:
        yield
    finally:
        end(token)
