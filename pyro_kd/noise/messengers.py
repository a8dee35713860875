"""The two effect handlers that record noise and replay it, as Pyro messengers.

They set the value of a sample message and leave the rest to Pyro. The sampler of each site runs on a
:class:`~pyro_kd.noise.tape.NoiseTape`. :mod:`pyro_kd.noise.handlers` explains the idea and has the functions that users call.
Messengers know sites and no losses.
"""

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_kd.errors import NoiseMismatchError, UnpairedSiteError, UnsupportedNoiseError, listing, nearest
from pyro_kd.noise import families  # noqa: F401  (fills the registry of samplers)
from pyro_kd.noise.between import LOST, BetweenDraw, ProgramTape
from pyro_kd.noise.laws import Draw
from pyro_kd.noise.record import NoiseRecord
from pyro_kd.noise.samplers import draw_of, draws_nothing, is_registered, replayable, sample_on, unwrapped
from pyro_kd.noise.statements import is_statement, note_whole_plate
from pyro_kd.noise.streams import StreamWatch
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.utils.advice import advice
from pyro_kd.utils.pyro_internals import HANDLER_STACK, Subsample
from pyro_kd.utils.tensors import tensors_in
from pyro_kd.utils.torch_internals import is_same_storage

__all__ = ["RecordNoiseHandler", "RecordNoiseMessenger", "ReplayNoiseMessenger", "SampleMessenger"]


class SampleMessenger(Messenger):
    """A messenger for sample sites only. Messages of other types, mostly of parameters, cost no look-up of a method by name."""

    def _process_message(self, msg: Message[..., Any]) -> None:
        if msg["type"] == "sample":
            self._pyro_sample(msg)

    def _postprocess_message(self, msg: Message[..., Any]) -> None:
        pass

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        raise NotImplementedError


class _NoiseMessenger(SampleMessenger):
    """The common part of recording and replaying: runs a site's sampler on a tape.

    Attributes:
        program_tape: the tape under the whole run, for what is drawn between the sites; None if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.program_tape: ProgramTape | None = None

    def _pyro_sample(self, msg: Message[..., Any]) -> None:
        if self.program_tape is None:
            self._sample(msg)
            return
        with self.program_tape.at_site():
            self._sample(msg)
        if not is_statement(msg):
            self.program_tape.pass_site(self._name_in_record(str(msg["name"])))

    def _name_in_record(self, name: str) -> str:
        return name

    @contextmanager
    def _around_program(self, tape: ProgramTape | None) -> Iterator[None]:
        """Lay a tape under the program inside the context."""
        self.program_tape = tape
        with nullcontext() if tape is None else tape:
            yield

    def _sample(self, msg: Message[..., Any]) -> None:
        if msg["is_observed"] or msg["done"] or msg["value"] is not None:
            return
        note_whole_plate(msg)
        name = str(msg["name"])
        fn = self._broadcast(msg)
        if self._skips(msg):
            self._draw(name, fn, msg)
            return
        tape = self._tape(name, fn)
        if tape is None:
            if self.program_tape is not None:  # to which Pyro's own draw would be one between sites
                self._draw(name, fn, msg)
            return
        source = self._sampled(name, fn)
        try:
            msg["value"] = sample_on(tape, source, *msg["args"], **msg["kwargs"])
        except NoiseMismatchError as error:
            raise NoiseMismatchError(
                f"site {name!r} ({_family(fn)}, batch_shape {_shape(fn, 'batch_shape')}, event_shape "
                f"{_shape(fn, 'event_shape')}) does not fit the recorded noise: {error}. Give both programs the same shape and "
                f"families with the same law of noise at this site, make it a target, or let it draw its own noise: "
                f"{advice().with_fresh(name)}. docs/distributions.md lists which laws convert."
            ) from error
        except UnsupportedNoiseError as error:
            raise UnsupportedNoiseError(
                f"site {name!r}: {_family(fn)} cannot share noise: {error}. Register its map from noise to value with "
                f"@pyro_kd.register_sampler({_family(fn)}), or make the site a target."
            ) from error
        except NotImplementedError as error:
            raise _without_sampler(name, fn, error) from error
        except AssertionError as error:
            raise _failed_assertion(name, fn, error) from error
        self._done(name, fn, msg, tape)

    def _skips(self, msg: Message[..., Any]) -> bool:
        return False

    def _draw(self, name: str, fn: Any, msg: Message[..., Any]) -> None:
        """Draw as Pyro would, or by the registered sampler if the family itself cannot be sampled."""
        with nullcontext() if self.program_tape is None else self.program_tape.at_site():
            try:
                msg["value"] = draw_of(fn, *msg["args"], **msg["kwargs"])
            except NotImplementedError as error:
                registered = replayable(fn)
                if registered is fn:
                    raise _without_sampler(name, fn, error) from error
                msg["value"] = registered(*msg["args"], **msg["kwargs"])
            except AssertionError as error:
                raise _failed_assertion(name, fn, error) from error

    def _tape(self, name: str, fn: Any) -> NoiseTape | None:
        """The tape to run the site's sampler on; None leaves the draw to Pyro."""
        raise NotImplementedError

    def _sampled(self, name: str, fn: Any) -> Any:
        """The distribution to draw from: one with the same draws, which may have a derivative that those of ``fn`` lack."""
        return fn

    def _done(self, name: str, fn: Any, msg: Message[..., Any], tape: NoiseTape) -> None:
        """Called when the site has its value."""

    def _broadcast(self, msg: Message[..., Any]) -> Any:
        """The site's distribution as the plates outside of this handler will expand it."""
        outside = HANDLER_STACK[: HANDLER_STACK.index(self)]
        if not any(isinstance(frame, PlateMessenger) for frame in outside):
            return msg["fn"]
        scratch = msg.copy()
        for frame in reversed(outside):
            if isinstance(frame, BlockMessenger) and frame.hide_fn(scratch):
                break
            if isinstance(frame, PlateMessenger):
                frame._process_message(scratch)
        return scratch["fn"]


