"""The running line of a user's program: the innermost line outside of torch, Pyro and this package."""

import linecache
import sys
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

__all__ = ["LIBRARIES", "is_of_library", "line_at_work", "line_of_error", "place_at_work", "place_of_error"]

LIBRARIES = frozenset({"pyro", "pyro_kd", "torch"})
"""Lines of these packages do not help a user; those of all other packages do."""


def is_of_library(module_name: Any) -> bool:
    """Whether a module, by its full name, belongs to one of :data:`LIBRARIES`."""
    return isinstance(module_name, str) and module_name.partition(".")[0] in LIBRARIES


def line_at_work() -> str:
    """The line that is running, as ``" at file.py:12 (code)"``; an empty string if only libraries are running."""
    frames = takewhile(lambda frame: frame[0].f_globals.get("__name__") != _TRAINING_LOOP, _frames(sys._getframe(1)))
    return next(_shown(_outside(frames)), "")


def line_of_error(error: BaseException) -> str:
    """The line that an error comes from, in the same format as :func:`line_at_work`."""
    return next(_shown(reversed(list(_outside(_lines(error.__traceback__))))), "")


def place_at_work(frame: FrameType | None) -> str:
    """The line at or around a frame, as ``/path/to/file.py:12``; the frame's own line if only libraries are running."""
    found, number = next(_outside(_frames(frame)), next(_frames(frame)))
    return f"{found.f_code.co_filename}:{number}"


def place_of_error(error: BaseException) -> str:
    """The line that an error comes from, as ``/path/to/file.py:12, code``; an empty string if only libraries were running."""
    lines = list(_outside(_lines(error.__traceback__)))
    if not lines:
        return ""
    file, number = lines[-1][0].f_code.co_filename, lines[-1][1]
    code = linecache.getline(file, number, lines[-1][0].f_globals).strip()
    return f"{file}:{number}" + (f", {code}" if code else "")


_TRAINING_LOOP = "pyro_kd.capture.specialise"
"""The frames beyond this module are not part of a program."""


def _frames(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _lines(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _outside(lines: Iterable[tuple[FrameType, int]]) -> Iterator[tuple[FrameType, int]]:
    for frame, number in lines:
        name = frame.f_globals.get("__name__")
        if isinstance(name, str) and not is_of_library(name) and not name.startswith(("contextlib", "functools")):
            yield frame, number


def _shown(lines: Iterable[tuple[FrameType, int]]) -> Iterator[str]:
    for frame, number in lines:
        file = frame.f_code.co_filename
        code = linecache.getline(file, number, frame.f_globals).strip()
        yield f" at {Path(file).name}:{number}" + (f" ({code})" if code else "")
