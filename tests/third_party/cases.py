"""What every check of a third party's package gives: pairs of programs to distil."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Case", "Programs"]


@dataclass(frozen=True)
class Programs:
    """A teacher and a student, which are methods or modules of the package, and what to distil.

    Attributes:
        teacher: before it is frozen; the student's equal where both are the same object's.
        student: is trained.
        args: of both programs.
        targets: names of the targets, whose values are the teacher's draws.
        options: of the loss.
    """

    teacher: Callable[..., Any]
    student: Callable[..., Any]
    args: tuple[Any, ...]
    targets: Sequence[str]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One program of a package.

    Attributes:
        package: name of its distribution on PyPI.
        program: what it is, in words.
        make: the pair.
    """

    package: str
    program: str
    make: Callable[[], Programs]
