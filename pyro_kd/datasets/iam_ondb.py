"""Handwritten lines of IAM-OnDB from their XML files."""

from collections.abc import Collection
from pathlib import Path
from typing import Any
from xml.parsers.expat import ParserCreate

import torch
from torch import Tensor

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.strokes import Strokes
from pyro_kd.errors import CorruptDataError

__all__ = ["iam_ondb", "iam_ondb_forms"]

SOURCE = Source(
    name="IAM-OnDB",
    page="https://fki.tic.heia-fr.ch/databases/iam-on-line-handwriting-database (free for research, after registration)",
    fetch="lineStrokes-all.tar.gz",
    layout="    ROOT/lineStrokes/a01/a01-000/a01-000u-01.xml\n    ... and the other folders likewise",
)


def iam_ondb(root: str | Path, forms: Collection[str] | None = None, limit: int | None = None) -> Strokes:
    """Load handwritten lines. dx and dy are in the whiteboard's units, and dy grows downwards.

    The first point of a line is (0, 0). A line has some hundreds of points, which take 12 bytes each.

    Args:
        root: the folder that holds ``lineStrokes``, or that folder itself.
        forms: names of the forms to load, such as ``"a01-000u"``, whose first line is the file ``a01-000u-01.xml``. None: all.
            See :func:`iam_ondb_forms`.
        limit: the most lines to load, the first in the order of their names.

    Raises:
        MissingDataError: the files are missing. The message says what to fetch.
        CorruptDataError: a file is truncated or has a different format, or declares entities.
        ValueError: ``limit`` is less than 1.

    References:
        Liwicki and Bunke, IAM-OnDB - an on-line English sentence database acquired from handwritten text on a whiteboard, ICDAR
        2005.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    paths = [path for path in _files(Path(root)) if forms is None or _form(path) in forms]
    if forms is not None and (unknown := sorted(set(forms) - {_form(path) for path in paths})):
        raise SOURCE.missing(f"{root}: the form {unknown[0]!r}")
    lines = [_line(path) for path in paths[:limit]]
    return Strokes(torch.cat(lines), torch.tensor([len(line) for line in lines]))


def iam_ondb_forms(root: str | Path) -> list[str]:
    """The names of all forms (pages of one writer), in order.

    Raises:
        MissingDataError: the files are missing. The message says what to fetch.
    """
    return sorted({_form(path) for path in _files(Path(root))})


def _files(root: Path) -> list[Path]:
    SOURCE.need(root)
    folder = root / "lineStrokes" if (root / "lineStrokes").exists() else root
    found = sorted(folder.glob("*/*/*.xml"))
    if not found:
        raise SOURCE.missing(folder / "a01" / "a01-000" / "a01-000u-01.xml")
    return found


def _form(path: Path) -> str:
    return path.stem.rpartition("-")[0]


def _line(path: Path) -> Tensor:
    """The points of one file, shape (length, 3)."""
    places: list[tuple[float, float]] = []
    ends: list[int] = []
    inside: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        inside.append(name)
        if name == "Point":
            if inside[-3:] != ["StrokeSet", "Stroke", "Point"]:
                raise CorruptDataError("a Point lies outside of StrokeSet and Stroke")
            places.append((float(attributes["x"]), float(attributes["y"])))

    def end(name: str) -> None:
        inside.pop()
        if name == "Stroke" and len(places) > (ends[-1] if ends else 0):  # an empty stroke has no end
            ends.append(len(places))

    def refuse(*_: Any) -> None:
        raise CorruptDataError("it declares a document type, which may expand without end; IAM-OnDB's files have none")

    parser = ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.StartDoctypeDeclHandler = refuse
    with reading(path):
        parser.Parse(path.read_bytes(), True)
        if not places:
            raise CorruptDataError("it has no Point in a Stroke of a StrokeSet")
        absolute = torch.tensor(places, dtype=torch.float64)
        points = torch.zeros(len(absolute), 3)
        points[1:, :2] = absolute.diff(dim=0)
        points[torch.tensor(ends) - 1, 2] = 1
        Strokes(points, torch.tensor([len(points)]))
        return points
