"""One fit from its first step to its last: batches, validation, early stopping, checkpoints, callbacks, Ctrl-C.

:meth:`Trainer.fit <pyro_kd.training.Trainer.fit>` checks what the user asked for and makes a :class:`Fit` of it; a fit calls the
stepper. It does not know how a step is taken.
"""

import math
import warnings
from collections.abc import Sequence
from threading import Event
from typing import Any

import pyro

from pyro_kd.errors import NonFiniteLossError, PyroKDError
from pyro_kd.losses.teacher_draws import draw_in
from pyro_kd.training.batches import BatchStream, Call
from pyro_kd.training.callbacks import Callback, Run
from pyro_kd.training.checkpoints import Checkpoint, CheckpointFolder
from pyro_kd.training.duration import Duration
from pyro_kd.training.fingerprint import digest_of
from pyro_kd.training.interrupts import interruptible, noting
from pyro_kd.training.kept_draws import kept_draws
from pyro_kd.training.options import Checkpoints, Validation
from pyro_kd.training.processes.sameness import share_numbers, warn_of_different_students
from pyro_kd.training.processes.together import GO_ON, Ending, Meeting
from pyro_kd.training.progress import load_checkpoint, make_checkpoint
from pyro_kd.training.runs import describe_run
from pyro_kd.training.stepper import Stepper
from pyro_kd.utils.tensors import tensors_in
from pyro_kd.utils.user_code import called

__all__ = ["Fit"]


