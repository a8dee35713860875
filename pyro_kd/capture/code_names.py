"""Which names a piece of Python code uses, and who owns the code: for finding what a program can reach. Knows only code objects."""

import dis
import functools
import sys
import types

__all__ = ["attributes_in", "globals_of", "imports_of", "is_installed", "names_in", "slots_of"]


@functools.cache
def is_installed(module_name: str | None) -> bool:
    """Whether a module is part of Python or of an installed package."""
    root = (module_name or "builtins").partition(".")[0]
    if root in sys.stdlib_module_names or root == "builtins":
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in ("pyro", "pyro_kd", "torch") or "site-packages" in file or "dist-packages" in file


@functools.cache
def globals_of(code: types.CodeType) -> frozenset[str]:
    """The global names that a function's code loads, including those of inner functions."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(names.union(*(globals_of(constant) for constant in _inner(code))))


@functools.cache
def imports_of(code: types.CodeType) -> frozenset[str]:
    """The Python modules that a function's code imports, including those of inner functions."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    return frozenset(names.union(*(imports_of(constant) for constant in _inner(code))))


@functools.cache
def attributes_in(code: types.CodeType) -> frozenset[str]:
    """The names of attributes in a function's code (and of its globals)."""
    return frozenset(code.co_names).union(*(attributes_in(constant) for constant in _inner(code)))


@functools.cache
def names_in(code: types.CodeType) -> frozenset[str]:
    """The names of attributes and globals in a function's code, and the strings in it, which may be names as well."""
    strings = [constant for constant in code.co_consts if isinstance(constant, str)]
    return frozenset((*code.co_names, *strings)).union(*(names_in(constant) for constant in _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


@functools.cache
def slots_of(cls: type) -> tuple[str, ...]:
    """The names of the slots that a class itself defines."""
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
