"""The report of the check before training: a table of sites, and all problems."""

from dataclasses import dataclass, field

from pyro_kd.errors import CheckError
from pyro_kd.noise.between import BetweenDraw
from pyro_kd.utils.tables import figure, format_table, html_table

__all__ = ["CheckReport", "Problem", "SiteCheck"]

_HEADER = ["site", "in the student", "kind", "family", "batch | event", "plates", "counts", "noise", "divergence"]
_HEADER += ["computed", "term", "weight"]


@dataclass(frozen=True)
class Problem:
    """An error or a warning.

    Attributes:
        is_error: whether the loss would raise an error. Otherwise it would continue, with or without a warning.
        text: what is wrong, at which site, and what fixes it.
        error: the exception; None for a warning.
    """

    is_error: bool
    text: str
    error: BaseException | None = None


@dataclass(frozen=True)
class SiteCheck:
    """One site of a :class:`CheckReport`. What is unknown, or does not apply, is empty or None.

    Attributes:
        name, student: the teacher's name of the site, and the student's.
        kind: ``"target"``, ``"latent"``, or ``"fresh"`` for a site that the loss's ``fresh`` lists.
        families: the families of the teacher's and the student's distribution.
        batch_shape, event_shape: the shapes of the teacher's distribution.
        plates: names of the plates around the site.
        counts: which of its elements count, and how often: ``"all"``, ``"masked"``, ``"10 times"``, or both of the latter.
        noise: how noise is shared, see ``noise`` of :class:`~pyro_kd.diagnosis.reports.SiteRow`.
        divergence: name of the divergence function.
        analytic: whether the term is in closed form; None where this is unknown.
        term: the value of the term in this run, in the unit of the divergence (nats for kl).
        weight: the factor of the term in the loss.
    """

    name: str
    student: str
    kind: str
    families: tuple[str, str]
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[str, ...]
    counts: str
    noise: str
    divergence: str = ""
    analytic: bool | None = None
    term: float | None = None
    weight: float | None = None

    def _cells(self) -> list[str]:
        shape = " | ".join(" ".join(map(str, sizes)) for sizes in (self.batch_shape, self.event_shape)).strip()
        families = self.families[0] if self.families[0] == self.families[1] else " -> ".join(self.families)
        how = {True: "closed form", False: "Monte Carlo", None: "-"}[self.analytic]
        other = "" if self.student == self.name else self.student
        cells = [self.name, other, self.kind, families, shape, ", ".join(self.plates), self.counts, self.noise]
        return [*cells, self.divergence or "-", how, figure(self.term), figure(self.weight)]


@dataclass(frozen=True)
class CheckReport:
    """The result of :func:`check`. ``print`` shows it as a table with notes.

    Attributes:
        sites: one entry per site, in the teacher's execution order, fresh sites last.
        problems: all problems, errors first.
        between: what the programs draw outside of their sample sites.
        unreached: names of the student's parameters that the loss does not depend on.
        is_captured: whether the loss can be compiled; None if this was not tried.
    """

    sites: tuple[SiteCheck, ...] = ()
    problems: tuple[Problem, ...] = ()
    between: tuple[BetweenDraw, ...] = ()
    unreached: tuple[str, ...] = ()
    is_captured: bool | None = None
    _why_not_captured: str = field(default="", repr=False)

    @property
    def is_ok(self) -> bool:
        """Whether the loss can be trained: there are no errors. There may be warnings."""
        return not self.errors

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems on which the loss would raise an error."""
        return tuple(problem for problem in self.problems if problem.is_error)

    def raise_errors(self) -> "CheckReport":
        """Raise CheckError if there are errors; its message lists all of them. Otherwise return the report itself."""
        if self.errors:
            lines = [f"{number}. {problem.text}" for number, problem in enumerate(self.errors, 1)]
            raise CheckError(
                "\n".join([f"{len(lines)} error{'s' * (len(lines) > 1)} would stop the training:", *lines])
            ) from self.errors[0].error
        return self

    def _notes(self) -> list[str]:
        notes = [f"drawn between sites: {draw}" for draw in self.between]
        if self.unreached:
            notes.append(f"parameters that the loss does not depend on: {', '.join(self.unreached)}")
        if self.is_captured is not None:
            notes.append("can be compiled: " + ("yes" if self.is_captured else f"no: {self._why_not_captured}"))
        notes += [f"{'ERROR' if problem.is_error else 'warning'}: {problem.text}" for problem in self.problems]
        total = len(self.errors)
        return [*notes, "no errors" if total == 0 else f"{total} error{'s' * (total > 1)}"]

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, without the columns that are empty for every site."""
        rows = [site._cells() for site in self.sites]
        shown = [column for column in range(len(_HEADER)) if any(row[column] for row in rows)]
        return [_HEADER[column] for column in shown], [[row[column] for column in shown] for row in rows]

    def __str__(self) -> str:
        table = [format_table(*self._table())] if self.sites else []
        return "\n".join([*table, *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._table(), self._notes())
