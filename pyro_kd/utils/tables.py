"""Tables of reports: as text, and as HTML for notebooks. Knows strings and numbers."""

import html
import math
from collections.abc import Iterable, Sequence

from pyro_kd.utils.estimate import Estimate

__all__ = ["figure", "format_table", "html_table", "plus_minus"]


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A header, a rule, and rows. The first column is left-aligned, and all others are right-aligned."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(line.rstrip() for line in lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """The same as an HTML table, followed by one paragraph per note."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ["left"] + ["right"] * (len(cells) - 1)
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>' for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>{below}"


def figure(value: float | None) -> str:
    """A number with four significant digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def plus_minus(estimate: Estimate | None) -> str:
    """Mean and standard error; the mean alone if the error is NaN; a dash for None."""
    if estimate is None:
        return "-"
    mean = figure(estimate.mean)
    return mean if math.isnan(estimate.standard_error) else f"{mean} ± {estimate.standard_error:.2g}"