class Fit:
    """A fit in progress.

    Args:
        stepper: takes the steps.
        duration: how long the fit is.
        stream: the batches.
        validation: how the fit is validated, or None.
        checkpoints: how often checkpoints are written, or None.
        folder: where they are written, or None.
        listeners: callbacks.
        run: the trainer, which callbacks are given.

    Attributes:
        end: number of steps after which the fit ends; known after :meth:`begin`.
    """

    def __init__(
        self,
        stepper: Stepper,
        duration: Duration,
        stream: BatchStream,
        *,
        validation: Validation | None,
        checkpoints: Checkpoints | None,
        folder: CheckpointFolder | None,
        listeners: Sequence[Callback],
        run: Run,
    ) -> None:
        self.end = 0
        self._stepper = stepper
        self._duration = duration
        self._stream = stream
        self._validation = validation
        self._checkpoints = checkpoints
        self._folder = folder
        self._processes = stepper.processes
        self._listeners = [each for each in listeners if self._processes.is_first or each.in_every_process]
        self._run = run
        self._fingerprint: dict[str, str] = {}
        self._needs_checkpoint = False  # even if no step is taken

    def begin(self, saved: Checkpoint | None, *, seed: int | None, allow_changes: bool) -> int:
        """Find the parameters, and take everything else from a checkpoint, if there is one.

        Args:
            saved: the checkpoint to resume from, or None.
            seed: of every random generator; not used when a checkpoint is resumed from.
            allow_changes: whether the checkpoint may be from a run with a different fingerprint.

        Returns:
            The number of steps of this trainer that the checkpoint undoes, 0 without one.
        """
        stepper, processes, folder = self._stepper, self._processes, self._folder
        if seed is not None and saved is None and processes.is_alone:  # several processes have seeds already
            pyro.set_rng_seed(seed)
        call = self._stream.peek(stepper.num_steps)
        stepper.begin_fit(call)
        if folder is not None or saved is not None:
            self._fingerprint = processes.of_first(lambda: describe_run(stepper, self._stream, call))
        if folder is not None:
            self._needs_checkpoint = processes.of_first(lambda: not folder.all())
        undone = 0
        if saved is None:
            stepper.progress.begin_fit()
        else:
            undone = max(stepper.num_steps - saved.step, 0)
            progress = load_checkpoint(
                saved,
                stepper.state,
                stepper.optimiser,
                self._stream,
                self._fingerprint,
                stepper.objectives,
                allow_changes=allow_changes,
                rank=processes.rank,
                size=processes.size,
                device=stepper.device,
            )
            stepper.resume(progress, saved.path, call)
            self._note_new_number(saved)
        self.end = self._duration.end(stepper.progress.begin)
        stepper.tell_end(self.end)
        self._agree(call)
        return undone

    def _note_new_number(self, saved: Checkpoint) -> None:
        """Where a different number of processes has written the checkpoint, give each a new random stream, and say so."""
        processes, before = self._processes, saved.values.get("processes", 1)
        if before == processes.size:
            return
        processes.part_streams()
        if processes.is_first:
            warnings.warn(
                f"{saved.path} was written by {_counted(before)}, and {_counted(processes.size)} resumed from it. Parameters, "
                "optimiser, schedules and history go on where they were. The current epoch begins again, and from here on the noise "
                "is not that of a run without a break.",
                stacklevel=5,
            )

    def _agree(self, call: Call) -> None:
        """Make sure that all processes train the same."""
        validation, checkpoints = self._validation, self._checkpoints
        options: dict[str, Any] = {
            "steps done": self._stepper.num_steps,
            "steps at the end": self.end,
            **self._stream.lengths,
        }
        options |= {"validation": validation and (validation.every, validation.patience, validation.min_delta)}
        options |= {"checkpoints": checkpoints and (checkpoints.every, checkpoints.keep)}
        self._warn_of_equal_batches(call)
        self._stepper.agree(call, options)

    def _warn_of_equal_batches(self, call: Call) -> None:
        """Warn where several processes take the same rows of data."""
        if self._processes.is_alone:
            return
        args, kwargs = call
        tensors = tensors_in([args, kwargs] if (draw := draw_in(args)) is None else draw.tensors)
        rows = None if self._stream.is_shared_out else [digest_of(tensor) for tensor in tensors]
        everywhere = self._processes.exchange(rows)  # in all of them: lists of batches may differ in length
        if rows and all(others == rows for others in everywhere) and self._processes.is_first:
            warnings.warn(
                "all processes train on the same batches, with different noise. Pass a DataLoader, whose rows are then shared out, "
                "or give each process batches of its own (torch.utils.data.DistributedSampler).",
                stacklevel=5,
            )

    def nothing_to_do(self) -> str | None:
        """Why there is no step to take; None where there is one."""
        if self._stepper.num_steps >= self.end:
            return f"{self._stepper.num_steps} steps are done, and {self.end} were asked for. To train longer, ask for more"
        if self._validation is not None and self._has_stalled():
            patience = self._validation.patience
            return f"it has stopped early, after {patience} validations without improvement. To continue: patience=None"
        return None

    def run(self) -> bool:
        """Train until the end, early stopping, :meth:`Trainer.stop` or Ctrl-C. Returns whether it was Ctrl-C."""
        first, started = self._stepper.num_steps, list[Callback]()
        self._stepper.is_stopping = False
        try:
            for callback in self._listeners:
                started.append(callback)
                called(callback.on_start, "a callback", "on_start(trainer, steps)", self._run, self.end)
            with interruptible() as interrupt:
                self._take_steps(interrupt)
                if self._stepper.num_steps > first or self._needs_checkpoint:
                    self._finish(interrupt)
            if not interrupt.is_set():
                self._restore_best()
        finally:
            for callback in reversed(started):  # a tracker closes after those that write to it
                called(callback.on_end, "a callback", "on_end(trainer)", self._run)
        return interrupt.is_set()

    def _take_steps(self, interrupt: Event) -> None:
        stepper, is_alone = self._stepper, self._processes.is_alone
        is_over = self._processes.mean(Meeting.START, float(stepper.is_stopping)) > 0  # one of them has asked in on_start
        ending = Ending(is_alone and interrupt.is_set(), is_over)
        while stepper.num_steps < self.end and ending == GO_ON and not self._has_stalled():
            calls = self._next_batches(interrupt)
            if not calls:
                break
            row = stepper.optimise(calls, Ending(interrupt.is_set(), stepper.is_stopping))
            if self._validation is not None and stepper.num_steps % self._validation.every == 0:
                row["validation/loss"] = self._validation_loss(self._validation)
                stepper.progress.history.set_last({"validation/loss": row["validation/loss"]})
            with noting(interrupt):
                for callback in self._listeners:
                    called(callback.on_step, "a callback", "on_step(trainer, row)", self._run, row)
            self._note_validation(row.get("validation/loss"))  # with what a callback has changed, as the next step finds it
            if self._is_checkpoint_due():
                stepper.check_validity()
                self._write_checkpoint()
            ending = Ending(interrupt.is_set(), stepper.is_stopping) if is_alone else stepper.ending
        if ending.interrupted:
            interrupt.set()

    def _next_batches(self, interrupt: Event) -> list[Call]:
        """The batches of the next step; empty after Ctrl-C."""
        calls: list[Call] = []
        try:
            with noting(interrupt):
                calls = self._stream.take(self._stepper.num_steps, self._stepper.accumulate)
        except RuntimeError:
            if not interrupt.is_set():  # Ctrl-C also ends the workers of a DataLoader
                raise
        return calls

    def _finish(self, interrupt: Event) -> None:
        """Check what was trained, and write it."""
        try:
            self._stepper.check_validity()
        except PyroKDError as error:
            if interrupt.is_set():
                raise KeyboardInterrupt(f"stopped by Ctrl-C, and what was trained is not valid: {error}") from error
            raise
        warn_of_different_students(self._processes, self._stepper.state)
        self._write_checkpoint()

    def _validation_loss(self, validation: Validation) -> float:
        stepper, source = self._stepper, validation.source
        if callable(source):
            value = float(called(source, "validation", "f()"))
        else:
            stream = BatchStream(source, ((), {}), stepper.device)
            value = stepper.evaluate(stream, num_samples=1, seed=0, step=max(self.end - 1, 0)).loss.mean
        value = self._processes.mean(Meeting.VALIDATION, value)
        if not math.isfinite(value):
            raise NonFiniteLossError(f"step {stepper.num_steps}: the validation loss is {value}; {stepper.last_saved()}")
        return value

    def _note_validation(self, value: float | None) -> None:
        """Keep the parameters where a validation loss is the best so far, and tell the scheduler; None where there is none."""
        if value is None or self._validation is None:
            return
        stepper = self._stepper
        settled = max(objective.settles_at for objective in stepper.objectives.values())
        if stepper.num_steps >= settled:  # before that, something else is trained
            stepper.progress.note_validation(value, stepper.state.values, min_delta=self._validation.min_delta)
            stepper.optimiser.on_validation(value)

    def _has_stalled(self) -> bool:
        """Whether there were as many validations without improvement as the user has patience for."""
        patience = None if self._validation is None else self._validation.patience
        return patience is not None and self._stepper.progress.stale >= patience

    def _restore_best(self) -> None:
        """Load the parameters of the best validation, if that is wanted and there was one."""
        best = self._stepper.progress.best
        if self._validation is not None and self._validation.restore_best and best is not None:
            self._stepper.state.load(best[1], "the best student so far", partly=True)
            self._stepper.check_validity()

    def _is_checkpoint_due(self) -> bool:
        """Whether to write a checkpoint after this step, which is not the last."""
        steps = self._stepper.num_steps
        return self._checkpoints is not None and steps % self._checkpoints.every == 0 and steps < self.end

    def _write_checkpoint(self) -> None:
        if self._folder is None:
            return
        stepper, processes = self._stepper, self._processes
        # It may be an error, which the others learn of when they meet.
        draws = kept_draws(stepper.objectives, processes.rank)
        processes.meet(Meeting.CHECKPOINT)
        share_numbers(processes, stepper.state)
        everywhere = processes.exchange((self._stream.place, draws))
        path = self._folder.path
        if processes.is_first:
            path = self._folder.write(
                make_checkpoint(stepper.progress, stepper.state, stepper.optimiser, self._fingerprint, everywhere)
            )
        stepper.last_checkpoint = path
        for callback in self._listeners:
            called(callback.on_checkpoint, "a callback", "on_checkpoint(trainer, path)", self._run, path)


def _counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
