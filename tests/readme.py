"""The Python of the README, as a reader would run it: used by the tests, and as a script where pyro_kd is installed.

    python readme.py README.md [NUMBER]

runs the first NUMBER blocks, or all of them, one after the other in one namespace, and compares what the first one prints with what the
README shows. Knows nothing of the checkout, so that it can run beside an installed wheel.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

METHOD = "for name in sites)"  # in the five lines that explain the method, which have no programs to run on


def blocks(text: str) -> list[str]:
    """Every Python block but that of the method."""
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if METHOD not in block]


def shown_output(text: str) -> str:
    """What the README shows that the first block prints."""
    return re.search(r"```python\n.*?```\n+```text\n(.*?)```", text, re.S).group(1)


def run(text: str, number: int | None = None) -> dict[str, Any]:
    """Run the first blocks, and return the names that they have bound."""
    names: dict[str, Any] = {"__name__": "readme"}
    for index, block in enumerate(blocks(text)[:number]):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, "README.md", "exec"), names)
        if index == 0 and output.getvalue() != shown_output(text):
            raise AssertionError(f"the first block prints {output.getvalue()!r}, and README shows {shown_output(text)!r}")
    return names


if __name__ == "__main__":
    run(Path(sys.argv[1]).read_text(encoding="utf-8"), *map(int, sys.argv[2:]))
