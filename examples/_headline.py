"""The headline table of docs/results.md: one column of each experiment, for local distillation, the paper's loss and the advised one.

What is advised is what docs/objectives.md says of such a model. It is written down here, and not chosen by the figures.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from examples._methods import FORCED, LOCAL, MARGINAL, SURROGATE

__all__ = ["CASES", "Case", "headline"]


class Case(NamedTuple):
    """A line of the table.

    Attributes:
        title: what is distilled, and the measure.
        run, table, column: where the figures are.
        paper, advised: the rows of the paper's loss and of the advised one; that of local distillation is ``local``.
        local: the row of local distillation.
    """

    title: str
    run: str
    table: str
    column: str
    paper: str
    advised: str
    local: str = LOCAL


CHAINS = "error_accumulation_objectives"
CASES = (
    *(
        Case(
            f"real-valued chain of {depth} layers, KL",
            CHAINS,
            "continuous: kl",
            f"L = {depth}",
            f"{SURROGATE}, lambda 1",
            f"{FORCED}, 1/4",
        )
        for depth in (5, 10, 20)
    ),
    *(
        Case(
            f"chain of {depth} counts, KL",
            folder,
            "binomial: kl",
            f"L = {depth}",
            f"{SURROGATE}, lambda 1",
            f"{FORCED}, 1/4, implicit",
        )
        for depth, folder in ((5, CHAINS), (10, CHAINS), (20, "error_accumulation_counts"))
    ),
    *(
        Case(
            f"chain of {depth} layers of bits, KL",
            "error_accumulation_bits",
            "bits: kl",
            f"L = {depth}",
            f"{SURROGATE}, lambda 1",
            f"{MARGINAL}, local for 1/2",
        )
        for depth in (5, 10)
    ),
    *(
        Case(f"Bayesian network {name}, KL of its leaves", f"bayesian_network_{name}", "kl", column, SURROGATE, MARGINAL)
        for name, column in (("child", "width 2, 402 parameters"), ("alarm", "width 2, 569 parameters"))
    ),
    Case("Helmholtz machine, KL", "helmholtz", "figures", "KL(teacher ‖ student)", SURROGATE, MARGINAL),
    Case(
        "hierarchical VAE of digits, FID to the teacher",
        "hierarchical_vae_digits",
        "teacher",
        "FID",
        f"{SURROGATE}, mean W2², 0.1",
        f"{FORCED}, mean W2², 0.1",
        f"{LOCAL}, mean W2², 0.1",
    ),
)


def headline(results: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table, the first row being its head.

    Args:
        results: the JSON of each run by its name.
    """
    made = [["", "local", "the paper's loss", "advised", "advised / local", "what is advised"]]
    for case in CASES:
        cells = results[case.run]["tables"][case.table]["cells"]
        column = cells[0].index(case.column)
        rows = {row[0]: row[column] for row in cells}
        ratio = mean_of(rows[case.advised]) / mean_of(rows[case.local])
        made.append([case.title, rows[case.local], rows[case.paper], rows[case.advised], f"{ratio:.2g}", case.advised])
    return made


def mean_of(cell: str) -> float:
    """The mean in a cell such as ``0.15 ± 0.02``."""
    return float(cell.split(" ±")[0])
