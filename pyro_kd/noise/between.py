r"""The noise that a program draws between its sample sites, which is shared as the noise of sites is.

``torch.randn`` in a hand-written reparameterisation, a call of a distribution, functional dropout and ``gumbel_softmax`` draw
random numbers that no ``pyro.sample`` names. They are part of the program's noise :math:`\epsilon` in
:math:`z_i = g(Pa(z_i), \epsilon)` all the same (Chen et al. 2023, section 3.1). Having no names, they are paired by place: between
which named sites they are drawn, and in which order.

:class:`ProgramTape` lies under a whole program, as a :class:`~pyro_kd.noise.tape.NoiseTape` lies under the sampler of a site.
:class:`~pyro_kd.noise.streams.StreamWatch` notices, at almost no cost, whether a program needs one. Knows tensors, and sites by
name only.
"""

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import nn

from pyro_kd.errors import UnsupportedNoiseError
from pyro_kd.noise.draw_mode import DrawMode
from pyro_kd.noise.laws import Draw, NoiseLaw
from pyro_kd.noise.streams import OTHER_STREAMS, states_of_others
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.noise.torch_ops import TRANSFORMS
from pyro_kd.utils import guards
from pyro_kd.utils.locations import place_at_work
from pyro_kd.utils.randomness import have_moved, stream_states
from pyro_kd.utils.torch_internals import schema_arguments

__all__ = ["FOREIGN", "LOST", "BetweenDraw", "ProgramTape", "drawing_for", "draws"]

FOREIGN = "not drawn by torch"
"""Why the noise of Python's and NumPy's generators is not shared."""

LOST = frozenset(("cannot be shared", FOREIGN))
"""How draws that a record does not hold are marked."""

Between = Mapping[str, tuple[Draw, ...]]
"""Raw draws between sites, by the named site before them; ``""`` before the first."""


class BetweenDraw(NamedTuple):
    """One draw between sites.

    Attributes:
        after: the named site before it; ``""`` before the first site.
        op: the torch operation, followed by its purpose in brackets if the draw need not be shared.
        shape: of the noise.
        where: file and line; the place among the sites if it is not torch that draws.
        sharing: ``"shared"``, or why not: ``"drawn anew"`` if the record holds nothing for it, ``"not drawn by the student"``, or
            ``"cannot be shared"`` if torch's operation has no map from noise, or :data:`FOREIGN` if it is not torch that draws.
        may_stay: whether it initialises a network's parameter, and so happens only once if the program keeps the network.
    """

    after: str
    op: str
    shape: tuple[int, ...]
    where: str
    sharing: str
    may_stay: bool = False

    def __str__(self) -> str:
        if self.sharing == FOREIGN:
            return f"{self.op}, {self.where}: {self.sharing}"
        return f"{self.op}, shape {self.shape}, {_after(self.after)}, {self.where}: {self.sharing}"


