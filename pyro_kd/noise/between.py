r"""The noise that a program draws between its sample sites, shared like that of the sites.

``torch.randn`` in a hand-written reparameterisation, a distribution that is called, functional dropout and ``gumbel_softmax`` draw
random numbers that no ``pyro.sample`` names. They are noise of the program all the same: part of :math:`\epsilon` in
:math:`z_i = g(Pa(z_i), \epsilon)` (Chen et al. 2023, section 3.1). What has no name is paired by its place: between which named
sites it is drawn, and in what order there.

:class:`ProgramTape` lies under a whole program, as a :class:`~pyro_kd.noise.tape.NoiseTape` lies under the sampler of a site.
:class:`StreamWatch` notices at almost no cost whether a program needs one. Both know tensors, and sites by name only.
"""

import random
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import nn

from pyro_kd.errors import UnsupportedNoiseError
from pyro_kd.noise.draw_mode import DrawMode
from pyro_kd.noise.laws import Draw, Kind
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.noise.torch_ops import TRANSFORMS
from pyro_kd.utils import guards
from pyro_kd.utils.locations import place_at_work

__all__ = ["BetweenDraw", "ProgramTape", "StreamWatch", "drawing_for"]

Between = Mapping[str, tuple[Draw, ...]]
"""Raw draws between sites, by the named site before them; ``""`` before the first."""


class BetweenDraw(NamedTuple):
    """One draw between sites.

    Attributes:
        after: the named site before it; ``""`` before the first one.
        op: the torch operation; in brackets what it draws for, where it is not expected to be shared.
        shape: of the noise.
        where: file and line.
        sharing: ``"shared"``, or why it is not: ``"drawn anew"`` where the record holds nothing for it, ``"not drawn by the
            student"``, ``"cannot be shared"`` where torch's operation has no map from noise.
        may_stay: whether it is the first value of a network's parameter, which is drawn once if the program keeps the network.
    """

    after: str
    op: str
    shape: tuple[int, ...]
    where: str
    sharing: str
    may_stay: bool = False

    def __str__(self) -> str:
        place = f"after site {self.after!r}" if self.after else "before the first site"
        return f"{self.op}, shape {self.shape}, {place}, {self.where}: {self.sharing}"


