"""How programs are named in messages and representations, and tables for notebooks."""

import functools
import html
from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

__all__ = ["as_html", "as_text", "describe_tensor", "first_line", "name_of", "shown"]


def name_of(program: Any) -> str:
    """The name of a program: the name of a function, of a method with its class, or of a module's class."""
    program = unwrap(program)  # without Pyro's handlers
    if isinstance(program, functools.partial):
        return f"partial of {name_of(program.func)}"
    owner = getattr(program, "__self__", None)
    if owner is not None:
        return f"{type(owner).__name__}.{program.__name__}"
    if getattr(type(program), "is_frozen", False):
        return repr(program)
    if isinstance(program, nn.Module):
        return type(program).__name__
    name = getattr(program, "__qualname__", None)
    return name.replace("<locals>.", "") if isinstance(name, str) else type(program).__name__


def as_text(title: str, rows: Mapping[str, str]) -> str:
    """A title over lines of ``name: value``."""
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """The same as an HTML table for a notebook."""
    cells = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items()]
    return f"<table><caption>{html.escape(title)}</caption>{''.join(cells)}</table>"


def describe_tensor(tensor: Tensor) -> str:
    """Type and shape of a tensor as text, such as ``float32 of shape (3, 2)``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def first_line(error: Exception) -> str:
    """The message of an error without what follows its first line, such as the shapes that Pyro adds, and without a page."""
    return f"{error}".strip().split("\n")[0]


def shown(option: Any) -> str:
    """An option as text: a function by its name."""
    return getattr(option, "__qualname__", repr(option)).replace("<locals>.", "")
