"""What a program of torch.export may hold, so that loading and running it cannot run code of its author's choice.

A program is a JSON document. Torch looks operations up by name, evaluates expressions of sizes, and imports what the descriptions of
nested arguments name. Each of these is compared with what an export of a sampler or a density can contain. Knows JSON; no tensors.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pyro_kd.errors import CorruptExportError

__all__ = ["MEMBERS", "check_program", "check_weights"]

MEMBERS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|"
    r"models/model\.json|extra/pyro_kd\.json|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
"""The parts of an archive."""

_OPERATION = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_set_grad_enabled|torch\.sym_(float|int|max|min|not|sum)|"
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem|not_)|math\.(ceil|floor|trunc)"
)
_NAME = re.compile(r"torch\.ops\.\w+\.(\w+)\.\w+")
_FORBIDDEN = ("from_file", "save", "load", "print", "warn", "format", "open")
_EXPRESSION = re.compile(r"[\w\s()+\-*/,<>=&|~.]*")
_SYMBOL = re.compile(r"Symbol\('((?:[su]|zu[fi])\d+)'(?:, (?:positive|nonnegative|integer)=True)*\)")
_FLOAT = re.compile(r"Float\('-?(\d+(?:\.\d+)?(?:e[+-]?\d+)?)', precision=53\)")
# Powers of sizes with small exponents, and of numbers with sizes: a power of large numbers would be evaluated for ever.
_POWER = re.compile(
    r"Pow\(([su]\d+), Integer\(-?\d\)\)|FloatPow\((?:ToFloat\(([su]\d+)\), [\d.]+|[\d.]+, ToFloat\(([su]\d+)\))\)"
)
_WORD = re.compile(
    r"((?:[su]|zu[fi])\d+|\d+(\.\d+)?(e[+-]?\d+)?|Max|Min|Integer|Add|Mul|FloorDiv|CleanDiv|CeilDiv|Mod|PythonMod|ToFloat|FloatTrueDiv|IntTrueDiv|TruncToInt|"
    r"CeilToInt|FloorToInt|Equality|Unequality|GreaterThan|LessThan|StrictGreaterThan|StrictLessThan|Eq|Ne|Gt|Ge|Lt|Le|And|Or|Not|True|False|int_oo|oo)"
)
_PLAIN = re.compile(r"[a-zA-Z_0-9,\-. >]{0,40}")  # a rounding mode, a reduction, an equation of einsum
_ASSERTION = re.compile(r"Runtime assertion failed for expression [\w\s<>=+\-*]{1,100} on node '\w+'")
_TREE_TYPES = frozenset({"builtins.dict", "builtins.tuple", "builtins.list", None})


def check_program(program: Any) -> None:
    """Check the document of a program.

    Raises:
        CorruptExportError: it holds what an export does not.
    """
    for key, value in _entries(program):
        if key == "target" and isinstance(value, str) and value:
            if _is_target_of_signature(value):
                continue
            name = _NAME.fullmatch(value)
            if not _OPERATION.fullmatch(value) or (name and any(word in name[1] for word in _FORBIDDEN)):
                raise CorruptExportError(f"it holds the operation {value!r:.80}, which no export of pyro_kd has")
        elif key == "expr_str":
            _check_expression(value)
        elif key == "range_constraints" and isinstance(value, Mapping):
            for name in value:
                _check_expression(name)
        elif key in ("as_string", "as_operator", "as_custom_obj"):
            _check_text(value)
        elif key == "as_strings":
            for text in value:
                _check_text(text)
        elif key in ("in_spec", "out_spec") and isinstance(value, str):
            _check_tree(value)


def check_weights(config: Any, members: Mapping[str, bytes], folder: str) -> None:
    """Check the list of stored tensors: plain memory, no pickles, each as long as its shape says.

    Args:
        config: the document.
        members: the parts of the archive.
        folder: where the tensors are.

    Raises:
        CorruptExportError: there is a pickle, or a tensor is missing or too short.
    """
    for name, entry in config["config"].items():
        if entry["use_pickle"] is not False:
            raise CorruptExportError(f"it holds the tensor {name!r:.80} as a pickle, which could run code")
        path, meta = entry["path_name"], entry["tensor_meta"]
        if f"{folder}/{path}" not in members or not isinstance(meta, dict):
            raise CorruptExportError(f"it lacks the tensor {name!r:.80}")
        sizes = [size["as_int"] for size in meta["sizes"]]
        strides = [stride["as_int"] for stride in meta["strides"]]
        numbers = [*sizes, *strides, meta["storage_offset"]["as_int"]]
        if any(type(number) is not int or not 0 <= number < 2**48 for number in numbers) or len(sizes) != len(strides):
            raise CorruptExportError(f"the shape of the tensor {name!r:.80} is damaged")
        last = meta["storage_offset"]["as_int"] + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
        if all(sizes) and last >= len(members[f"{folder}/{path}"]):
            raise CorruptExportError(f"the tensor {name!r:.80} is shorter than its shape")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All entries of dictionaries in a document, at any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _is_target_of_signature(value: str) -> bool:
    """Whether a text is no name of an operation, but one of a tensor: torch looks only texts with these beginnings up."""
    return not value.startswith(("_operator", "torch", "math", "#"))


def _check_expression(text: Any) -> None:
    if isinstance(text, str):
        text = _FLOAT.sub(r"\1", _SYMBOL.sub(r"\1", text))
        text = _POWER.sub(lambda found: found[1] or found[2] or found[3], text)
    is_plain = isinstance(text, str) and len(text) < 2000 and _EXPRESSION.fullmatch(text) and "**" not in text
    if not is_plain or not all(_WORD.fullmatch(word) for word in re.findall(r"[\w.]+", text)):
        raise CorruptExportError(f"it holds the expression {text!r:.80}, which is no arithmetic of sizes")


def _check_text(text: Any) -> None:
    if text is not None and not (isinstance(text, str) and (_PLAIN.fullmatch(text) or _ASSERTION.fullmatch(text))):
        raise CorruptExportError(f"it holds the text {text!r:.80} as an argument of an operation")


def _check_tree(text: str) -> None:
    """Check a description of nested arguments: dictionaries, tuples and lists alone."""
    if not text:
        return
    for key, value in _entries(json.loads(text)):
        if key == "type" and value not in _TREE_TYPES:
            raise CorruptExportError(f"it holds arguments of type {value!r:.80}")
        if key == "context" and isinstance(value, str) and value not in ("null", ""):
            names = json.loads(value)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CorruptExportError(f"it holds arguments described by {value!r:.80}")