class ProgramTape(DrawMode):
    """Records the raw draws that a program makes outside of its sample sites, or supplies recorded ones in their place.

    The handlers tell it which site the program has reached (:meth:`pass_site`), and when a site's own sampler is at work
    (:meth:`at_site`): what that draws is the site's.

    Args:
        recorded: what another run has drawn between its sites. None records only.
        merged: names of recorded sites that the program lacks: what was drawn after one of them counts as drawn after the site
            before it.

    Attributes:
        draws: what was drawn or supplied, by the site before it.
        found: one :class:`BetweenDraw` each, in the order of the run.
        is_seeded: whether the program has set torch's random state itself, while it was recorded.

    A draw takes, of what is recorded after the same site, the first that no other has taken: of the same operation, or else of
    the same law. Of another shape, it takes the leading entries. Where nothing is left, noise is drawn anew.

    Raises:
        UnsupportedNoiseError: a Dirichlet or Beta is drawn between sites with a gradient, which would be that of another map.
    """

    def __init__(self, recorded: Between | None = None, merged: Container[str] = ()) -> None:
        super().__init__()
        self.draws: dict[str, list[Draw]] = {}
        self.found: list[BetweenDraw] = []
        self._recorded = None if recorded is None else _merged(recorded, merged)
        self._sites_of_record = set(recorded) if recorded else None
        self._site = ""
        self._is_at_site = False
        self._elsewhere: tuple[Any, ...] = ()
        self._follows_streams = recorded is None and not guards.is_active()
        self._streams: list[torch.Tensor] = []
        self.is_seeded = False

    def pass_site(self, name: str) -> None:
        """The program has reached a named site; what it draws from now on comes after it."""
        if self._sites_of_record is None or name in self._sites_of_record:
            self._site = name
            self.draws.setdefault(name, [])

    def __enter__(self) -> "ProgramTape":
        self._elsewhere = _states_elsewhere()
        self._streams = states() if self._follows_streams else []
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name, before, after in zip(_ELSEWHERE, self._elsewhere, _states_elsewhere(), strict=True):
            if before != after:
                self.found.append(BetweenDraw(self._site, name, (), "an unknown place", "cannot be shared"))

    @contextmanager
    def at_site(self) -> Iterator[None]:
        """Leave alone what is drawn meanwhile."""
        before, self._is_at_site = self._is_at_site, True
        with nullcontext() if before else self._streams_followed():
            try:
                yield
            finally:
                self._is_at_site = before

    @contextmanager
    def _streams_followed(self) -> Iterator[None]:
        """Around what may draw: between such places, only the program itself moves the random streams."""
        if self._follows_streams and self._streams and have_moved(self._streams):
            self.is_seeded = True
        yield
        if self._follows_streams:
            self._streams = states()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the draw of a random operation, unless it is a site's own."""
        if self._is_at_site:
            return func(*args, **kwargs)
        with self._streams_followed():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = sys._getframe()
        if not _draws(func, args, kwargs) or _is_initialisation(frame):
            return func(*args, **kwargs)
        op, where = func.overloadpacket.__name__ + _PURPOSE.get(), place_at_work(frame)
        has_nothing = self._recorded is not None and not self._recorded.get(self._site)
        if func not in TRANSFORMS or has_nothing:  # then as without a tape: a resumed run must draw what it would have drawn
            result = func(*args, **kwargs)
            shape = next((tuple(x.shape) for x in (result, *args) if isinstance(x, torch.Tensor)), ())
            sharing = "drawn anew" if func in TRANSFORMS else "cannot be shared"
            self.found.append(BetweenDraw(self._site, op, shape, where, sharing, _is_within(frame, _NN_INIT)))
            return result
        tape = _OneDraw(self, op, where)
        result = tape.run(func, args, kwargs)
        if tape.has_foreign_derivative and self._recorded is not None:  # gradients are off inside of torch's own derivatives
            raise UnsupportedNoiseError(
                f"{where} draws from a Dirichlet or Beta outside of a sample site, and torch returns the derivative of another map "
                "for it than the one that shares noise. Make it a site: pyro.sample('name', ...), or draw it under torch.no_grad()."
            )
        return result

    def take(self, kind: Kind, shape: torch.Size, op: str) -> Draw | None:
        """What the record holds for the next draw after this site."""
        left = [] if self._recorded is None else self._recorded.get(self._site, [])
        fitting = [draw for draw in left if len(draw.noise.shape) == len(shape) and _fits(draw, kind, shape)]
        draw = next((draw for draw in fitting if draw.op == op), None) or next(
            (draw for draw in fitting if draw.kind is kind), None
        )
        if draw is not None:
            left[:] = [other for other in left if other is not draw]
        return draw

    def keep(self, draw: Draw, where: str, is_shared: bool) -> None:
        """Note a draw that was made or supplied."""
        self.draws.setdefault(self._site, []).append(draw)
        sharing = "shared" if is_shared or self._recorded is None else "drawn anew"
        self.found.append(BetweenDraw(self._site, draw.op, tuple(draw.noise.shape), where, sharing))

    def recorded(self) -> dict[str, tuple[Draw, ...]]:
        """The draws, by the site before them; nothing where there are none."""
        is_empty = not any(self.draws.values())
        return {} if is_empty else {site: tuple(draws) for site, draws in self.draws.items()}

    def left_over(self) -> list[BetweenDraw]:
        """What the record holds and the program has not taken."""
        return [
            BetweenDraw(site, draw.op, tuple(draw.noise.shape), draw.where, "not drawn by the student")
            for site, draws in (self._recorded or {}).items()
            for draw in draws
        ]