class RecordNoiseMessenger(_NoiseMessenger):
    """The handler behind :func:`~pyro_kd.noise.handlers.record_noise`.

    Args:
        skip: a predicate on Pyro's messages. Sites for which it holds draw as usual and leave no record.
        watch: notices whether the program draws between its sites, instead of recording it, which costs some microseconds for
            each torch operation. Its ``moved`` says after the run whether the record is incomplete.

    Attributes:
        noise: the record of the last run, or of the run in progress.
    """

    def __init__(self, skip: Callable[[Message[..., Any]], bool] | None = None, watch: StreamWatch | None = None) -> None:
        super().__init__()
        self.noise = NoiseRecord()
        self._skip = skip
        self._watch = watch

    def __enter__(self) -> NoiseRecord:  # type: ignore[override]
        self.noise = NoiseRecord()
        self._under = ExitStack()
        self._under.enter_context(self._around_program(ProgramTape() if self._watch is None else None))
        super().__enter__()
        return self.noise

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._under.__exit__(*exception)
        if self.program_tape is not None:
            self.noise.between, self.noise.is_seeded = self.program_tape.recorded(), self.program_tape.is_seeded
            self.noise.lost_between = [draw for draw in self.program_tape.found if draw.sharing in LOST]

    def _draw(self, name: str, fn: Any, msg: Message[..., Any]) -> None:
        with nullcontext() if self._watch is None else self._watch.at_site():
            super()._draw(name, fn, msg)

    def __call__(self, fn: Callable[..., Any]) -> "RecordNoiseHandler":
        """Wrap a program. Each call starts a new record."""
        return RecordNoiseHandler(self, fn)

    def _skips(self, msg: Message[..., Any]) -> bool:
        return self._skip is not None and self._skip(msg)

    def _tape(self, name: str, fn: Any) -> NoiseTape | None:
        if name in self.noise:
            raise NoiseMismatchError(
                f"site {name!r} was sampled twice in one record. Give each sample site of a run its own name, and each run its own "
                "record_noise()."
            )
        if draws_nothing(fn):
            self.noise.add(name, ())
            return None
        return NoiseTape(generator=None if self._watch is None else self._watch.generator)

    def _done(self, name: str, fn: Any, msg: Message[..., Any], tape: NoiseTape) -> None:
        value = msg["value"]
        is_empty = isinstance(value, Tensor) and value.numel() == 0
        if not tape.draws and not is_empty and not is_registered(fn) and not _is_constant(fn, value):
            raise UnsupportedNoiseError(
                f"site {name!r}: {_family(fn)} draws nothing that torch's dispatcher can see, so its noise cannot be "
                f"shared. Draw with torch (not with random or numpy), or register its map from noise to value with "
                f"@pyro_kd.register_sampler({_family(fn)})."
            )
        self.noise.add(name, tape.draws)


