"""What an exported program takes and gives: noise by site and law, arguments and outputs, with the number of rows left open.

The description travels with the program, as JSON, so that whoever runs it needs neither Pyro nor pyro_kd. Knows names, laws and
shapes; no tensors and no programs.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pyro_kd.errors import CorruptExportError
from pyro_kd.noise.laws import NoiseLaw

__all__ = ["ROWS", "Description", "NoiseInput", "Shape", "Support", "Value", "refuse_newer", "size_at"]

ROWS = "rows"
"""Stands for the number of rows in a shape."""

_VERSION = 1
FORMAT = f"pyro_kd export {_VERSION}"
_KINDS = ("sampler", "density")
_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"})

Shape = tuple[int | str, ...]
"""Sizes, of which some may be :data:`ROWS`."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Support:
    """The numbers that a site can take.

    Attributes:
        low, high: the smallest and the largest one; None where there is none.
        is_whole: whether they are whole numbers.
    """

    low: float | None = None
    high: float | None = None
    is_whole: bool = False

    def __str__(self) -> str:
        low, high = ("" if bound is None else f"{bound:g}" for bound in (self.low, self.high))
        bounds = f" from {low} to {high}" if low and high else f" from {low}" if low else f" up to {high}" if high else ""
        return f"{'whole ' * self.is_whole}numbers{bounds}"


@dataclass(frozen=True)
class Value:
    """An input or an output.

    Attributes:
        name: of the site, or of the argument.
        shape: with :data:`ROWS` for the number of rows.
        dtype: name of the data type.
        support: of the site, for a value that a density takes; None where every number is allowed.
    """

    name: str
    shape: Shape
    dtype: str
    support: Support | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class NoiseInput(Value):
    """One input of noise: independent draws of a law without parameters. Its name is the site and the law, such as ``z1/normal``.

    Attributes:
        site: the site whose sampler uses it, or the site after which the program draws it; ``""`` before the first site.
        law: name of a :class:`~pyro_kd.noise.laws.NoiseLaw` in lower case: ``normal``, ``uniform``, ``exponential``, ``cauchy``,
            ``permutation``.
    """

    site: str
    law: str


@dataclass(frozen=True)
class Description:
    """What an exported program takes and gives.

    Attributes:
        kind: ``sampler`` or ``density``.
        program: name of the Pyro program.
        noise: the inputs of noise, in the order in which the program takes them.
        inputs: the arguments that come after the noise.
        outputs: the values that it returns, in order.
    """

    kind: str
    program: str
    noise: tuple[NoiseInput, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def has_rows(self) -> bool:
        """Whether the number of rows is open."""
        return any(ROWS in item.shape for item in (*self.noise, *self.inputs, *self.outputs))

    def to_json(self) -> str:
        """The description as a line of JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Description":
        """Read a description, and check every entry.

        Raises:
            CorruptExportError: the text is not what :meth:`to_json` wrote, or what a newer version wrote.
        """
        refuse_newer(text)
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r:.40}, and this version reads {FORMAT!r}")
            kind = found["kind"]
            if kind not in _KINDS:
                raise ValueError(f"its kind is {kind!r:.40}")
            description = cls(
                kind,
                _text(found["program"]),
                _list(found["noise"], _noise_input),
                _list(found["inputs"], _value),
                _list(found["outputs"], _value),
            )
            names = [item.name for item in (*description.noise, *description.inputs)]
            if len(set(names)) < len(names):
                raise ValueError("two of its inputs have the same name")
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise CorruptExportError(
                f"the description of the exported program is damaged, or was not written by pyro_kd ({type(error).__name__}: "
                f"{error!s:.200}). Export the program again."
            ) from error
        return description


def refuse_newer(text: str | bytes, path: Any = "the exported program") -> None:
    """Raise CorruptExportError where a description says that a newer version of pyro_kd wrote it.

    Args:
        text: the description, which may be anything.
        path: of the file, for the error.
    """
    try:
        found = json.loads(text)["format"]
        version = re.fullmatch(r"pyro_kd export (\d{1,9})", found)
    except (KeyError, RecursionError, TypeError, ValueError):
        return
    if version is not None and int(version[1]) > _VERSION:
        raise CorruptExportError(
            f"{path} was written by a newer pyro_kd: its format is {found!r}, and this version reads {FORMAT!r}. Upgrade pyro_kd: "
            "pip install --upgrade pyro-kd. Or export the program again with this version."
        )


def size_at(shape: Sequence[int | str], rows: int) -> tuple[int, ...]:
    """A shape for a number of rows."""
    return tuple(rows if isinstance(size, str) else size for size in shape)


def _noise_input(found: Mapping[str, Any]) -> NoiseInput:
    law = _text(found["law"])
    if law.upper() not in NoiseLaw.__members__:
        raise ValueError(f"there is no law of noise {law!r:.40}")
    return NoiseInput(_text(found["name"]), _shape(found["shape"]), _dtype(found["dtype"]), _text(found["site"]), law)


def _value(found: Mapping[str, Any]) -> Value:
    support = found.get("support")
    return Value(
        _text(found["name"]),
        _shape(found["shape"]),
        _dtype(found["dtype"]),
        support=None
        if support is None
        else Support(_bound(support["low"]), _bound(support["high"]), _flag(support["is_whole"])),
    )


def _bound(found: Any) -> float | None:
    if found is not None and (type(found) not in (int, float) or not math.isfinite(found)):
        raise ValueError(f"{found!r:.40} is not a bound")
    return None if found is None else float(found)


def _flag(found: Any) -> bool:
    if type(found) is not bool:
        raise TypeError(f"{found!r:.40} is neither true nor false")
    return found


def _list(found: Any, read: Callable[[Any], _T]) -> tuple[_T, ...]:
    if not isinstance(found, list):
        raise TypeError(f"{found!r:.40} is not a list")
    return tuple(map(read, found))


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"{found!r:.40} is not a text")
    return found


def _dtype(found: Any) -> str:
    if found not in _DTYPES:
        raise ValueError(f"there is no data type {found!r:.40}")
    return _text(found)


def _shape(found: Any) -> Shape:
    def size(item: Any) -> int | str:
        if item == ROWS or (type(item) is int and 0 <= item < 2**31):
            return item
        raise ValueError(f"{item!r:.40} is not a size")

    return _list(found, size)
