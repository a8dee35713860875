"""Text tables of reports."""

from collections.abc import Sequence

from pyro_kd.metrics import Estimate

__all__ = ["figure", "format_table", "plus_minus"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a rule, the first to the left, the others to the right."""
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


def figure(value: float | None) -> str:
    """A number to four significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def plus_minus(estimate: Estimate | None) -> str:
    """Mean and standard error, or a dash for None."""
    return "-" if estimate is None else f"{estimate.mean:.4g} ± {estimate.standard_error:.2g}"
