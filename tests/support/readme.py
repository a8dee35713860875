"""The Python of the README, and of other pages, as a reader would run it: used by the tests, and as a script where pyro_kd is installed.

    python readme.py README.md [NUMBER]

runs the first NUMBER blocks, or all of them, one after the other in one namespace. What a block prints is compared with what the page
shows below it, if it shows something. Knows nothing of the checkout, so that it can run beside an installed wheel.
"""

import contextlib
import io
import linecache
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Block(NamedTuple):
    """A block of Python, and the block of text right below it, if there is one."""

    code: str
    output: str | None


def blocks(text: str) -> list[Block]:
    """Every Python block."""
    found = re.findall(r"```python\n(.*?)```\n(?:\n*```text\n(.*?)```)?", text, re.S)
    return [Block(code, output or None) for code, output in found]


def run(text: str, number: int | None = None, name: str = "README.md") -> dict[str, Any]:
    """Run the first blocks, and return the names that they have bound."""
    names: dict[str, Any] = {"__name__": "readme"}
    for block, printed in printed_by(text, number, name, names):
        if block.output is not None and printed != block.output:
            raise AssertionError(f"a block of {name} prints\n{printed}\nand the page shows\n{block.output}")
    return names


def printed_by(text: str, number: int | None, name: str, names: dict[str, Any]) -> Any:
    """Run the first blocks, and yield each with what it prints."""
    for block in blocks(text)[:number]:
        output = io.StringIO()
        linecache.cache[name] = (
            len(block.code),
            None,
            block.code.splitlines(keepends=True),
            name,
        )  # for messages that quote a line
        with contextlib.redirect_stdout(output):
            exec(compile(block.code, name, "exec"), names)
        yield block, output.getvalue()


if __name__ == "__main__":
    run(Path(sys.argv[1]).read_text(encoding="utf-8"), *map(int, sys.argv[2:]))
