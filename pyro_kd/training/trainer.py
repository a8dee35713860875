"""The training loop: steps, schedules, validation, checkpoints, and an end that loses nothing."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_kd.errors import CheckpointError, NonFiniteLossError, NoParametersError, listing
from pyro_kd.freezing import FrozenProgram, require_callable
from pyro_kd.losses.checks import lasting, leaves_of
from pyro_kd.losses.isolation import reached_again
from pyro_kd.losses.module import owners
from pyro_kd.randomness import RandomState
from pyro_kd.tensors import tensors_in
from pyro_kd.training.batches import BatchStream, Call, to_device
from pyro_kd.training.callbacks import Callback, ProgressBar
from pyro_kd.training.checkpoints import Checkpoint, CheckpointFolder
from pyro_kd.training.evaluation import Evaluation, evaluate
from pyro_kd.training.history import History
from pyro_kd.training.interrupts import interruptible
from pyro_kd.training.objectives import Objective
from pyro_kd.training.optimisers import Optimiser, Scheduler, make_optimiser
from pyro_kd.training.parameters import ProgramState
from pyro_kd.training.progress import Progress, load_checkpoint, make_checkpoint

__all__ = ["Trainer"]


class Trainer:
    """Minimises a weighted sum of objectives by gradient descent.

    Args:
        objectives: an :class:`~pyro_kd.training.Objective`, or several by name, all trained at once.
        optim: a torch optimiser of the programs' parameters; a function that makes one of a list of parameters, which are
            found by running the programs; or a Pyro optimiser.
        scheduler: of the learning rate, for a torch optimiser: a scheduler, or a function that makes one of the optimiser.
            It takes a step with the optimiser; ``ReduceLROnPlateau`` at each validation.
        clip_norm: largest norm of the gradient; None does not clip.
        accumulate: number of batches whose mean loss makes one optimisation step.
        device: where batches and the programs' modules are moved.
        log_every: every so many steps the terms of each site are kept in the history.
        compile: train by compiled graphs (docs/performance.md): True, or options of
            :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`. What is evaluated is not compiled.

    Attributes:
        interrupted: whether the last fit was ended by Ctrl-C.

    Example:
        A teacher, by its ELBO::

            trainer = Trainer(Objective(Trace_ELBO(), vae.model, vae.guide), lambda params: torch.optim.Adam(params, lr=1e-3))
            trainer.fit(batches=loader, steps=10_000)
    """

    def __init__(
        self,
        objectives: Objective | Mapping[str, Objective],
        optim: Optimiser,
        *,
        scheduler: Scheduler | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        device: Any = None,
        log_every: int = 50,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        self.objectives = {"loss": objectives} if isinstance(objectives, Objective) else dict(objectives)
        if not self.objectives:
            raise ValueError("objectives is empty: pass at least one Objective(loss, model, guide)")
        for name, objective in self.objectives.items():
            if not objective.is_differentiable and not callable(getattr(objective.loss, "loss_and_grads", None)):
                raise TypeError(
                    f"objective {name!r} has the loss {objective.loss!r:.60}, which has no differentiable_loss(model, guide, ...): "
                    "pass SurrogateKD(...), LocalKD(...), an ELBO of Pyro such as Trace_ELBO(), or an object with this method"
                )
            require_callable(objective.model, f"the model of objective {name!r}")
            require_callable(objective.guide, f"the guide of objective {name!r}")
        if accumulate < 1 or log_every < 1:
            raise ValueError(f"accumulate and log_every must be at least 1, not {accumulate} and {log_every}")
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.device = device
        self.log_every = log_every
        self.interrupted = False
        self._progress = Progress()
        self._optimiser = make_optimiser(optim, scheduler)
        self._state = ProgramState()
        self._params: dict[str, Tensor] = {}
        options = {} if isinstance(compile, bool) else dict(compile)
        self._trained = (
            {name: objective.compiled(**options) for name, objective in self.objectives.items()}
            if compile is not False
            else self.objectives
        )
        self._checked: set[str] = set()  # objectives whose leaves were looked at
        self._last_checkpoint: Path | None = None
        if device is not None:
            for objective in self.objectives.values():
                for owner in (*owners(objective.model), *owners(objective.guide)):
                    if isinstance(owner, torch.nn.Module | FrozenProgram):
                        owner.to(device)
                for holder in (objective.loss, objective.arguments):
                    move = getattr(holder, "to", None)  # of losses and replays that hold old models
                    if callable(move):
                        move(device)

    # One step.

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimisation step on these arguments of the programs. Returns the loss before it.

        Raises:
            NonFiniteLossError: the loss or its gradient is NaN or infinite; the parameters are as they were.
        """
        call = to_device((args, kwargs), self.device)
        self._prepare(call)
        row = self._optimise([call] * self.accumulate)
        return row["loss"]

    def _prepare(self, call: Call) -> None:
        """Find the parameters, before the first step and when the programs have made new ones."""
        if not self._params or not self._state.is_current:
            self._find(call)

    def _find(self, call: Call) -> None:
        self._discover(call)
        self._params = self._state.trainable
        if not self._params:
            raise NoParametersError(
                "the student has no parameter that requires a gradient: give it pyro.param statements or nn.Module parameters"
            )
        self._optimiser.bind(self._params)

    def _discover(self, call: Call) -> None:
        """Run every program once, on the arguments of its objective, and leave the random stream as it was."""
        runs = []
        for objective in self.objectives.values():
            args, kwargs = objective.call(call)
            runs += [(program, args, kwargs) for program in objective.programs]
        self._state.discover(runs)
        for objective in self.objectives.values():
            loss = objective.loss
            guesses = isinstance(loss, TraceEnum_ELBO) or getattr(loss, "vectorize_particles", False)
            if guesses and loss.max_plate_nesting == float("inf"):
                args, kwargs = objective.call(call)
                before = RandomState.now()  # Pyro guesses at the first call, by running the programs
                loss._guess_max_plate_nesting(objective.model, objective.guide, args, kwargs)
                before.restore()

    def _optimise(self, calls: Sequence[Call]) -> dict[str, float]:
        begin = time.perf_counter()
        step, row = self.num_steps, {"step": self.num_steps + 1.0, "loss": 0.0}
        for param in self._params.values():
            param.grad = None
        try:
            for call in calls:
                self._backward(step, call, 1 / len(calls), row)
                self._prepare(call)  # a parameter may have come into being
            self._check_gradient()
        except NonFiniteLossError as error:
            for param in self._params.values():
                param.grad = None
            saved = (
                f"the last checkpoint is {self._last_checkpoint}" if self._last_checkpoint else "no checkpoint was written"
            )
            raise NonFiniteLossError(
                f"step {step + 1}: {error} The parameters are those of step {step} (buffers, as of batch norm, have seen the batch); "
                f"{saved}."
            ) from error
        rate = self._optimiser.step()
        if rate is not None:
            row["lr"] = rate
        self._progress.num_steps += 1
        row["seconds"] = time.perf_counter() - begin
        self.history.append(row)
        return row

    def _backward(self, step: int, call: Call, share: float, row: dict[str, float]) -> None:
        """Add the gradient of the objectives on one batch."""
        args, kwargs = call
        for name, objective in self._trained.items():
            weight = objective.weight_at(step)
            if weight == 0:
                continue
            if not objective.is_differentiable:
                number = objective.add_gradients(step, args, kwargs, weight * share, self._params.values())
                self._note(row, name, number, weight, share)
                continue
            terms = objective.terms(step, args, kwargs) if step % self.log_every == 0 else None
            if terms is None:
                value = objective.value(step, args, kwargs)
            else:
                value = torch.stack(list(terms.values())).sum()
                for site, term in terms.items():
                    label = f"term/{site}" if len(self.objectives) == 1 else f"term/{name}/{site}"
                    row[label] = row.get(label, 0.0) + weight * share * term.item()
            if step % self.log_every == 0 or name not in self._checked:
                once_more = partial(objective.value, step, args, kwargs)
                self._check_leaves(value, call, partial(reached_again, once_more, *objective.programs))
                self._checked.add(name)
            self._note(row, name, value.item(), weight, share)
            (value if weight * share == 1 else weight * share * value).backward()

    def _note(self, row: dict[str, float], name: str, number: float, weight: float, share: float) -> None:
        """Add the value of an objective to what is measured."""
        row["loss"] += weight * share * number
        if len(self.objectives) > 1:
            row[f"loss/{name}"] = row.get(f"loss/{name}", 0.0) + share * number

    def _check_leaves(self, value: Tensor, call: Call, again: Callable[[], set[Tensor]]) -> None:
        """Raise where the loss depends on a parameter that is not trained, also on a second look, or on none that is."""
        reached = leaves_of([value]) - leaves_of(tensors_in(call))
        if not reached <= set(self._params.values()):
            self._find(call)
        missed = lasting(reached - set(self._params.values()), again)
        if missed:
            raise NoParametersError(
                f"the loss depends on a parameter of shape {tuple(missed.pop().shape)} that is neither a pyro.param nor in an "
                "nn.Module that the student calls, so that it would not be trained. Make it one of them."
            )
        if reached.isdisjoint(self._params.values()):
            raise NoParametersError(
                f"the loss depends on none of the student's parameters, {listing(list(self._params)[:5])}. Does the student compute "
                "with a copy of its module, or with values under torch.no_grad() or detach()?"
            )

    def _check_gradient(self) -> None:
        """Raise where the gradient is not finite; clip it."""
        grads = {name: param.grad for name, param in self._params.items() if param.grad is not None}
        if not grads:
            return
        norm = torch.nn.utils.get_total_norm(
            [grad.coalesce().values() if grad.is_sparse else grad for grad in grads.values()]
        )
        if not torch.isfinite(norm):
            name = next((name for name, grad in grads.items() if not grad.isfinite().all()), None)
            raise NonFiniteLossError(
                "the loss is finite, but the norm of its gradient overflows."
                if name is None
                else f"the loss is finite, but its gradient for parameter {name!r} is not."
            )
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._params.values(), self.clip_norm, norm)

    # Many steps.

    def fit(
        self,
        *args: Any,
        steps: int | None = None,
        batches: Iterable[Any] | None = None,
        seed: int | None = None,
        validation: Callable[[], float] | Iterable[Any] | None = None,
        validate_every: int = 100,
        patience: int | None = None,
        min_delta: float = 0.0,
        restore_best: bool = True,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        keep: int = 2,
        resume: bool | str | Path = False,
        progress: bool | str = True,
        callbacks: Sequence[Callback] = (),
        **kwargs: Any,
    ) -> History:
        """Train until ``steps`` optimisation steps are done, all fits together.

        Ctrl-C ends it after the step in progress, with a checkpoint where there is a folder; a second Ctrl-C at once.

        Args:
            *args, **kwargs: arguments of the programs at every step, such as the number of rows; or else ``batches``.
            steps: optimisation steps in all. None: one pass through ``batches``, which then need a length.
            batches: an iterable of batches (a ``DataLoader``, a list), gone through again and again. A tuple or list gives
                positional arguments, a mapping keyword arguments, anything else is the one argument.
            seed: of every random generator, at the start; not where a fit is resumed.
            validation: a function that returns a loss, or batches to be evaluated.
            validate_every: steps between validations.
            patience: validations without improvement after which to stop; None goes on.
            min_delta: smallest decrease of the validation loss that counts as one.
            restore_best: end with the parameters of the best validation.
            checkpoint: folder for checkpoints.
            checkpoint_every: steps between them; one more is written at the end.
            keep: how many to keep.
            resume: True goes on from the newest good checkpoint in the folder, if there is one; a path from that one. On a CPU
                the result is bit for bit that of a run without a break, if the batches come in an order that torch's, NumPy's
                and Python's generators decide; not with persistent workers that draw random numbers, nor with Pyro's Jit
                losses, which draw some when they compile.
            progress: a progress bar; a string is its label.
            callbacks: see :class:`~pyro_kd.training.Callback`.

        Returns:
            The history.

        Raises:
            BatchesExhaustedError: the batches cannot be started again, and ran out.
            NonFiniteLossError: the loss or its gradient is NaN or infinite; names the step, the site and the last checkpoint.
            CheckpointError: the folder cannot be written (before training), or holds no good checkpoint to resume from.
            ArchitectureMismatchError: a checkpoint holds other parameters than the student.
        """
        if batches is not None and (args or kwargs):
            raise TypeError(
                "pass either arguments of the programs or batches, not both: Objective(arguments=...) can add to a batch"
            )
        if validate_every < 1 or checkpoint_every < 1:
            raise ValueError(
                f"validate_every and checkpoint_every must be at least 1, not {validate_every} and {checkpoint_every}"
            )
        if patience is not None and validation is None:
            raise ValueError("patience counts validations: pass validation= too, a function or batches")
        if isinstance(validation, Iterator):
            raise TypeError("validation can be gone through once only: pass a list or a DataLoader, not a generator")
        steps = _number_of_steps(steps, batches, self.accumulate, self.num_steps)
        folder = None if checkpoint is None else CheckpointFolder(checkpoint, keep)
        saved = self._checkpoint_to_resume(folder, resume)
        if folder is not None and saved is None and folder.all() and self._last_checkpoint not in folder.all():
            raise CheckpointError(
                f"{folder.path} holds checkpoints of another run, up to {folder.all()[-1].name}. Nothing was trained. Go on with it: "
                "fit(..., resume=True); or use another folder."
            )
        if seed is not None and saved is None:
            pyro.set_rng_seed(seed)
        stream = BatchStream(batches, (args, kwargs), self.device)
        if saved is not None or self.num_steps < steps:
            self._find(stream.peek(self.num_steps))
        self._checked.clear()
        if saved is not None:
            self._progress = load_checkpoint(saved, self._state, self._optimiser, stream)
            self._last_checkpoint = saved.path
        first = self.num_steps
        listeners = [*callbacks, *([ProgressBar(progress if isinstance(progress, str) else "")] if progress else [])]
        started: list[Callback] = []
        self.interrupted = False
        try:
            for callback in listeners:
                started.append(callback)
                callback.on_start(self, steps)
            with interruptible() as interrupt:
                while self.num_steps < steps and not interrupt.is_set() and not self._has_stalled(patience):
                    try:
                        calls = [stream.next(self.num_steps) for _ in range(self.accumulate)]
                    except RuntimeError:
                        if interrupt.is_set():  # Ctrl-C ends the workers of a DataLoader as well
                            break
                        raise
                    row = self._optimise(calls)
                    if validation is not None and self.num_steps % validate_every == 0:
                        row["validation/loss"] = self._validate(validation, min_delta, steps)
                        self.history.set_last({"validation/loss": row["validation/loss"]})
                    if folder is not None and self.num_steps % checkpoint_every == 0 and self.num_steps < steps:
                        self._write(folder, stream, listeners)
                    for callback in listeners:
                        callback.on_step(self, row)
                self.interrupted = interrupt.is_set()
                if folder is not None and (self.num_steps > first or not folder.all()):
                    self._write(folder, stream, listeners)
        finally:
            for callback in started:
                callback.on_end(self)
        if validation is not None and restore_best and self._progress.best is not None and not self.interrupted:
            self._state.load(self._progress.best[1], "the best student so far", partly=True)
        return self.history

    def _has_stalled(self, patience: int | None) -> bool:
        return patience is not None and self._progress.stale >= patience

    def _validate(self, validation: Callable[[], float] | Iterable[Any], min_delta: float, steps: int) -> float:
        """The validation loss, with the weights of the last step, so that all are comparable; keeps the best student so far."""
        value = float(validation()) if callable(validation) else self.evaluate(batches=validation, step=steps).loss.mean
        if not math.isfinite(value):
            saved = self._last_checkpoint
            raise NonFiniteLossError(
                f"step {self.num_steps}: the validation loss is {value}; the last checkpoint is {saved}"
            )
        progress = self._progress
        if progress.best is None or value < progress.best[0] - min_delta:
            progress.best, progress.stale = (value, self._state.values()), 0
        else:
            progress.stale += 1
        self._optimiser.on_validation(value)
        return value

    def evaluate(
        self,
        *args: Any,
        batches: Iterable[Any] | None = None,
        num_samples: int = 1,
        seed: int | None = 0,
        step: int | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        """The loss without training, in eval mode.

        Args:
            *args, **kwargs: arguments of the programs; or else ``batches``.
            batches: an iterable of batches, see :meth:`fit`.
            num_samples: how often to evaluate each batch, on other noise.
            seed: of the noise, so that two evaluations are on the same; the global random stream goes on as if nothing had
                happened. None draws from the global stream.
            step: whose weights and schedules to take; None: those of the step that would come next.
        """
        if batches is None:
            calls: Iterator[Call] = iter([to_device((args, kwargs), self.device)])
        else:
            calls = BatchStream(batches, ((), {}), self.device).once()
        first = next(calls, None)
        if first is None:
            raise ValueError("there was no batch to evaluate")
        if not self._params:
            self._discover(first)  # whatever is made at first use is made outside of the seed
        step = self.num_steps if step is None else step
        return evaluate(self.objectives, itertools.chain([first], calls), num_samples=num_samples, seed=seed, step=step)

    # What is kept.

    @property
    def num_steps(self) -> int:
        """Optimisation steps done."""
        return self._progress.num_steps

    @property
    def history(self) -> History:
        """What was measured at them."""
        return self._progress.history

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name; empty before the first step."""
        return dict(self._params)

    def save_student(self, path: str | Path) -> None:
        """Write the trained tensors alone, for use without pyro_kd.

        What is written depends on the ending:

        - ``.safetensors``: every parameter (before its constraint) and buffer by name, a file of that library;
        - otherwise, where all of them are in the module that the student is or is a method of: its ``state_dict``, for
          ``module.load_state_dict(torch.load(path, weights_only=True))``;
        - otherwise, where all of them are in Pyro's parameter store: those entries, for ``pyro.get_param_store().load(path)``.

        Raises:
            CheckpointError: neither holds all of them, so that the file would lose some.
            NoParametersError: there was no step yet.
        """
        if not self._params:
            raise NoParametersError(
                "there is nothing to save before the first step: the student's parameters are found by running it"
            )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".tmp-{path.name}")
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(self._state.values(), aside)
        else:
            torch.save(self._state.portable(), aside)
        aside.replace(path)

    def _write(self, folder: CheckpointFolder, stream: BatchStream, listeners: Sequence[Callback]) -> None:
        configuration = {
            "objectives": {name: _configuration(objective.loss) for name, objective in self.objectives.items()},
            "clip_norm": self.clip_norm,
            "accumulate": self.accumulate,
        }
        checkpoint = make_checkpoint(self._progress, self._state, self._optimiser, stream, configuration)
        self._last_checkpoint = folder.write(checkpoint)
        for callback in listeners:
            callback.on_checkpoint(self, self._last_checkpoint)

    def _checkpoint_to_resume(self, folder: CheckpointFolder | None, resume: bool | str | Path) -> Checkpoint | None:
        if resume is False:
            return None
        if resume is not True:
            return CheckpointFolder.read(resume)
        if folder is None:
            raise TypeError("resume=True needs the folder: fit(..., checkpoint='runs/student', resume=True)")
        return folder.newest()


def _number_of_steps(steps: int | None, batches: Any, accumulate: int, done: int) -> int:
    if steps is not None:
        return steps
    try:
        return done + len(batches) // accumulate
    except TypeError as error:  # a DataLoader of an IterableDataset has __len__, which raises
        raise TypeError("steps is needed where the batches have no length: fit(..., steps=1000)") from error


def _configuration(loss: Any) -> dict[str, str]:
    """The class of a loss and its options, for the reader of a checkpoint."""
    options = {name: repr(value) for name, value in vars(loss).items() if not name.startswith("_")}
    return {"class": type(loss).__name__, **options}
