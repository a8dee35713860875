"""Draws of a teacher on disk, so that a teacher runs once for many students, and need not be in memory while they train."""

from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyro

from pyro_kd.errors import TeacherCacheError
from pyro_kd.losses.program_pair import ProgramPair
from pyro_kd.losses.reuse import seeded
from pyro_kd.losses.targets import Targets
from pyro_kd.losses.teacher_draws import Recording, made_by, without_program
from pyro_kd.training.batches import BatchStream, Call, to_device
from pyro_kd.training.cache_files import writing
from pyro_kd.training.cached_draws import TeacherCache, fingerprint_of
from pyro_kd.training.draw_checks import check_draw
from pyro_kd.training.structures import UnknownPartError

__all__ = ["cache_teacher"]


def cache_teacher(
    teacher: Callable[..., Any],
    *args: Any,
    path: str | Path,
    batches: int | Iterable[Any],
    targets: Targets = None,
    target_values: str = "teacher",
    seed: int = 0,
    device: Any = None,
    **kwargs: Any,
) -> TeacherCache:
    """Run a teacher many times, and write what a loss needs of it: noise, values, and the parameters of its distributions.

    Training then reads the draws, and does not need the teacher. The files hold tensors and JSON, no code. A few draws are in
    memory at a time. Each draw has a random seed of its own, made from ``seed`` and its number.

    In a script under ``torchrun``, call it in one process: the others read the cache when it is there (docs/several_processes.md).

    Args:
        teacher: usually a frozen program, ``pyro_kd.freeze(model)``.
        *args: arguments of the program in every draw, such as the number of rows; or else ``batches`` has them.
        path: a new folder.
        batches: the number of draws; or an iterable of batches, of which each makes one draw: a tuple or list gives positional
            arguments, a mapping gives keyword arguments, anything else is the only argument. Arguments are kept with their draw.
        targets: as for the loss that will be used: names, a predicate, or None for the sites that the teacher observes.
        target_values: likewise.
        seed: of all draws. Take a different one for draws to evaluate on.
        device: where batches are moved to; the files do not depend on it.
        **kwargs: further arguments of the program in every draw.

    Returns:
        The cache. ``TeacherCache(path)`` opens it again.

    Raises:
        TeacherCacheError: the folder is not new, the disk is full, or a site's distribution cannot be written: one of a user's own
            class, or one that holds a function or a module.
        UnsupportedNoiseError: the noise of a site cannot be recorded.

    Example:
        >>> import pyro, pyro.distributions as dist, tempfile, torch
        >>> from pyro_kd import Distiller, SurrogateKD, cache_teacher
        >>> def program(rows, loc):
        ...     with pyro.plate("rows", rows):
        ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 0.5))
        >>> def student(rows):
        ...     program(rows, pyro.param("loc", torch.tensor(0.0)))
        >>> folder = tempfile.mkdtemp()
        >>> cache = cache_teacher(lambda rows: program(rows, 2.0), 10, path=folder, batches=20, targets=["y"])
        >>> pyro.clear_param_store()
        >>> sgd = lambda params: torch.optim.SGD(params, lr=0.01)
        >>> distiller = Distiller(student, cache.teacher, sgd, SurrogateKD(["y"]))
        >>> history = distiller.fit(batches=cache.loader(num_workers=0), steps=100, progress=False)
        >>> round(pyro.param("loc").item(), 3)
        2.0
    """
    path = Path(path)
    if not isinstance(batches, int) and (args or kwargs):
        raise TypeError("pass either arguments of the program and a number of batches, or an iterable of batches, not both")
    if isinstance(batches, int) and (isinstance(batches, bool) or batches < 1):
        raise ValueError(f"batches must be the number of draws, at least 1, or an iterable of batches, not {batches!r}")
    fingerprint = fingerprint_of(teacher)
    known = ProgramPair(teacher, teacher)

    def record(args: Any, kwargs: Any, recording: Recording) -> None:
        known.between.begin()
        noise = recording(teacher, targets, args, kwargs, known, target_values).noise
        known.between.looks = bool(noise.between or noise.lost_between or noise.is_seeded)

    with writing(path) as writer:
        index = -1
        for index, own in enumerate(_calls(batches, (args, kwargs), device)):
            with seeded(_seed(seed, index)), pyro.validation_enabled():
                draw = without_program(made_by(*own, record)).to("cpu")
            _check(draw)
            try:
                writer.add(draw)
            except UnknownPartError as error:
                raise _not_written(error) from error
        if index < 0:
            raise TeacherCacheError("there was no batch to draw for: batches is empty")
        about = {"targets": ", ".join(draw.unpacked[2][0].targets), "seed": str(seed)}
        writer.finish(fingerprint, about)
    return TeacherCache(path)


def _calls(batches: int | Iterable[Any], call: Call, device: Any) -> Iterator[Call]:
    if isinstance(batches, int):
        moved = to_device(call, device)
        return (moved for _ in range(batches))
    return BatchStream(batches, ((), {}), device).once()


def _seed(seed: int, index: int) -> int:
    """The seed of a draw: different for all draws of all caches."""
    digest = blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**62


def _check(draw: Any) -> None:
    """Raise where a draw could not be read again.

    Raises:
        TeacherCacheError: likewise.
    """
    run = draw.unpacked[2][0]
    if not run.targets:
        raise TeacherCacheError(
            "no targets found: the teacher observes no site. Name those that the student should reproduce: "
            "cache_teacher(..., targets=['y'])."
        )
    if run.noise.lost:
        places = "; ".join(map(str, run.noise.lost[:3]))
        raise TeacherCacheError(
            f"the teacher draws what cannot be recorded ({places}), so that a student could not share it. Draw it at a sample site."
        )
    try:
        check_draw(draw)
    except ValueError as error:
        raise TeacherCacheError(
            f"a draw of the teacher cannot be written, since it would not be accepted again: {error}."
        ) from error


def _not_written(error: UnknownPartError) -> TeacherCacheError:
    if error.site is None:
        return TeacherCacheError(
            f"an argument of the teacher is or holds a {error.what}, which a cache cannot hold. Pass tensors, numbers, names, and "
            "lists or dictionaries of these."
        )
    return TeacherCacheError(
        f"site {error.site!r}: its distribution is or holds a {error.what}. A cache holds distributions of torch and Pyro that are "
        "made of tensors, numbers, and transforms without a module or function. The option reuse=m of a loss keeps draws in memory, "
        "and takes any distribution."
    )
