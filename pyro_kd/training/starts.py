"""Several short starts, of which the best goes on: a remedy for students that start badly, such as with dead units."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import pyro

from pyro_kd.errors import NonFiniteLossError, ProcessGroupError
from pyro_kd.training.processes.together import Meeting
from pyro_kd.training.trainer import Trainer
from pyro_kd.utils.user_code import called

__all__ = ["best_start"]

Made = TypeVar("Made", bound=Trainer)


def best_start(
    make: Callable[[], Made],
    *args: Any,
    starts: int,
    steps: int,
    batches: Iterable[Any] | None = None,
    total_steps: int | None = None,
    judge: Callable[[Made], float] | None = None,
    num_samples: int = 10,
    progress: bool | str = False,
    **kwargs: Any,
) -> Made:
    """Train several new students for a few steps each, and return the trainer of the best one.

    A small network may start with units that no input activates, and then learns nothing, whatever the loss. Start more than one, and
    go on with the best: its trainer has done ``steps`` steps, and ``fit`` continues from there. All starts cost ``starts * steps``
    steps, which a comparison of methods must grant to each of them.

    Args:
        make: makes a new student and returns its :class:`~pyro_kd.training.Distiller` or :class:`~pyro_kd.training.Trainer`. It is
            called once for each start, with an empty parameter store. Its random numbers decide how the students differ.
        args, kwargs: arguments of the programs in every step; or else ``batches``. An option of
            :meth:`~pyro_kd.training.Trainer.fit`, such as ``callbacks``, is passed to the fit of each start.
        starts: number of students.
        steps: number of optimisation steps of each.
        batches: an iterable of batches, see :meth:`~pyro_kd.training.Trainer.fit`; it must be possible to iterate over it again.
        total_steps: the number of steps of the whole training, of which defaults that are a share of the steps are taken, such as the
            first quarter of :class:`~pyro_kd.SurrogateKD`; None for those of a start.
        judge: ``f(trainer)`` returns a number, the smaller the better. By default the mean loss over ``num_samples`` evaluations, all
            on the same noise.
        num_samples: number of evaluations.
        progress: as for :meth:`~pyro_kd.training.Trainer.fit`.

    Returns:
        The trainer of the best start. The parameter store holds what its student has there, beside what was in it before.

    Raises:
        ValueError: ``starts`` is below 1.
        NonFiniteLossError, ValueError: of the last start, where all of them have failed.

    Warns:
        UserWarning: a start has failed and was left out.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import Distiller, LocalKD
        >>> from pyro_kd.training import best_start
        >>> def teacher(rows):
        ...     with pyro.plate("rows", rows):
        ...         pyro.sample("y", dist.Normal(3.0, 1.0))
        >>> def make():
        ...     start = 10 * torch.rand(())
        ...     def student(rows):
        ...         loc = pyro.param("loc", start)
        ...         with pyro.plate("rows", rows):
        ...             pyro.sample("y", dist.Normal(loc, 1.0))
        ...     return Distiller(student, teacher, lambda params: torch.optim.SGD(params, lr=0.001), LocalKD(["y"]))
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> distiller = best_start(make, 10, starts=20, steps=5)
        >>> distiller.num_steps, abs(pyro.param("loc").item() - 3) < 1
        (5, True)
    """
    if starts < 1:
        raise ValueError(f"starts must be at least 1, not {starts}")
    of_fit = {name: kwargs.pop(name) for name in inspect.signature(Trainer.fit).parameters if name in kwargs}
    store = pyro.get_param_store()
    best: tuple[float, Made, Any] | None = None
    failure: Exception | None = None
    for index in range(starts):
        with store.scope() as state:
            trainer = make()
            if total_steps is not None:
                trainer.expect(total_steps)
            label = f"{progress}, start {index + 1} of {starts}" if isinstance(progress, str) else progress
            processes = trainer._stepper.processes
            try:
                trainer.fit(*args, steps=steps, batches=batches, progress=label, **of_fit, **kwargs)
                found = _judged(
                    trainer, judge or partial(_loss, args=args, batches=batches, num_samples=num_samples, kwargs=kwargs)
                )
            except (NonFiniteLossError, ValueError, ProcessGroupError) as error:  # a ValueError: that of a family, of a NaN
                if isinstance(error, ProcessGroupError) and not processes.is_shared(error):
                    raise  # the other processes are gone
                failure = error
                if processes.is_first:
                    warnings.warn(f"start {index + 1} of {starts} has failed and is left out: {error}", stacklevel=2)
                continue
        if not math.isnan(found) and (best is None or found < best[0]):
            best = found, trainer, state
    if best is None:
        raise failure or NonFiniteLossError("the judge has returned NaN for every start: no start is the best")
    _, trainer, state = best
    before = store.get_state()
    params, constraints = before["params"] | state["params"], before["constraints"] | state["constraints"]
    store.set_state({"params": params, "constraints": constraints})
    return trainer


def _judged(trainer: Any, judge: Callable[[Any], float]) -> float:
    """How good a start is: the mean over processes, so that all of them go on with the same one.

    Raises:
        NonFiniteLossError, ValueError, ProcessGroupError: it has failed, in this process or in another one.
    """
    processes, own, failure = trainer._stepper.processes, math.nan, None
    with processes.together():
        try:
            own = float(called(judge, "judge", "f(trainer)", trainer))
        except (NonFiniteLossError, ValueError) as error:
            failure = error
        processes.meet(Meeting.VALIDATION)
        notes = processes.exchange((own, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for _, text in notes:
        if text is not None:
            raise NonFiniteLossError(f"in a different process: {text}")
    return sum(value for value, _ in notes) / len(notes)


def _loss(trainer: Trainer, args: Any, batches: Iterable[Any] | None, num_samples: int, kwargs: dict[str, Any]) -> float:
    return float(trainer.evaluate(*args, batches=batches, num_samples=num_samples, **kwargs).loss.mean)