class RecordNoiseHandler:
    """A program wrapped by :func:`~pyro_kd.noise.handlers.record_noise`. It is called as before.

    Attributes:
        messenger: the handler.
        fn: the program.
    """

    def __init__(self, messenger: RecordNoiseMessenger, fn: Callable[..., Any]) -> None:
        if not callable(fn):
            raise ValueError(f"{fn!r} is not callable: record_noise wraps a function with Pyro primitives")
        self.messenger = messenger
        self.fn = fn
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program and record its noise."""
        with self.messenger:
            return self.fn(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    @property
    def noise(self) -> NoiseRecord:
        """The record of the last call."""
        return self.messenger.noise


class ReplayNoiseMessenger(_NoiseMessenger):
    """The handler behind :func:`~pyro_kd.noise.handlers.replay_noise`.

    Args:
        noise, site_map, fresh: as there.
        looks_between: whether to look for draws between sites even if the record holds none.

    Attributes:
        between: the draws between sites of the last run: those of the program, then the recorded ones that it did not take.
    """

    def __init__(
        self,
        noise: Mapping[str, tuple[Draw, ...]],
        site_map: Mapping[str, str] | None = None,
        fresh: Container[str] = (),
        *,
        looks_between: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(noise, RecordNoiseHandler | RecordNoiseMessenger):
            noise = noise.noise
        if not isinstance(noise, Mapping):
            raise TypeError(
                f"replay_noise needs the record that record_noise() returns, not {type(noise).__name__}: "
                "replay_noise(model, noise=record)"
            )
        self.noise = noise
        self.site_map = dict(site_map or {})
        self.fresh = fresh
        self.looks_between = looks_between
        self.between: list[BetweenDraw] = []

    def __enter__(self) -> "ReplayNoiseMessenger":
        recorded: Mapping[str, tuple[Draw, ...]] = getattr(self.noise, "between", {})
        is_needed = self.looks_between or any(recorded.values())
        self._under = ExitStack()
        self._under.enter_context(self._around_program(ProgramTape(recorded, self.fresh) if is_needed else None))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._under.__exit__(*exception)
        if self.program_tape is not None:
            self.between = [*self.program_tape.found, *self.program_tape.left_over()]

    def _name_in_record(self, name: str) -> str:
        return self.site_map.get(name, name)

    def _tape(self, name: str, fn: Any) -> NoiseTape | None:
        if (name in self.fresh and name not in self.site_map) or draws_nothing(fn):
            return None
        source = self.site_map.get(name, name)
        if source in self.noise:
            return NoiseTape(self.noise[source], getattr(fn, "batch_shape", ()))
        if "*" in self.fresh and not isinstance(fn, Subsample):
            return None
        raise UnpairedSiteError(
            f"site {source!r} has no recorded noise: the record holds {listing(self.noise)}.{nearest(source, self.noise)} "
            f"Give the site the same name in both programs, say which recorded site it corresponds to (site_map={{{name!r}: "
            f"'...'}}), or let it draw its own noise ({advice().with_fresh(name)}). If draws decide which sites a run has, make the "
            "deciding sites targets, so that both programs take the same path."
        )


def _is_constant(fn: Any, value: Any) -> bool:
    """Whether a draw is a view of a tensor that the distribution holds, so that its sampler had nothing to draw."""
    if not isinstance(value, Tensor) or not isinstance(fn, torch.distributions.Distribution):
        return False
    return any(is_same_storage(tensor, value) for tensor in tensors_in(vars(fn)))


def _without_sampler(name: str, fn: Any, error: NotImplementedError) -> UnsupportedNoiseError:
    return UnsupportedNoiseError(
        f"site {name!r}: {_family(fn)} cannot be sampled: its sampler raises {type(error).__name__}"
        f"{f' ({error})' if str(error) else ''}. Register one with @pyro_kd.register_sampler({_family(fn)})."
    )


def _failed_assertion(name: str, fn: Any, error: AssertionError) -> UnsupportedNoiseError:
    return UnsupportedNoiseError(
        f"site {name!r}: an assertion in the sampler of {_family(fn)} has failed{f': {error}' if str(error) else ''}. Where the "
        "site is a target, a loss draws it, even if it is observed. Pyro's hidden Markov models can draw if they have duration=."
    )


def _family(fn: Any) -> str:
    fn = unwrapped(fn)
    return type(fn).__name__ if isinstance(fn, torch.distributions.Distribution) else getattr(fn, "__name__", repr(fn))


def _shape(fn: Any, attribute: str) -> tuple[int, ...] | None:
    shape = getattr(fn, attribute, None)
    return None if shape is None else tuple(shape)