class ProgramTape(DrawMode):
    """Records the raw draws that a program makes outside of its sample sites, or supplies recorded ones in their place.

    The handlers report each site that the program reaches (:meth:`pass_site`), and keep the tape from the draws of a site's own
    sampler (:meth:`at_site`).

    Args:
        recorded: what a different run has drawn between its sites. None records only.
        merged: names of recorded sites that the program lacks. What was drawn after one of them counts as drawn after the site
            before it.

    Attributes:
        draws: what was drawn or supplied, by the site before it.
        found: a :class:`BetweenDraw` for each, in the order of the run.
        is_seeded: whether the program set torch's random state itself while it was recorded.
        has_own_generator: whether it drew from a ``torch.Generator`` of its own.

    Of the draws recorded after the same site, each new draw takes the first free one of the same operation, or else of the same
    law. If the shapes differ, it shares the leading entries. If nothing is left, noise is drawn anew.

    Raises:
        UnsupportedNoiseError: a Dirichlet or Beta is drawn between sites with a gradient, which would belong to a different map.
    """

    def __init__(self, recorded: Between | None = None, merged: Container[str] = ()) -> None:
        super().__init__()
        self.draws: dict[str, list[Draw]] = {}
        self.found: list[BetweenDraw] = []
        self._recorded = None if recorded is None else _merged(recorded, merged)
        self._sites_of_record = set(recorded) if recorded else None
        self._site = ""
        self._is_at_site = False
        self._other_states: tuple[Any, ...] = ()
        self._first_states: tuple[Any, ...] = ()
        self._follows_streams = recorded is None and not guards.is_active()
        self._streams: list[torch.Tensor] = []
        self.is_seeded = self.has_own_generator = False

    def pass_site(self, name: str) -> None:
        """Note that the program has reached a named site: what it draws from now on comes after that site."""
        if self._sites_of_record is None or name in self._sites_of_record:
            self._site = name
            self.draws.setdefault(name, [])

    def __enter__(self) -> "ProgramTape":
        self._other_states = self._first_states = states_of_others()
        self._streams = stream_states() if self._follows_streams else []
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._look_at_other_streams()
        still = [
            name
            for name, *both in zip(OTHER_STREAMS, self._first_states, self._other_states, strict=True)
            if both[0] == both[1]
        ]
        # A program that seeds itself and sets the streams back has noise of its own in no run.
        self.found = [draw for draw in self.found if draw.sharing != FOREIGN or draw.op not in still]

    @contextmanager
    def at_site(self) -> Iterator[None]:
        """Leave the draws inside the context alone: they belong to a site."""
        before, self._is_at_site = self._is_at_site, True
        if not before:
            self._look_at_other_streams()
        with nullcontext() if before else self._streams_followed():
            try:
                yield
            finally:
                self._is_at_site = before
                if not before:
                    self._other_states = states_of_others()

    def _look_at_other_streams(self) -> None:
        """Note where the streams of Python and NumPy have moved since the last site."""
        now = states_of_others()
        for name, before, after in zip(OTHER_STREAMS, self._other_states, now, strict=True):
            if before != after:
                self.found.append(BetweenDraw(self._site, name, (), _after(self._site), FOREIGN))
        self._other_states = now

    @contextmanager
    def _streams_followed(self) -> Iterator[None]:
        """Stands around whatever may draw: outside of it, only the program itself moves the random streams."""
        if self._follows_streams and self._streams and have_moved(self._streams):
            self.is_seeded = True
        yield
        if self._follows_streams:
            self._streams = stream_states()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the draw of a random operation, unless it belongs to a site."""
        if self._is_at_site:
            return func(*args, **kwargs)
        self.has_own_generator |= any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
        with self._streams_followed():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = sys._getframe()
        if not draws(func, args, kwargs) or _is_initialisation(frame):
            return func(*args, **kwargs)
        op, where = func.overloadpacket.__name__ + _PURPOSE.get(), place_at_work(frame)
        has_nothing = self._recorded is not None and not self._recorded.get(self._site)
        if func not in TRANSFORMS or has_nothing:  # as without a tape: a resumed run must draw what it would have drawn
            result = func(*args, **kwargs)
            shape = next((tuple(x.shape) for x in (result, *args) if isinstance(x, torch.Tensor)), ())
            sharing = "drawn anew" if func in TRANSFORMS else "cannot be shared"
            self.found.append(BetweenDraw(self._site, op, shape, where, sharing, _is_within(frame, _NN_INIT)))
            return result
        tape = _OneDraw(self, op, where)
        result = tape.run(func, args, kwargs)
        if tape.has_foreign_derivative and self._recorded is not None:  # gradients are off inside of torch's own derivatives
            raise UnsupportedNoiseError(
                f"{where} draws from a Dirichlet or Beta outside of a sample site. Torch's derivative of such a draw is not that of "
                "the map that shares noise. Make it a site: pyro.sample('name', ...), or draw it under torch.no_grad()."
            )
        return result

    def take(self, law: NoiseLaw, shape: torch.Size, op: str) -> Draw | None:
        """Take the recorded draw that fits the next draw after this site; None if there is none."""
        left = [] if self._recorded is None else self._recorded.get(self._site, [])
        fitting = [draw for draw in left if len(draw.noise.shape) == len(shape) and _fits(draw, law, shape)]
        draw = next((draw for draw in fitting if draw.op == op), None) or next(
            (draw for draw in fitting if draw.law is law), None
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
        """The draws, by the site before them; an empty dictionary if there are none."""
        is_empty = not any(self.draws.values())
        return {} if is_empty else {site: tuple(draws) for site, draws in self.draws.items()}

    def left_over(self) -> list[BetweenDraw]:
        """The recorded draws that the program has not taken."""
        return [
            BetweenDraw(site, draw.op, tuple(draw.noise.shape), draw.where, "not drawn by the student")
            for site, draws in (self._recorded or {}).items()
            for draw in draws
        ]


class _OneDraw(NoiseTape):
    """The tape under a single operation, which hands its draws to the program's tape."""

    def __init__(self, program: ProgramTape, op: str, where: str) -> None:
        super().__init__()
        self._program = program
        self._op = op
        self._where = where

    def draw(self, law: NoiseLaw, shape: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        recorded = self._program.take(law, torch.Size(shape), self._op)
        self._recorded = None if recorded is None else (recorded,)
        self.draws = []
        noise = super().draw(law, shape, *args, **kwargs)
        self._program.keep(self.draws[0].made(self._op, self._where), self._where, recorded is not None)
        return noise

    def _same_but_event(self, law: NoiseLaw, shape: torch.Size, recorded: torch.Size) -> bool:
        return True  # _fits has compared them


def _fits(draw: Draw, law: NoiseLaw, shape: torch.Size) -> bool:
    """Whether recorded noise can serve for a draw of this law and shape. Shapes may differ, but not for permutations."""
    if NoiseLaw.PERMUTATION in (draw.law, law):
        return draw.law is law and draw.noise.shape == shape
    return True


def _merged(recorded: Between, merged: Container[str]) -> dict[str, list[Draw]]:
    found: dict[str, list[Draw]] = {"": []}
    site = ""
    for name, draws in recorded.items():
        site = site if name in merged else name
        found.setdefault(site, []).extend(draws)
    return found


def draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call of a random operation draws: with a dropout of 0, or outside of training, it does not."""
    schema = schema_arguments(func)
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(schema, args, strict=False)} | dict(kwargs)
    if given.get("train", given.get("training", True)) is False:
        return False
    rates = [given[name] for name in ("dropout_p", "dropout") if name in given]
    return not rates or any(rate != 0 for rate in rates)


_PURPOSE: ContextVar[str] = ContextVar("purpose", default="")


@contextmanager
def drawing_for(purpose: str) -> Iterator[None]:
    """Name the purpose of the draws in the context. They are shared if they can be, and are not reported if they cannot."""
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
    """Whether a parameter gets its first value: one in Pyro's store, of a lazy module, or of an autoguide that sets itself up."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in _INITIALISERS or code.co_filename == _PARAM_STORE or code is _MAKES_NETWORKS:
            return True
        frame = frame.f_back
    return False


def _is_within(frame: FrameType | None, file: str) -> bool:
    """Whether a function of this file is on the call stack."""
    while frame is not None:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False


def _after(site: str) -> str:
    return f"after site {site!r}" if site else "before the first site"


def unshared(found: Sequence[BetweenDraw], role: str = "student") -> str:
    """A sentence about the draws between sites that teacher and student do not share; empty if they share all.

    Draws with a named purpose (:func:`drawing_for`) are left out.
    """
    texts = {
        "drawn anew": f"the {role} draws these outside of its sample sites, and the teacher does not: they are its own noise",
        "not drawn by the student": "the teacher draws these outside of its sample sites, and the student does not",
        "cannot be shared": "these are drawn outside of sample sites by an operation whose noise cannot be shared",
    }
    parts = []
    for sharing, text in texts.items():
        draws = [f"{d.op} at {d.where}" for d in found if d.sharing == sharing and not d.op.endswith(")")]
        if draws:
            parts.append(f"{text}: {', '.join(dict.fromkeys(draws))}")
    ways = []
    if parts:
        ways.append(
            "To share a draw, make it in the same order between the same sites of both programs, or name it: "
            "pyro.sample('name', ...). Dropout of a student in train mode is fine as it is."
        )
    foreign = list(dict.fromkeys(f"{d.op} {d.where}".strip() for d in found if d.sharing == FOREIGN))
    if foreign:
        parts.append(f"a program draws from {', '.join(foreign)}: noise that is not torch's cannot be shared")
        ways.append(
            "Draw with torch or by pyro.sample instead; a teacher that is a simulator of its own may draw as it likes under DrawsKD."
        )
    return f"{'; '.join(parts)}. {' '.join(ways)}" if parts else ""
