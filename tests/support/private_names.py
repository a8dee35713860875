"""Which private names of Pyro and torch the package uses, read from its source."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pyro_kd"
LIBRARIES = ("pyro", "torch")
_OF_PYTHON = {"_fields", "_getframe", "_replace"}  # of named tuples and of sys
_OF_BOTH = {
    "_buffers",
    "_modules",
    "_parameters",
    "_params",
    "_process_message",
}  # the package has attributes of these names too


def files() -> list[Path]:
    """The source files of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def exists(path: str) -> bool:
    """Whether a dotted path leads to something: a module, or an attribute of what the path before it leads to."""
    owner, _, name = path.rpartition(".")
    try:
        importlib.import_module(path)
    except ImportError:
        if not owner or not exists(owner):
            return False
    else:
        return True
    return hasattr(_at(owner), name)


def _at(path: str) -> object:
    owner, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ImportError:
        return getattr(_at(owner), name)


def paths_in(file: Path) -> set[str]:
    """The dotted paths in Pyro and torch that a file uses and that have a private part."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    aliases, found = dict[str, str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
                found.add(f"{node.module}.{name.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain and chain[0] in aliases:
                found.add(".".join([aliases[chain[0]], *chain[1:]]))
    private = {path for path in found if path.partition(".")[0] in LIBRARIES and _is_private(path)}
    return {path for path in private if not any(other.startswith(f"{path}.") for other in private)}


def attributes_in(file: Path) -> set[str]:
    """The private attributes that a file reads from objects, and that the package does not define."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {name for name in _private_attributes(tree) if name not in _defined() and name not in _OF_PYTHON}


def _private_attributes(tree: ast.AST) -> Iterator[str]:
    modules = {name.asname or name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            chain = _chain(node)
            if not chain or chain[0] not in {"self", "cls", *modules}:
                yield node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr", "setattr")
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and _is_private(name.value):
                yield name.value


def _defined() -> set[str]:
    """The private names that the package itself defines, as attributes, methods, functions or fields."""
    if not _DEFINED:
        for file in files():
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    _DEFINED.update(part.name for part in node.body if isinstance(part, ast.FunctionDef))
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _chain(node)[:1] == ["self"]:
                    _DEFINED.add(node.attr)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    _DEFINED.add(node.target.id)
        _DEFINED.difference_update(_OF_BOTH)
    return _DEFINED


_DEFINED: set[str] = set()


def _chain(node: ast.AST) -> list[str]:
    """``a.b.c`` as its parts; nothing for attributes of calls and other expressions."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _is_private(path: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in path.split(".")) and "_pyro_kd_" not in path
