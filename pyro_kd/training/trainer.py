"""The training loop: many steps, validation, checkpoints, and an end that loses nothing."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pyro

from pyro_kd.errors import CheckpointError, NonFiniteLossError, NoParametersError, PyroKDError
from pyro_kd.training.batches import BatchStream, Call, to_device
from pyro_kd.training.callbacks import Callback, ProgressBar
from pyro_kd.training.checkpoints import Checkpoint, CheckpointFolder
from pyro_kd.training.duration import Duration
from pyro_kd.training.evaluation import Evaluation, evaluate
from pyro_kd.training.history import History
from pyro_kd.training.interrupts import interruptible, noting
from pyro_kd.training.progress import load_checkpoint, make_checkpoint
from pyro_kd.training.runs import describe_run
from pyro_kd.training.saving import save_tensors
from pyro_kd.training.steps import Stepper

__all__ = ["Trainer"]


@dataclass(frozen=True)
class _Fit:
    """What a fit was asked for."""

    end: int
    stream: BatchStream
    listeners: Sequence[Callback]
    folder: CheckpointFolder | None
    fingerprint: dict[str, str]
    checkpoint_every: int
    validation: Callable[[], float] | Iterable[Any] | None
    validate_every: int
    patience: int | None
    min_delta: float


class Trainer(Stepper):
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

    def fit(
        self,
        *args: Any,
        steps: int | None = None,
        total_steps: int | None = None,
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
        allow_changes: bool = False,
        return_on_interrupt: bool = False,
        progress: bool | str = True,
        callbacks: Sequence[Callback] = (),
        **kwargs: Any,
    ) -> History:
        """Train for ``steps`` optimisation steps more.

        Ctrl-C ends it after the step in progress: the checkpoint is written where there is a folder, then KeyboardInterrupt raised; a
        second Ctrl-C ends it at once. Before each checkpoint and at the end the programs run once more, under Pyro's validation.

        Args:
            *args, **kwargs: arguments of the programs at every step, such as the number of rows; or else ``batches``.
            steps: optimisation steps of this fit. A fit that is resumed counts those before the break, so that the same lines end
                where they would have ended without it. None: one pass through ``batches``, which then need a length.
            total_steps: instead of ``steps``: those of all fits together.
            batches: an iterable of batches (a ``DataLoader``, a list), gone through again and again. A tuple or list gives
                positional arguments, a mapping keyword arguments, anything else is the one argument.
            seed: of every random generator, at the start; not where a fit is resumed.
            validation: a function that returns a loss, or batches to be evaluated.
            validate_every: steps between validations.
            patience: validations without improvement after which to stop; None goes on.
            min_delta: smallest decrease of the validation loss that counts as one.
            restore_best: end with the parameters of this fit's best validation.
            checkpoint: folder for checkpoints, of one run at a time.
            checkpoint_every: steps between them; one more is written at the end.
            keep: how many to keep.
            resume: True goes on from the newest good checkpoint in the folder, if there is one; a path from that one. On a CPU
                the result is bit for bit that of a run without a break, if the batches come in an order that torch's, NumPy's
                and Python's generators decide; not with persistent workers that draw random numbers, nor with Pyro's Jit
                losses, which draw some when they compile.
            allow_changes: go on from a checkpoint of a run with another teacher, loss or data as well. The optimiser takes its
                state, learning rates included, from the checkpoint.
            return_on_interrupt: return the history after Ctrl-C, with a warning, as is convenient in a notebook.
            progress: a progress bar; a string is its label.
            callbacks: see :class:`~pyro_kd.training.Callback`.

        Returns:
            The history.

        Raises:
            BatchesExhaustedError: the batches cannot be started again, and ran out.
            NonFiniteLossError: the loss or its gradient is NaN or infinite; names the step, the site and the last checkpoint.
            InvalidParameterError: a parameter or a distribution is not valid; no checkpoint is written of it.
            NoParametersError: an objective depends on nothing that is trained.
            CheckpointError: the folder cannot be written (before training), or holds no good checkpoint to resume from.
            FolderInUseError: another run writes into it.
            RunMismatchError: a checkpoint is of a run with another teacher, loss or data.
            ArchitectureMismatchError: a checkpoint holds other parameters than the student.
            KeyboardInterrupt: Ctrl-C.

        Warns:
            UserWarning: there is nothing to train: what is resumed is complete, or ``total_steps`` are done.
        """
        _check_options(args, kwargs, batches, validation, validate_every, patience, checkpoint_every)
        duration = Duration(steps, total_steps, batches, self.accumulate)
        folder = None if checkpoint is None else CheckpointFolder(checkpoint, keep)
        stream = BatchStream(batches, (args, kwargs), self.device)
        bar = [ProgressBar(progress if isinstance(progress, str) else "")] if progress else []
        with nullcontext() if folder is None else folder.claimed():
            saved = self._checkpoint_to_resume(folder, resume)
            fingerprint = self._begin(stream, saved, seed, folder is not None, allow_changes)
            end = duration.end(self._progress.begin)
            listeners = [*callbacks, *bar]
            fit = _Fit(
                end,
                stream,
                listeners,
                folder,
                fingerprint,
                checkpoint_every,
                validation,
                validate_every,
                patience,
                min_delta,
            )
            self._say_if_complete(fit)
            self.interrupted = self._run(fit)
            if validation is not None and restore_best and self._progress.best is not None and not self.interrupted:
                self._state.load(self._progress.best[1], "the best student so far", partly=True)
                self._check_validity()
        if self.interrupted:
            self._tell_interrupt(fit, return_on_interrupt)
        return self.history

    def _begin(
        self, stream: BatchStream, saved: Checkpoint | None, seed: int | None, is_kept: bool, allow_changes: bool
    ) -> dict[str, str]:
        """Find the parameters, and take everything else from the checkpoint, if there is one. Returns the run's fingerprint."""
        if seed is not None and saved is None:
            pyro.set_rng_seed(seed)
        call = stream.peek(self.num_steps)
        self._find(call)
        self._checked.clear()
        fingerprint = dict[str, str]()
        if is_kept or saved is not None:
            fingerprint = describe_run(
                self.objectives, self._state, self._optimiser, self._scheduler, stream, call,
                {"accumulate": self.accumulate, "clip_norm": self.clip_norm},
            )  # fmt: skip
        if saved is None:
            self._progress.begin, self._progress.best, self._progress.stale = self.num_steps, None, 0
            return fingerprint
        dropped = self.num_steps - saved.step
        self._progress = load_checkpoint(saved, self._state, self._optimiser, stream, fingerprint, allow_changes)
        self._last_checkpoint = saved.path
        self._last_call = self._last_call or call
        if dropped > 0:
            warnings.warn(f"resuming from {saved.path} has undone the last {dropped} steps of this trainer.", stacklevel=3)
        return fingerprint

    def _run(self, fit: _Fit) -> bool:
        """Train until the end, early stopping or Ctrl-C. Returns whether it was Ctrl-C."""
        first, started = self.num_steps, list[Callback]()
        try:
            for callback in fit.listeners:
                started.append(callback)
                callback.on_start(self, fit.end)
            with interruptible() as interrupt:
                self._take_steps(fit, interrupt)
                if self.num_steps > first or (fit.folder is not None and not fit.folder.all()):
                    self._finish(fit, interrupt)
        finally:
            for callback in started:
                callback.on_end(self)
        return interrupt.is_set()

    def _take_steps(self, fit: _Fit, interrupt: Event) -> None:
        while self.num_steps < fit.end and not interrupt.is_set() and not self._has_stalled(fit):
            calls: list[Call] = []
            try:
                with noting(interrupt):
                    calls = [fit.stream.next(self.num_steps) for _ in range(self.accumulate)]
            except RuntimeError:
                if not interrupt.is_set():  # Ctrl-C ends the workers of a DataLoader as well
                    raise
            if not calls:
                break
            row = self._optimise(calls)
            if fit.validation is not None and self.num_steps % fit.validate_every == 0:
                row["validation/loss"] = self._validate(fit)
                self.history.set_last({"validation/loss": row["validation/loss"]})
            if fit.folder is not None and self.num_steps % fit.checkpoint_every == 0 and self.num_steps < fit.end:
                self._check_validity()
                self._write(fit.folder, fit)
            with noting(interrupt):
                for callback in fit.listeners:
                    callback.on_step(self, row)

    def _finish(self, fit: _Fit, interrupt: Event) -> None:
        """Validate what was trained, and write it."""
        try:
            self._check_validity()
        except PyroKDError as error:
            if interrupt.is_set():
                raise KeyboardInterrupt(f"stopped by Ctrl-C, and what was trained is not valid: {error}") from error
            raise
        if fit.folder is not None:
            self._write(fit.folder, fit)

    def _has_stalled(self, fit: _Fit) -> bool:
        return fit.patience is not None and self._progress.stale >= fit.patience

    def _say_if_complete(self, fit: _Fit) -> None:
        if self.num_steps >= fit.end:
            reason = f"{self.num_steps} steps are done, and {fit.end} were asked for. To train longer, ask for more"
        elif self._has_stalled(fit):
            reason = f"it has stopped early, after {fit.patience} validations without improvement. To go on: patience=None"
        else:
            return
        warnings.warn(f"there was nothing to train: {reason}.", stacklevel=3)

    def _tell_interrupt(self, fit: _Fit, is_returned: bool) -> None:
        """Raise KeyboardInterrupt with what a script's log should say; or warn of it."""
        go_on = f"The checkpoint is {self._last_checkpoint}: go on from it with resume=True."
        if fit.folder is None:
            go_on = "There is no checkpoint: the parameters are those of the last step, and go with the process."
        message = f"stopped by Ctrl-C after step {self.num_steps} of {fit.end}. {go_on}"
        if not is_returned:
            raise KeyboardInterrupt(message)
        warnings.warn(message, stacklevel=3)

    def _validate(self, fit: _Fit) -> float:
        """The validation loss, with the weights of the last step, so that all are comparable; keeps the best student so far."""
        source = fit.validation
        value = float(source()) if callable(source) else self.evaluate(batches=source, step=fit.end).loss.mean
        if not math.isfinite(value):
            raise NonFiniteLossError(f"step {self.num_steps}: the validation loss is {value}; {self._where_saved()}")
        progress = self._progress
        if progress.best is None or value < progress.best[0] - fit.min_delta:
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

    def save_student(self, path: str | Path) -> None:
        """Write the trained tensors alone, for use without pyro_kd.

        What is written depends on the ending:

        - ``.safetensors``: every parameter (before its constraint) and buffer by name, a file of that library;
        - otherwise, where all of them are in the module that the student is or is a method of: its ``state_dict``, for
          ``module.load_state_dict(torch.load(path, weights_only=True))``;
        - otherwise, where all of them are in Pyro's parameter store: those entries, for ``pyro.get_param_store().load(path)``.

        What is written is valid: parameters are finite and within their constraints, and the programs have run with them on the
        arguments of the last step, under Pyro's validation. The file is there as a whole or not at all.

        Args:
            path: in a folder that is there.

        Raises:
            CheckpointError: neither holds all of them, so that the file would lose some; or it cannot be written.
            InvalidParameterError: a parameter or a distribution is not valid.
            NonFiniteLossError: the loss is NaN or infinite.
            NoParametersError: there was no step yet.
        """
        if not self._params:
            raise NoParametersError(
                "there is nothing to save before the first step: the student's parameters are found by running it"
            )
        self._check_validity()
        save_tensors(self._state, path)

    def _write(self, folder: CheckpointFolder, fit: _Fit) -> None:
        checkpoint = make_checkpoint(self._progress, self._state, self._optimiser, fit.stream, fit.fingerprint)
        self._last_checkpoint = folder.write(checkpoint)
        for callback in fit.listeners:
            callback.on_checkpoint(self, self._last_checkpoint)

    def _checkpoint_to_resume(self, folder: CheckpointFolder | None, resume: bool | str | Path) -> Checkpoint | None:
        """The checkpoint to go on from, or None.

        Raises:
            CheckpointError: there is none that is good; or nothing is to be resumed, and the folder is of another run.
        """
        if resume is False:
            there = [] if folder is None else folder.all()
            if there and self._last_checkpoint not in there:
                raise CheckpointError(
                    f"{there[-1].parent} holds checkpoints of another run, up to {there[-1].name}. Nothing was trained. Go on with "
                    "it: fit(..., resume=True); or use another folder."
                )
            return None
        if resume is not True:
            return CheckpointFolder.read(resume)
        if folder is None:
            raise TypeError("resume=True needs the folder: fit(..., checkpoint='runs/student', resume=True)")
        return folder.newest()


def _check_options(
    args: Any, kwargs: Any, batches: Any, validation: Any, validate_every: int, patience: int | None, checkpoint_every: int
) -> None:
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
