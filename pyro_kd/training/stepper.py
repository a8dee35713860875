"""One optimisation step on a weighted sum of objectives: find the parameters, add up gradients, check them, update.

:class:`~pyro_kd.training.Trainer` holds a stepper and gives it to each fit, which calls it step by step. A stepper knows objectives
and an optimiser. It does not know how long training lasts, where batches come from, or that there are checkpoints to write.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_kd.errors import InvalidParameterError, NonFiniteLossError
from pyro_kd.isolation.effects import reached_again
from pyro_kd.training.batches import BatchStream, Call, to_device
from pyro_kd.training.devices import device_of_process
from pyro_kd.training.evaluation import Evaluation, evaluate
from pyro_kd.training.gradients import check_gradients, require_trained
from pyro_kd.training.objectives import Objective
from pyro_kd.training.optimisers import Optimiser, Scheduler, make_optimiser
from pyro_kd.training.parameters import ProgramState
from pyro_kd.training.precision import Precision
from pyro_kd.training.processes.sameness import describe_equal, warn_of_constants
from pyro_kd.training.processes.together import GO_ON, Ending, Processes
from pyro_kd.training.progress import Progress
from pyro_kd.training.trained_parameters import TrainedParameters
from pyro_kd.training.validity import check_validity, naming_invalid_parameters
from pyro_kd.utils.advice import advising
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.devices import require_device
from pyro_kd.utils.randomness import keeping_random_state, set_seed
from pyro_kd.utils.tensors import tensors_in

__all__ = ["Stepper"]


class Stepper:
    """Takes optimisation steps, and holds everything that they change; see :class:`~pyro_kd.training.Trainer` for the arguments.

    Attributes:
        objectives: what is minimised, by name: copies of what was passed, compiled if the user wants that.
        optimiser: adapter of the optimiser and its scheduler.
        progress: how far training has come.
        last_checkpoint: the checkpoint that was written or loaded last, for error messages.
        processes: the processes that train together.
        precision: how networks compute.
        ending: whether the last step was to be the last of the fit.
        is_stopping: whether this process wants the fit to end; see :meth:`Trainer.stop <pyro_kd.training.Trainer.stop>`.
    """

    def __init__(
        self,
        objectives: Objective | Mapping[str, Objective],
        optim: Optimiser,
        *,
        scheduler: Scheduler | None,
        clip_norm: float | None,
        accumulate: int,
        device: Any,
        log_every: int,
        compile: bool | Mapping[str, Any],
        precision: str | None,
    ) -> None:
        if accumulate < 1 or log_every < 1:
            raise ValueError(f"accumulate and log_every must be at least 1, not {accumulate} and {log_every}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or None, which does not clip, not {clip_norm!r}")
        device = device_of_process(device)
        if device is not None:
            require_device(device)
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.device = device
        self.progress = Progress()
        self.processes = Processes()
        self.ending, self.is_stopping = GO_ON, False
        self.precision = Precision(precision)
        self.optimiser = make_optimiser(optim, scheduler)
        self.last_checkpoint: Path | None = None
        self.log_every = log_every
        self.objectives = {name: copy.copy(each) for name, each in _by_name(objectives).items()}  # which note this run's end
        if compile is not False:
            options = {} if isinstance(compile, bool) else dict(compile)
            self.objectives = {name: objective.compiled(**options) for name, objective in self.objectives.items()}
        self._trained = TrainedParameters(self.objectives, self._bind)
        self._checked: set[str] = set()  # objectives whose leaves were checked in this fit
        self._last_call: Call | None = None
        if device is not None:
            for objective in self.objectives.values():
                objective.to(device)

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name; empty before the first step."""
        return self._trained.named

    @property
    def state(self) -> ProgramState:
        """All tensors that the programs train or keep."""
        return self._trained.state

    @property
    def num_steps(self) -> int:
        """Optimisation steps done."""
        return self.progress.num_steps

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
        """One optimisation step on these arguments of the programs, outside of a fit. Returns what was measured."""
        call, processes = to_device((args, kwargs), self.device), self.processes
        with processes.together():
            if not processes.have_agreed:
                processes.begin(None)
            self._trained.find_new(call)
            if not processes.have_agreed:
                self.agree(call, {})
            return self.optimise([call] * self.accumulate)

    def begin_fit(self, call: Call) -> None:
        """Find the parameters anew, and check the leaves of each objective again.

        Raises:
            NoParametersError: the programs have no parameter that requires a gradient.
        """
        self._trained.find(call)
        self._checked.clear()

    def agree(self, call: Call, options: Mapping[str, Any]) -> None:
        """Make sure that all processes train the same, and start from the parameters of the first.

        Args:
            call: arguments of a step.
            options: of the fit, by name.

        Raises:
            ProcessMismatchError: they differ.
        """
        if self.processes.is_alone:
            return
        own = {name: getattr(self, name) for name in ("accumulate", "clip_norm", "log_every")}
        own["precision"] = self.precision.name
        tensors = self.state.tensors.values()
        equal = describe_equal(self.objectives, self.optimiser, tensors, call, {**own, **options})
        self.processes.agree(equal, self.params, self.state, list(self.objectives))
        warn_of_constants(self.processes, self.objectives, self.state)

    def tell_end(self, end: int) -> None:
        """Tell the objectives at which step the fit will end."""
        for objective in self.objectives.values():
            objective.begin_fit(end)

    def resume(self, progress: Progress, checkpoint: Path | None, call: Call) -> None:
        """Take over the progress of a run whose tensors have been loaded from a checkpoint."""
        self.progress, self.last_checkpoint = progress, checkpoint
        self.precision.load(progress.loss_scale)
        self._last_call = self._last_call or call

    def optimise(self, calls: Sequence[Call], wish: Ending = GO_ON) -> dict[str, float]:
        """One optimisation step on the mean loss of batches. Returns what was measured, a row of the history.

        Args:
            calls: arguments of each batch.
            wish: how this process wants the fit to end after the step.

        Raises:
            NonFiniteLossError: the loss or its gradient is NaN or infinite. The parameters are as before the step.
            InvalidParameterError: a distribution's parameter violates its constraint; likewise.
            NoParametersError: the loss depends on nothing that is trained.
        """
        begin = time.perf_counter()
        step, row = self.num_steps, {"step": self.num_steps + 1.0, "loss": 0.0}
        self._trained.find_new(calls[0])  # a callback may have replaced or unfrozen one
        self._trained.clear_gradients()
        if any(objective.begins_anew_at(step) for objective in self.objectives.values()):
            self.optimiser.restart()
        try:
            with naming_invalid_parameters(), self._trained.watched():
                for call in calls:
                    self._add_gradients(step, call, 1 / len(calls), row)
                    self._trained.look(call)  # the call may have made or reached another parameter
                self.ending = self.processes.average(self.params, self.state, row, wish)
                is_taken = self.precision.unscale(self.params)
                if is_taken:
                    check_gradients(self.params, self.clip_norm)
        except (NonFiniteLossError, InvalidParameterError) as error:
            self._trained.clear_gradients()
            if self.processes.is_shared(error):
                raise  # a different process has said all this
            raise type(error)(
                f"step {step + 1}: {error} The parameters are those of step {step} (buffers, as of batch norm, have seen the batch); "
                f"{self.last_saved()}."
            ) from error
        self._last_call = calls[-1]
        rate = self.optimiser.step() if is_taken else None
        if rate is not None:
            row["lr"] = rate
        self.progress.loss_scale = self.precision.state()
        self.progress.num_steps += 1
        row["seconds"] = time.perf_counter() - begin
        self.progress.history.append(row)
        return row

    def evaluate(self, stream: BatchStream, *, num_samples: int, seed: int | None, step: int | None) -> Evaluation:
        """The loss without training; see :meth:`Trainer.evaluate <pyro_kd.training.Trainer.evaluate>`.

        Args:
            stream: the batches.
            num_samples: number of evaluations of each batch, with different noise.
            seed: of the noise, and of the generators that the batches have of their own, so that they come in one order; all end
                as they were. None draws from the global stream.
            step: the step whose weights and schedules apply; None: the next one.

        Raises:
            ValueError: there is no batch.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        step = self.num_steps if step is None else step
        with nullcontext() if seed is None else keeping_random_state(stream.generators):
            set_seed(seed, stream.generators.values())  # a loader that shuffles draws from the stream as it starts
            remaining = stream.once()
            first = next(remaining, None)
            if first is None:
                raise ValueError("there was no batch to evaluate")
            if not self.params:
                self._trained.discover(first)  # what is made at first use must not depend on the seed
                self.precision.bind(self.state.trainable)
            with self.precision.autocast():
                return evaluate(self.objectives, chain([first], remaining), num_samples=num_samples, seed=seed, step=step)

    def check_validity(self) -> None:
        """Check parameters and programs as the last step has left them.

        Raises:
            InvalidParameterError: a parameter or a distribution is not valid.
            NonFiniteLossError: a loss is NaN or infinite.
        """
        try:
            with self.precision.autocast():
                check_validity(self.state, self.objectives, self._last_call, max(self.num_steps - 1, 0))
        except (NonFiniteLossError, InvalidParameterError) as error:
            raise type(error)(f"after step {self.num_steps}: {error} Now {self.last_saved()}.") from error

    def last_saved(self) -> str:
        """Which checkpoint to go back to, as part of an error message."""
        return f"the last checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint was written"

    def _bind(self) -> None:
        """Tell those who hold the parameters that there are new ones."""
        self.progress.note_new(self.state)
        self.precision.bind(self.params)
        self.optimiser.bind(self.params)

    def _add_gradients(self, step: int, call: Call, share: float, row: dict[str, float]) -> None:
        """Add the gradients of all objectives on one batch, and their values to the row.

        Args:
            step: the step whose weights and schedules apply.
            call: arguments of the batch.
            share: weight of the batch in the step.
            row: what is measured.
        """
        args, kwargs = call
        is_logged = step % self.log_every == 0
        for name, objective in self.objectives.items():
            weight = objective.weight_at(step)
            if weight == 0:
                continue
            with self.precision.autocast():
                if is_logged:
                    # In the first step the programs themselves run, with all of their errors.
                    evaluate = objective.value_with_terms if step else objective.evaluate
                    value, terms = evaluate(step, args, kwargs, trained=self.params.values())
                else:
                    value, terms = objective.value(step, args, kwargs, trained=self.params.values()), {}
            if is_logged or name not in self._checked or not value.requires_grad:
                self._check_leaves(name, objective, value, step, call)
            number, factor = value.item(), weight * share
            for site, term in terms.items():
                label = f"term/{site}" if len(self.objectives) == 1 else f"term/{name}/{site}"
                row[label] = row.get(label, 0.0) + factor * term.item()
            row["loss"] += factor * number
            if len(self.objectives) > 1:
                row[f"loss/{name}"] = row.get(f"loss/{name}", 0.0) + share * number
            torch.autograd.backward(self.precision.scaled(value if factor == 1 else factor * value))

    def _check_leaves(self, name: str, objective: Objective, value: Tensor, step: int, call: Call) -> None:
        """Raise where the loss depends on a parameter that is not trained, or on none that is."""
        args, kwargs = call
        reached = leaves_of([value]) - leaves_of(tensors_in(call))
        if not reached <= set(self.params.values()):
            self._trained.find(call)
            self._trained.adopt(reached)
        once_more = partial(objective.value, step, args, kwargs, trained=self.params.values())
        again = partial(reached_again, once_more, *objective.trained_programs)
        with advising(lambda: objective.advice):
            require_trained(name, reached, self.params, self.state.displaced, again)
        self._checked.add(name)


def _by_name(objectives: Objective | Mapping[str, Objective]) -> dict[str, Objective]:
    """Objectives by name, also a single one.

    Raises:
        TypeError: one of them is no objective.
        ValueError: there are none.
    """
    named = dict(objectives) if isinstance(objectives, Mapping) else {"loss": objectives}
    if not named:
        raise ValueError("objectives is empty: pass at least one, DistillationObjective(...) or ELBOObjective(...)")
    for name, objective in named.items():
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objective {name!r} is {objective!r:.60}, which is no objective: pass DistillationObjective(loss, student, "
                "teacher), or ELBOObjective(elbo, model, guide)"
            )
    return named
