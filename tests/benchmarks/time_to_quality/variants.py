"""What is compared: the loop written by hand, and the library with its options."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CAPTURES", "LOOP", "Variant", "variants"]

CAPTURES: dict[str, Any] = {
    "off": False,
    "graph": {"backend": None},
    "on": True,
    "background": {"background": True},
    "cached": {"background": True},
    "cudagraphs": {"backend": "cudagraphs"},
}
"""Options of the trainer's ``compile``: none; the graph as it is; inductor at once, or in the background; and the latter with what an
earlier run of the same program has compiled; on a GPU, one CUDA graph of the operations as they are."""

_WORDS = {
    "off": [],
    "graph": ["captured, not compiled"],
    "on": ["captured"],
    "background": ["compiled in the background"],
    "cached": ["compiled before"],
    "cudagraphs": ["one CUDA graph"],
}


@dataclass(frozen=True)
class Variant:
    """One way to train the student.

    Attributes:
        who: ``loop`` or ``library``.
        objective: of the library, by its name among the problem's objectives.
        share: of the loop's steps, after which the schedule of the learning rate ends.
        reuse: how many steps each draw of the teacher serves.
        capture: a name of CAPTURES.
    """

    who: str
    objective: str = "paper"
    share: float = 1.0
    reuse: int = 1
    capture: str = "off"

    @property
    def name(self) -> str:
        """For tables and pictures."""
        words = (
            ["loop"] if self.who == "loop" else ["library", "paper's loss" if self.objective == "paper" else self.objective]
        )
        words += [f"m = {self.reuse}"] * (self.reuse > 1)
        words += _WORDS[self.capture]
        words += [f"{self.share:g} of the steps"] * (self.share != 1)
        return ", ".join(words)

    @property
    def key(self) -> str:
        """For names of files."""
        return self.name.replace(",", "").replace("'s", "").replace(" = ", "").replace(" ", "-")

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


LOOP = Variant("loop")


def variants(
    objectives: Sequence[str], shares: Sequence[float], reuse: Sequence[int], captures: Sequence[str]
) -> list[Variant]:
    """The loop over all of its steps, the loop over each other share, and the library with each combination of options."""
    loops = [LOOP, *(Variant("loop", share=share) for share in shares if share != 1)]
    combined = itertools.product(objectives, shares, captures, reuse)
    return loops + [Variant("library", objective, share, times, capture) for objective, share, capture, times in combined]
