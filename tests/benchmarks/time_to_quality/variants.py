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


_STARTS = {"own": [], "teacher": ["from the teacher's weights"], "fitted": ["from fitted layers"]}


@dataclass(frozen=True)
class Variant:
    """One way to train the student.

    Attributes:
        who: ``loop`` or ``library``.
        objective: of the library, by its name among the problem's objectives.
        share: of the loop's steps, after which the schedule of the learning rate ends.
        reuse: how many steps each draw of the teacher serves.
        capture: a name of CAPTURES.
        start: ``own``: weights as torch initialises them; ``teacher``: those of some of the teacher's units; ``fitted``: these units, and
            layers fitted to the teacher's.
    """

    who: str
    objective: str = "paper"
    share: float = 1.0
    reuse: int = 1
    capture: str = "off"
    start: str = "own"

    @property
    def name(self) -> str:
        """For tables and pictures."""
        words = (
            ["loop"] if self.who == "loop" else ["library", "paper's loss" if self.objective == "paper" else self.objective]
        )
        words += [f"m = {self.reuse}"] * (self.reuse > 1)
        words += _WORDS[self.capture]
        words += _STARTS[self.start]
        words += [f"{self.share:g} of the steps"] * (self.share != 1)
        return ", ".join(words)

    @property
    def key(self) -> str:
        """For names of files."""
        return self.name.replace(",", "").replace("'s", "").replace(" = ", "").replace(" ", "-")

    @property
    def compile(self) -> Any:
        """The trainer's option."""
        return CAPTURES[self.capture]

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


LOOP = Variant("loop")


def variants(
    objectives: Sequence[str],
    shares: Sequence[float],
    reuse: Sequence[int],
    captures: Sequence[str],
    starts: Sequence[str] = ("own",),
) -> list[Variant]:
    """The loop over all of its steps, the loop over each other share and start, and the library with each combination of options."""
    loops = [Variant("loop", share=share, start=start) for start, share in itertools.product(starts, shares)]
    combined = itertools.product(objectives, starts, shares, captures, reuse)
    library = [
        Variant("library", objective, share, times, capture, start) for objective, start, share, capture, times in combined
    ]
    return [LOOP, *(variant for variant in loops if variant != LOOP), *library]
