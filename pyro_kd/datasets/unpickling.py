"""Pickles of arrays, lists, dicts, numbers and strings, read without running anything that the file names.

A pickle is a program that may call any function by name. Here the few names with which arrays are written stand for
functions of this file, all other names are refused, and NumPy itself sees only bytes, a plain data type and a shape that
fit together. Python 2's strings come as bytes. A hostile file runs no code, but can take up time and memory. A damaged one
cannot: the unpickler is the one in Python, since the one in C allocates as many entries as a damaged number states.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import IO, Any, NoReturn

import numpy

__all__ = ["unpickle_arrays"]

_UNFINISHED = object()
_CODES = {"b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"}


def unpickle_arrays(stream: IO[bytes]) -> Any:
    """Read one pickle up to the end of the stream. Arrays of numbers become NumPy arrays, and arrays of objects lists.

    Raises:
        pickle.UnpicklingError: the pickle names anything but arrays and plain values, is truncated or damaged, or something
            follows it.

    Example:
        >>> import io, pickle
        >>> unpickle_arrays(io.BytesIO(pickle.dumps({"data": [1, 2]})))
        {'data': [1, 2]}
        >>> unpickle_arrays(io.BytesIO(pickle.dumps(print)))
        Traceback (most recent call last):
            ...
        _pickle.UnpicklingError: it calls builtins.print, and only arrays and plain values are read
    """
    content = io.BytesIO(stream.read())
    try:
        found = _arrays(_ArrayUnpickler(content, encoding="bytes").load(), {})
        if content.read(1):
            raise pickle.UnpicklingError("something follows the pickle")
        return found
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises almost any class of error
        raise pickle.UnpicklingError(f"the pickle is truncated or damaged ({type(error).__name__}: {error})") from error


class _Name:
    """Stands for a name in a pickle, without a state that the pickle could set."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("it changes a function")

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("it changes a function")


class _DType:
    """Stands for a NumPy data type: a code of one of ``_CODES`` or of objects, and the order of its bytes."""

    __slots__ = ("code", "objects", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.objects = self.code in ("O", "O4", "O8")
        self.order = "="
        if not self.objects and self.code not in _CODES:
            raise pickle.UnpicklingError(f"it holds an array of the data type {self.code!r}, which is not read")

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(entry is not None for entry in state[2:5]):
            raise pickle.UnpicklingError("it holds a structured array, which is not read")
        self.order = order

    def numpy(self) -> numpy.dtype[Any]:
        return numpy.dtype(self.order + self.code)


class _Array:
    """Stands for a NumPy array while the pickle is read."""

    __slots__ = ("value",)

    def __init__(self, *_: Any) -> None:  # the class, shape and type of an empty array, which the state replaces
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError("it holds a malformed array")
        if dtype.objects:
            if not isinstance(data, list) or len(shape) > 1 or len(data) != math.prod(shape):
                raise pickle.UnpicklingError("it holds a malformed array of objects")
            self.value = data
            return
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.numpy().itemsize:
            raise pickle.UnpicklingError(f"it holds an array of shape {shape} whose bytes do not fit")
        self.value = numpy.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, as Python 3 writes them for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it encodes something else than bytes")
    return text.encode("latin1")


def _refuse(*_: Any) -> NoReturn:
    raise pickle.UnpicklingError("it makes an array differently from NumPy")


_ARRAY, _CLASS, _DTYPE = _Name(_Array), _Name(_refuse), _Name(_DType)
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy", "ndarray"): _CLASS,
    ("numpy", "dtype"): _DTYPE,
    ("_codecs", "encode"): _Name(_encode),
    ("__builtin__", "bytes"): _Name(lambda: b""),
    ("builtins", "bytes"): _Name(lambda: b""),
}


class _ArrayUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, and only arrays and plain values are read") from None


def _arrays(value: Any, done: dict[int, Any]) -> Any:
    """With the arrays themselves in place of what stands for them; ``done`` holds what was reached before, by identity."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, numpy.ndarray)):
        return value
    if id(value) in done:
        if done[id(value)] is _UNFINISHED:
            raise pickle.UnpicklingError("it holds something within itself")
        return done[id(value)]
    done[id(value)] = _UNFINISHED
    if isinstance(value, _Array) and value.value is not None:
        result = _arrays(value.value, done)
    elif isinstance(value, dict):
        if not all(isinstance(key, (str, bytes, int)) for key in value):
            raise pickle.UnpicklingError("it holds a dict whose keys are neither strings nor integers")
        result = {key: _arrays(item, done) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(_arrays(item, done) for item in value)
    else:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, and only arrays and plain values are read")
    done[id(value)] = result
    return result
