"""Check what a MAT-file of version 5 to 7 states about itself, before SciPy reads it.

Such a file has a header of 128 bytes and one element per variable: a tag (type, number of bytes) and a content, which may be
compressed, with a checksum. A variable consists of elements again: flags, dimensions, name, numbers. SciPy follows the
tags in C without checking them, so a single flipped bit can crash the interpreter.
"""

import math
import struct
import zlib
from collections.abc import Collection
from typing import NamedTuple

from pyro_kd.errors import CorruptDataError

__all__ = ["check_mat"]

_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_BYTES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}  # of a number of each type
_FIRST_NUMERIC, _LAST_NUMERIC, _OPAQUE, _COMPLEX = 6, 15, 17, 0x0800
_MAX_DIMENSIONS = 32  # SciPy's
_EXPANSION = 1100  # deflate makes at most 1032 bytes of one


class _Element(NamedTuple):
    """The type and content of an element, and what follows it."""

    type: int
    content: memoryview
    rest: memoryview


def check_mat(content: bytes, wanted: Collection[str]) -> None:
    """Check all elements of a file, and every part of the wanted variables.

    Args:
        content: of the whole file.
        wanted: names of variables that must be arrays of real numbers if they exist.

    Raises:
        CorruptDataError: a tag is invalid, sizes or a checksum do not match, or a name exists twice.
    """
    if len(content) < 128 or 0 in content[:4] or content[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
        raise CorruptDataError("it is no MAT-file of version 5 to 7")
    order = "<" if content[126:128] == b"IM" else ">"
    rest, names = memoryview(content)[128:], set[str | None]()
    while rest:
        kind, inside, rest = _element(rest, order, padded=False)
        if kind == _COMPRESSED:
            kind, inside, after = _element(_inflated(inside), order, padded=False)
            if after:
                raise CorruptDataError(f"{len(after)} bytes follow a variable")
        if kind != _MATRIX:
            raise CorruptDataError(f"it has an element of type {kind} in place of a variable")
        name = _check_variable(inside, order, wanted)
        if name in wanted and name in names:
            raise CorruptDataError(f"it has the variable {name!r} twice")
        names.add(name)


def _check_variable(content: memoryview, order: str, wanted: Collection[str]) -> str | None:
    """The name of a variable; None for a class without one. Checks that the numbers of a wanted variable fit its shape."""
    kind, flags, rest = _element(content, order)
    if kind != _UINT32 or len(flags) != 8:
        raise CorruptDataError(f"a variable's flags are {len(flags)} bytes of type {kind}")
    word = struct.unpack(f"{order}II", flags)[0]
    if word & 0xFF == _OPAQUE:
        return None
    kind, dimensions, rest = _element(rest, order)
    if kind != _INT32 or len(dimensions) % 4 or not 2 <= len(dimensions) // 4 <= _MAX_DIMENSIONS:
        raise CorruptDataError(f"a variable's dimensions are {len(dimensions)} bytes of type {kind}")
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    kind, title, rest = _element(rest, order)
    name = bytes(title).decode("latin1")
    if kind != _INT8 or min(shape) < 0:
        raise CorruptDataError(f"a variable's name is of type {kind}, and its shape {shape}")
    if name in wanted:
        if not _FIRST_NUMERIC <= word & 0xFF <= _LAST_NUMERIC or word & _COMPLEX:
            raise CorruptDataError(f"{name} must hold real numbers, and is of class {word & 0xFF} with flags {word >> 8:#x}")
        kind, numbers, rest = _element(rest, order)
        if kind not in _BYTES or len(numbers) != math.prod(shape) * _BYTES[kind] or rest:
            raise CorruptDataError(f"{name} states the shape {shape}, and holds {len(numbers)} bytes of type {kind}")
    return name


def _inflated(content: memoryview) -> memoryview:
    """Decompress a content, which must be complete and have the right checksum."""
    inflate = zlib.decompressobj()
    found = inflate.decompress(content, _EXPANSION * len(content))
    if not inflate.eof or inflate.unused_data:
        raise CorruptDataError("a compressed variable has no end")
    return memoryview(found)


def _element(content: memoryview, order: str, *, padded: bool = True) -> _Element:
    """The first element. Inside a variable, elements fill whole words of 8 bytes, and up to 4 bytes are in the tag itself."""
    if len(content) < 8:
        raise CorruptDataError(f"it ends within a tag, with {len(content)} bytes")
    kind, size = struct.unpack(f"{order}II", content[:8])
    if padded and kind >> 16:
        kind, size = kind & 0xFFFF, kind >> 16
        if size > 4:
            raise CorruptDataError(f"a tag states {size} bytes where there is room for 4")
        return _Element(kind, content[4 : 4 + size], content[8:])
    end = 8 + size
    if end > len(content):
        raise CorruptDataError(f"an element states {size} bytes, and {len(content) - 8} are left")
    return _Element(kind, content[8:end], content[end + -size % 8 if padded else end :])
