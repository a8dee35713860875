"""Runs of a program as the export sees it: drawing on recorded noise, or as a function of noise that is given as inputs.

Every run draws the targets, keeps the values of other observed sites, is in evaluation mode, and changes nothing. Knows programs and
noise; no graphs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_kd.errors import PyroKDError, UnsupportedExportError, UnsupportedNoiseError, listing
from pyro_kd.export.arguments import Arguments, dtype_name
from pyro_kd.export.description import ROWS, NoiseInput, Shape
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.losses.targets import TargetMessenger, Targets
from pyro_kd.noise.laws import Draw, NoiseLaw
from pyro_kd.noise.messengers import RecordNoiseMessenger, ReplayNoiseMessenger
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.sites.tracing import get_trace
from pyro_kd.utils.display import first_line
from pyro_kd.utils.randomness import keeping_random_state

__all__ = [
    "InputMessenger",
    "Run",
    "Slot",
    "check_repeats",
    "in_evaluation",
    "keeping_attributes",
    "record_run",
    "runs_to_verify",
    "slots_of",
    "value_at",
]


@dataclass(frozen=True)
class Run:
    """One run of a program on recorded noise.

    Attributes:
        trace: of the run.
        noise: that it has drawn.
        targets: names of the targets.
    """

    trace: Trace
    noise: NoiseRecord
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """Where an input of noise goes.

    Attributes:
        input: the description.
        draw: an example, whose noise has the shape that the program asks for.
        place: number among the draws of its site.
        is_between: whether the program draws it after the site, and not the site's sampler.
        merged: the dimension of the input that the sampler merges with the next one; None if the shapes agree.
    """

    input: NoiseInput
    draw: Draw
    place: int
    is_between: bool
    merged: int | None

    def as_input(self, noise: Tensor, rows: int) -> Tensor:
        """Noise in the shape that the sampler asks for, as the input for a number of rows."""
        noise = noise.float() if noise.dtype is torch.bfloat16 else noise
        return noise if self.merged is None else noise.unflatten(self.merged, (rows, -1))

    def as_noise(self, given: Tensor) -> Tensor:
        """The input in the shape that the sampler asks for."""
        dtype = self.draw.noise.dtype
        if dtype is torch.bfloat16:
            given = given.to(dtype)
            if self.draw.law is NoiseLaw.UNIFORM:  # which must not be rounded to 1
                given = given.clamp(max=1 - torch.finfo(dtype).eps / 2)
        return given if self.merged is None else given.flatten(self.merged, self.merged + 1)


@contextmanager
def in_evaluation(program: Callable[..., Any]) -> Iterator[None]:
    """Run a program in evaluation mode, out of sight of handlers; the random streams end as they were."""
    with ExitStack() as stack:
        stack.enter_context(poutine.block())
        stack.enter_context(keeping_random_state())
        stack.enter_context(evaluation_mode(program))
        yield


@contextmanager
def keeping_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the attributes of modules back at the end of the context: a trace leaves tensors without values in those that it sets."""
    before = [(vars(module), dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for now, attributes in before:
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)


def record_run(program: Callable[..., Any], arguments: Arguments, rows: int, targets: Targets) -> Run:
    """Run a program on new noise, and record it.

    Raises:
        UnsupportedNoiseError: the noise of a site, or of a draw between sites, cannot be recorded.
        UnsupportedExportError: the program fails with another number of rows than the example's.
    """
    finder, recorder = TargetMessenger(targets), RecordNoiseMessenger()
    args, kwargs = arguments.call(rows, arguments.resized(rows))
    try:
        with recorder as noise:
            trace = get_trace(finder(program), args, kwargs)
    except PyroKDError:
        raise
    except Exception as error:
        if arguments.rows in (None, rows):
            raise
        raise UnsupportedExportError(
            f"the program fails with {rows} rows in place of {arguments.rows} ({type(error).__name__}: {first_line(error):.200}). "
            + _REMEDY
        ) from error
    if noise.lost_between:
        raise UnsupportedNoiseError(
            f"the program draws outside of its sample sites what cannot be an input: {listing(map(str, noise.lost_between))}. "
            "Draw with torch, or make it a site: pyro.sample('name', ...)."
        )
    if noise.is_seeded or (recorder.program_tape is not None and recorder.program_tape.has_own_generator):
        raise UnsupportedExportError(
            "the program sets torch's random stream, or draws from a torch.Generator of its own. What it draws then is the same in "
            "every run, and would be new noise in each run of the exported program. Draw it once, before the program, and keep it in "
            "a buffer."
        )
    return Run(trace, noise, tuple(finder.names))


def runs_to_verify(program: Callable[..., Any], arguments: Arguments, targets: Targets) -> list[tuple[int, Run]]:
    """Runs to compare an exported program with, two for each number of rows: that of the example, one, and more than the example's.

    A single row is left out where the program does not run on it. Where it does, it may take a path of its own.
    """
    number = arguments.rows or 0
    runs = [(number, record_run(program, arguments, number, targets)) for _ in range(2)]
    if number > 1:
        with suppress(UnsupportedExportError):
            runs += [(1, record_run(program, arguments, 1, targets)) for _ in range(2)]
    more = 2 * number + 1
    return runs + [(more, record_run(program, arguments, more, targets)) for _ in range(2 if number else 0)]


def check_repeats(program: Callable[..., Any], arguments: Arguments, targets: Targets) -> None:
    """Run a program twice on the same noise.

    Raises:
        UnsupportedExportError: it does not give the same, such as a program that counts its runs.
    """
    rows = arguments.rows or 0
    first = record_run(program, arguments, rows, targets)
    args, kwargs = arguments.call(rows, arguments.resized(rows))
    with ReplayNoiseMessenger(first.noise, looks_between=True):
        again = get_trace(TargetMessenger(targets)(program), args, kwargs)
    for name, site in first.trace.nodes.items():
        values = [trace.nodes[name]["value"] for trace in (first.trace, again)] if name in again.nodes else []
        if site["type"] == "sample" and isinstance(site["value"], Tensor) and not (values and _is_close(*values)):
            raise UnsupportedExportError(
                f"the program gives site {name!r} another value when it runs again on the same noise: a run changes something that "
                "the next one uses, and a graph always does the same. Pass it as an argument."
            )


def _is_close(one: Any, two: Any) -> bool:
    return (
        isinstance(two, Tensor)
        and one.shape == two.shape
        and torch.allclose(one.double(), two.double(), rtol=1e-3, atol=1e-6, equal_nan=True)
    )


def value_at(trace: Trace, name: str) -> Tensor:
    """The value of a site."""
    value = trace.nodes[name]["value"]
    assert isinstance(value, Tensor)
    return value


def slots_of(noise: NoiseRecord, grown: NoiseRecord, rows: int, more: int) -> list[Slot]:
    """The inputs of noise, from the noise of two runs.

    Args:
        noise: of a run.
        grown: of a run with another number of rows.
        rows, more: the numbers of rows of the two.

    Raises:
        UnsupportedExportError: the runs differ in more than the sizes that grow with the number of rows.
    """
    slots: list[Slot] = []
    names: set[str] = set()
    for is_between in (False, True):
        first, second = (record.between if is_between else record for record in (noise, grown))
        if list(first) != list(second):
            other = sorted(set(first) ^ set(second))
            raise UnsupportedExportError(
                f"the sites of the program depend on the number of rows, or on what it draws: with {rows} rows it has "
                f"{listing(first)}, with {more} rows {listing(second)}{f', which differ in {listing(other)}' if other else ''}. "
                + _REMEDY
            )
        for site, draws in first.items():
            if len(draws) != len(second[site]):
                raise UnsupportedExportError(
                    f"site {site!r} draws {len(draws)} times in one run, and {len(second[site])} times in another: its sampler "
                    "draws again what it rejects, or draws row by row. A graph has a fixed number of operations. Register a sampler "
                    "with a fixed number of draws, @pyro_kd.register_sampler."
                )
            for place, (draw, other_draw) in enumerate(zip(draws, second[site], strict=True)):
                law = draw.law.name.lower()
                stem = f"after {site or 'start'}/{law}" if is_between else f"{site}/{law}"
                name, number = stem, 1
                while name in names:
                    number += 1
                    name = f"{stem}_{number}"
                names.add(name)
                shape, merged = _open_shape(name, draw, other_draw, rows, more)
                dtype = dtype_name(draw.noise)  # NumPy, which draws the inputs, has no bfloat16
                entry = NoiseInput(name, shape, "float32" if dtype == "bfloat16" else dtype, site, law)
                slots.append(Slot(entry, draw, place, is_between, merged))
    return slots


_REMEDY = (
    "Choose example arguments in which nothing but the number of rows has this number as a value or as a size; use pyro.plate as a "
    "context, not as a loop; or fix all sizes: fixed=True."
)


def _open_shape(name: str, draw: Draw, grown: Draw, rows: int, more: int) -> tuple[Shape, int | None]:
    """The shape of an input, with a symbol for the number of rows; and the dimension that the sampler merges with the next."""
    one, two = draw.noise.shape, grown.noise.shape
    if draw.law is not grown.law or len(one) != len(two):
        raise UnsupportedExportError(
            f"noise {name!r} is {draw.describe()} in one run, and {grown.describe()} in another with {more} rows. {_REMEDY}"
        )
    shape: list[int | str] = []
    merged = None
    for dim, (small, large) in enumerate(zip(one, two, strict=True)):
        if small == large:
            shape.append(small)
        elif small == rows and large == more:
            shape.append(ROWS)
        elif (
            merged is None and draw.law is not NoiseLaw.PERMUTATION and (small // rows) * more == large and not small % rows
        ):
            merged = dim
            shape += [ROWS, small // rows]
        else:
            raise UnsupportedExportError(
                f"noise {name!r} has shape {tuple(one)} with {rows} rows, and {tuple(two)} with {more}: a size that is neither "
                f"fixed nor a multiple of the number of rows. {_REMEDY}"
            )
    return tuple(shape), merged


class InputMessenger(ReplayNoiseMessenger):
    """Runs a program on noise that is given, all of it and no other, so that no draw is made anew.

    Args:
        slots: the inputs of noise.
        noise: the noise, by name of the input.

    Attributes:
        site: the site whose sampler runs, or the last one that the program has reached.
        family: of the site's distribution.
        is_sampling: whether its sampler runs.
    """

    def __init__(self, slots: Sequence[Slot], noise: Mapping[str, Tensor]) -> None:
        record = NoiseRecord()
        for slot in slots:
            mine = record.between if slot.is_between else record._draws
            given = slot.as_noise(noise[slot.input.name])
            mine[slot.input.site] = (*mine.get(slot.input.site, ()), replace(slot.draw, noise=given))
        super().__init__(record, looks_between=True)
        self.site, self.family, self.is_sampling = "", "", False
        self._tapes: dict[str, _InputTape] = {}

    def _sample(self, msg: Any) -> None:
        self.site, self.family, self.is_sampling = str(msg["name"]), type(msg["fn"]).__name__, True
        super()._sample(msg)
        self.is_sampling = False

    def _tape(self, name: str, fn: Any) -> NoiseTape | None:
        if draws_nothing(fn):
            return None
        if name not in self.noise:
            raise UnsupportedExportError(
                f"site {name!r} is none of the example's: the sites of the program, or their names, depend on values, as those in "
                "a loop over a plate do. Use pyro.plate as a context, not as a loop."
            )
        self._tapes[name] = _InputTape(self.noise[name])
        return self._tapes[name]

    def check(self) -> None:
        """Raise UnsupportedExportError if not all noise was used, or if the program drew more of it between sites."""
        for site, draws in self.noise.items():
            tape = self._tapes.get(site)
            if len(draws) != (0 if tape is None else len(tape.draws)):
                raise UnsupportedExportError(f"site {site!r} {_CHANGES}")
        foreign = [draw for draw in self.between if draw.sharing != "shared"]
        if foreign and all(draw.sharing == "not drawn by the student" for draw in foreign):
            raise UnsupportedExportError(
                "the program draws inside of one of torch's own functions, such as functional.dropout or gumbel_softmax, which an "
                f"export cannot see: {listing(f'{draw.op} at {draw.where}' for draw in foreign)}. Make the draw a site, or write it "
                "out: torch.bernoulli(...), torch.empty_like(x).exponential_()."
            )
        if foreign:
            raise UnsupportedExportError(f"the program {_CHANGES}: {listing(map(str, foreign))}")


_CHANGES = "does not draw the same noise in every run"


class _InputTape(NoiseTape):
    """Supplies the noise of one site, and never draws."""

    def __init__(self, given: Sequence[Draw]) -> None:
        super().__init__()
        self._given = given

    def draw(
        self,
        law: NoiseLaw,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        op: str,
        generator: Any = None,
    ) -> Tensor:
        if len(self.draws) == len(self._given):
            raise UnsupportedNoiseError(f"it draws once more ({op}) than in the example")
        draw = self._given[len(self.draws)]
        if draw.law is not law:
            raise UnsupportedNoiseError(f"it asks for {law.value} noise ({op}), and for {draw.law.value} in the example")
        self.draws.append(draw)
        return draw.noise.to(dtype=dtype, device=device)
