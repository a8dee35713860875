"""Which plate of a program is the one of its rows, and so which of its arguments grow with the number of rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro.poutine import Trace

from pyro_kd.errors import UnsupportedExportError, listing, nearest
from pyro_kd.export.arguments import Arguments
from pyro_kd.utils.pyro_internals import Subsample

__all__ = ["find_rows", "plate_sizes"]


def plate_sizes(trace: Trace) -> dict[str, int]:
    """The plates of a run that are contexts, with their full sizes, in order of execution."""
    return {
        name: int(site["fn"].size)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and isinstance(site["fn"], Subsample)
    }


def find_rows(
    program: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    sizes: Mapping[str, int],
    rows: str | int | None,
) -> int | None:
    """The number of rows in the example.

    Args:
        program: the program.
        args, kwargs: what it was called with.
        sizes: of its plates.
        rows: name of the plate of the rows, or their number; None for the one plate whose size is among the arguments.

    Returns:
        The number; None if no argument tells it, so that it is fixed.

    Raises:
        UnsupportedExportError: there is no such plate, several could be meant, or no argument has its size.
    """
    if isinstance(rows, str):
        if rows not in sizes:
            raise UnsupportedExportError(
                f"rows={rows!r} is not a plate of the program, which has {listing(sizes)}.{nearest(rows, sizes)}"
            )
        found = sizes[rows]
    elif rows is not None:
        found = rows
    else:
        names = [name for name, size in sizes.items() if size > 1 and Arguments(program, args, kwargs, size).growing]
        if len({sizes[name] for name in names}) > 1:
            raise UnsupportedExportError(
                f"the sizes of several plates are among the arguments: {listing(names)}. Say which of them has any number of rows: "
                f"rows={names[0]!r}."
            )
        if not names:
            return None
        found = sizes[names[0]]
    if found < 2:
        raise UnsupportedExportError(
            f"the example has {found} row(s), and a graph keeps a size of 0 or 1 for ever. Call with 2 rows or more."
        )
    if not Arguments(program, args, kwargs, found).growing:
        raise UnsupportedExportError(
            f"no argument is {found}, the number of rows, or has it as a size, so that it cannot change. Pass the number of rows to "
            "the program as an argument, or fix all sizes: fixed=True."
        )
    return found