class _OneDraw(NoiseTape):
    """The tape of a single operation: what it draws is kept by the program's tape."""

    def __init__(self, program: ProgramTape, op: str, where: str) -> None:
        super().__init__()
        self._program = program
        self._op = op
        self._where = where

    def draw(self, kind: Kind, shape: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        recorded = self._program.take(kind, torch.Size(shape), self._op)
        self._recorded = None if recorded is None else (recorded,)
        self.draws = []
        noise = super().draw(kind, shape, *args, **kwargs)
        self._program.keep(self.draws[0].made(self._op, self._where), self._where, recorded is not None)
        return noise

    def _same_but_event(self, kind: Kind, shape: torch.Size, recorded: torch.Size) -> bool:
        return True  # _fits has looked


def _fits(draw: Draw, kind: Kind, shape: torch.Size) -> bool:
    """Whether noise can serve for a draw: of another shape its leading entries do, unless it is a permutation."""
    if Kind.PERMUTATION in (draw.kind, kind):
        return draw.kind is kind and draw.noise.shape == shape
    return True


def _merged(recorded: Between, merged: Container[str]) -> dict[str, list[Draw]]:
    found: dict[str, list[Draw]] = {"": []}
    site = ""
    for name, draws in recorded.items():
        site = site if name in merged else name
        found.setdefault(site, []).extend(draws)
    return found


def _draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call of a random operation draws at all: with a dropout of 0, or outside of training, it does not."""
    schema = func._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(schema, args, strict=False)} | dict(kwargs)
    if given.get("train", given.get("training", True)) is False:
        return False
    rates = [given[name] for name in ("dropout_p", "dropout") if name in given]
    return not rates or any(rate != 0 for rate in rates)


_ELSEWHERE = ("Python's random", "numpy.random")


def _states_elsewhere() -> tuple[Any, ...]:
    """Where the global random streams outside of torch stand."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (name, np.asarray(keys).tobytes(), *rest)


_PURPOSE: ContextVar[str] = ContextVar("purpose", default="")


@contextmanager
def drawing_for(purpose: str) -> Iterator[None]:
    """Say what is drawn for meanwhile. It is shared like other draws; where it is not, that is as it should be, and goes unsaid."""
    token = _PURPOSE.set(f" ({purpose})")
    try:
        yield
    finally:
        _PURPOSE.reset(token)


_INITIALISERS = frozenset({"_setup_prototype", "initialize_parameters", "_infer_parameters"})
_PARAM_STORE = str(Path(pyro.params.param_store.__file__))
_NN_INIT = str(Path(nn.init.__file__))
_MAKES_NETWORKS = AutoNormalizingFlow.get_posterior.__code__  # at the first call; its sites are drawn elsewhere


def _is_initialisation(frame: FrameType | None) -> bool:
    """Whether values are drawn that are there to stay: a parameter's in Pyro's store, a lazy module's, an autoguide's set-up."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in _INITIALISERS or code.co_filename == _PARAM_STORE or code is _MAKES_NETWORKS:
            return True
        frame = frame.f_back
    return False


def _is_within(frame: FrameType | None, file: str) -> bool:
    """Whether a function of this file is at work."""
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False


class StreamWatch:
    """Notices whether a program draws from torch's global random streams outside of its sample sites.

    Meanwhile the sites draw from generators that go on where the global streams are (:meth:`generator`), and the global streams
    stand still unless somebody else draws from them. Afterwards they stand where the sites' generators have got to, so that
    the watch changes no draw; or, where :attr:`moved`, where they stood before, so that the program can be run again.

    Attributes:
        moved: whether something was drawn outside of the sites. Draws from a generator of the program's own are not seen.
    """

    def __init__(self) -> None:
        self.moved = False
        self._streams = _global_streams()
        self._before = [stream.get_state() for stream in self._streams]
        self._own = [
            torch.Generator(stream.device).set_state(state)
            for stream, state in zip(self._streams, self._before, strict=True)
        ]

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What a site's noise on this device is drawn from."""
        return next((own for own in self._own if own.device == device or own.device.type == device.type == "cpu"), None)

    @contextmanager
    def at_site(self) -> Iterator[None]:
        """Let a site's own sampler draw from the global streams, as it will, without being noticed."""
        parked = [stream.get_state() for stream in self._streams]
        for stream, own in zip(self._streams, self._own, strict=True):
            stream.set_state(own.get_state())
        try:
            yield
        finally:
            for stream, own, state in zip(self._streams, self._own, parked, strict=True):
                own.set_state(stream.get_state())
                stream.set_state(state)

    def __enter__(self) -> "StreamWatch":
        return self

    def __exit__(self, exception: Any, *details: Any) -> None:
        self.moved = any(
            not _equal(stream.get_state(), before) for stream, before in zip(self._streams, self._before, strict=True)
        )
        keep = self._before if self.moved else [own.get_state() for own in self._own]
        for stream, state in zip(self._streams, keep, strict=True):
            stream.set_state(state)


def unshared(found: Sequence[BetweenDraw], role: str = "student") -> str:
    """A sentence on the draws between sites that teacher and student do not share, or nothing where there are none.

    Draws whose purpose is said (:func:`drawing_for`) are not expected to be shared.
    """
    texts = {
        "drawn anew": f"the {role} draws these outside of its sample sites, and the teacher does not: they are noise of its own",
        "not drawn by the student": "the teacher draws these outside of its sample sites, and the student does not",
        "cannot be shared": "these are drawn outside of sample sites by a generator or an operation whose noise cannot be shared",
    }
    parts = []
    for sharing, text in texts.items():
        draws = [f"{d.op} at {d.where}" for d in found if d.sharing == sharing and not d.op.endswith(")")]
        if draws:
            parts.append(f"{text}: {', '.join(dict.fromkeys(draws))}")
    if not parts:
        return ""
    return (
        "; ".join(parts)
        + ". To share a draw, make it in the same order between the same sites of both programs, or name it: "
        "pyro.sample('name', ...). Dropout of a student in train mode is fine as it is."
    )


def have_moved(before: Sequence[torch.Tensor]) -> bool:
    """Whether torch's global random streams stand elsewhere than at these states (:func:`states`)."""
    return any(not _equal(stream.get_state(), state) for stream, state in zip(_global_streams(), before, strict=False))


def states() -> list[torch.Tensor]:
    """Where torch's global random streams stand."""
    return [stream.get_state() for stream in _global_streams()]


def _global_streams() -> list[torch.Generator]:
    streams = [torch.default_generator]
    if torch.cuda.is_initialized():
        streams += torch.cuda.default_generators
    return streams


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.numpy().tobytes() == other.numpy().tobytes()  # a quarter of the time of torch.equal
