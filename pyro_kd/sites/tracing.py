"""The trace of a program, as ``poutine.trace(program).get_trace`` makes it, with readable errors."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from pyro_kd.errors import PyroKDError
from pyro_kd.sites.full_precision import FullPrecisionMessenger
from pyro_kd.utils.autocast import modes_of_programs

__all__ = ["displaced_params", "get_trace", "params_of"]

_MOST_LINES = 12


def get_trace(program: Callable[..., Any], args: Any, kwargs: Any) -> Trace:
    """Run a program and return its trace, with its sites in float32 where it runs under autocast.

    As in Pyro, a ValueError or RuntimeError of the program gets the table of shapes appended, or the end of a long table.
    """
    tracer, modes = TraceMessenger(), modes_of_programs()
    with tracer, FullPrecisionMessenger(modes) if modes else nullcontext():
        try:
            program(*args, **kwargs)
        except PyroKDError:
            raise  # names the site
        except (ValueError, RuntimeError) as error:
            if len(error.args) == 1:
                error.args = (f"{error}\n{_shapes(tracer.trace)}",)
            raise
    return tracer.get_trace()


def _shapes(trace: Trace) -> str:
    lines: list[str] = trace.format_shapes().split("\n")
    if len(lines) <= _MOST_LINES:
        return "\n".join(lines)
    cut = len(lines) - _MOST_LINES
    return "\n".join([lines[0], f"  ({cut} lines, of the sites before these, are left out)", *lines[cut + 1 :]])


def params_of(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained leaf tensors of a trace's ``pyro.param`` statements, by name."""
    values: dict[str, Any] = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}
    # With Pyro's module_local_params the statement carries the parameter itself.
    return {name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()}


def displaced_params(trace: Trace) -> dict[str, Tensor]:
    """The program's own leaf tensors in whose place Pyro's store holds others, by the names of their ``pyro.param`` statements.

    ``pyro.module`` and ``PyroModule`` make such statements for the tensors of a module. The module still computes with its own.
    """
    stored, found = params_of(trace), dict[str, Tensor]()
    for name, value in stored.items():
        arguments: Any = trace.nodes[name]["args"]
        own = arguments[1] if len(arguments) > 1 else None
        if isinstance(own, Tensor) and own.is_leaf and own.requires_grad and own is not value:
            found[name] = own
    return found
