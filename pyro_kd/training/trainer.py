"""The training loop as a user sees it: one call for many steps, validation, checkpoints, and an end that loses nothing.

Calls go one way: a :class:`Trainer` checks its options and makes a :class:`~pyro_kd.training.fitting.Fit`; the fit tells the
:class:`~pyro_kd.training.stepper.Stepper` to take steps; the stepper asks each :class:`~pyro_kd.training.Objective` for its value.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_kd.errors import CheckpointError, NoParametersError
from pyro_kd.training.batches import BatchStream
from pyro_kd.training.callbacks import Callback, ProgressBar
from pyro_kd.training.checkpoints import Checkpoint, CheckpointFolder
from pyro_kd.training.duration import Duration
from pyro_kd.training.evaluation import Evaluation
from pyro_kd.training.fitting import Fit
from pyro_kd.training.history import History
from pyro_kd.training.objectives import Objective
from pyro_kd.training.optimisers import Optimiser, Scheduler
from pyro_kd.training.options import Checkpoints, Validation, refuse_former_names
from pyro_kd.training.saving import save_tensors
from pyro_kd.training.stepper import Stepper
from pyro_kd.utils.display import as_html, as_text

__all__ = ["Trainer"]


class Trainer:
    """Minimises a weighted sum of objectives by gradient descent.

    Under ``torchrun``, several processes train one student: docs/several_processes.md.

    Args:
        objectives: a :class:`~pyro_kd.training.DistillationObjective` or an :class:`~pyro_kd.training.ELBOObjective`, or several by
            name, all trained at once.
        optim: a torch optimiser of the programs' parameters; a function that makes one from a list of parameters, which are
            found by running the programs; or a Pyro optimiser. Where something else is minimised from a step on (a turn of
            :func:`~pyro_kd.training.in_turn`, the end of local steps, a :func:`~pyro_kd.training.switch` of a weight or of teacher
            forcing), it forgets the moments of the earlier gradients: those of Adam may be a hundred times too small for the new
            ones, so that its steps would be as much too large.
        scheduler: of the learning rate, for a torch optimiser: a scheduler, or a function that makes one from the optimiser.
            It takes a step with the optimiser; ``ReduceLROnPlateau`` takes one at each validation.
        clip_norm: largest norm of the gradient; None does not clip.
        accumulate: number of batches whose mean loss makes one optimisation step.
        device: where batches and the programs' modules are moved to.
        log_every: number of steps between those whose terms, one per site, are kept in the history.
        compile: train by compiled graphs (docs/performance.md): True, or options of
            :meth:`DistillationLoss.compile <pyro_kd.losses.base.DistillationLoss.compile>`. Evaluations are not compiled. What is
            trained are copies of the losses then, which :attr:`objectives` has.
        precision: ``"bf16-mixed"`` runs networks in bfloat16 and everything else in float32; ``"16-mixed"`` likewise in float16, on
            CUDA only, with a scale for the loss; ``"32-true"`` and None run everything in float32.

    Attributes:
        interrupted: whether the last fit was ended by Ctrl-C.

    Raises:
        TypeError: one of the objectives is no objective, or the optimiser is none.
        MissingDeviceError: there is no such device.
        ValueError: there is no such precision.

    Example:
        A teacher, by its ELBO::

            trainer = Trainer(ELBOObjective(Trace_ELBO(), vae.model, vae.guide), lambda params: torch.optim.Adam(params, lr=1e-3))
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
        precision: str | None = None,
    ) -> None:
        self.interrupted = False
        self._stepper = Stepper(
            objectives,
            optim,
            scheduler=scheduler,
            clip_norm=clip_norm,
            accumulate=accumulate,
            device=device,
            log_every=log_every,
            compile=compile,
            precision=precision,
        )

    def __repr__(self) -> str:
        return as_text(type(self).__name__, self._rows())

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> dict[str, str]:
        done = f"{self.num_steps} done" + (f", last loss {self.history.losses[-1]:.4g}" if self.num_steps else "")
        count = sum(param.numel() for param in self.parameters.values())
        is_bound = bool(self.parameters)
        return {
            "steps": done,
            **{f"objective {name}": repr(objective) for name, objective in self.objectives.items()},
            "optimiser": self._stepper.optimiser.name if is_bound else "made at the first step",
            "parameters": f"{count:,} in {len(self.parameters)} tensors" if is_bound else "found at the first step",
        }

    @property
    def objectives(self) -> dict[str, Objective]:
        """What is minimised, by name."""
        return dict(self._stepper.objectives)

    @property
    def num_steps(self) -> int:
        """Optimisation steps done."""
        return self._stepper.num_steps

    @property
    def history(self) -> History:
        """What was measured at each step."""
        return self._stepper.progress.history

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name; empty before the first step."""
        return dict(self._stepper.params)

    def expect(self, total_steps: int) -> None:
        """Say how many steps there will be in all, before the first fit, which otherwise takes its own end for that.

        Defaults that are a share of the steps depend on it, such as the first quarter of :class:`~pyro_kd.SurrogateKD`.
        """
        self._stepper.tell_end(total_steps)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimisation step on these arguments of the programs. Returns the loss before the step.

        Raises:
            NonFiniteLossError: the loss or its gradient is NaN or infinite. The parameters are as before the step.
            InvalidParameterError: a distribution's parameter violates its constraint; likewise.
            NoParametersError: the loss depends on nothing that is trained.
        """
        return self._stepper.step(args, kwargs)["loss"]

    def stop(self) -> None:
        """End the fit in progress after its current step, as if that were the last: for callbacks.

        The checkpoint is written, the best parameters are restored, and :meth:`fit` returns the history. Of several processes any may
        ask; all of them take one more step, at which they learn of it, and end together. ``on_start`` may ask too: then no step is
        taken. Outside of a fit this does nothing.
        """
        self._stepper.is_stopping = True

    def fit(
        self,
        *args: Any,
        steps: int | None = None,
        total_steps: int | None = None,
        batches: Iterable[Any] | None = None,
        seed: int | None = None,
        validation: Validation | Callable[[], float] | Iterable[Any] | None = None,
        checkpoints: Checkpoints | str | Path | None = None,
        resume: bool | str | Path = False,
        allow_changes: bool = False,
        return_on_interrupt: bool = False,
        progress: bool | str = True,
        callbacks: Sequence[Callback] = (),
        **kwargs: Any,
    ) -> History:
        """Train for a number of optimisation steps.

        Ctrl-C ends the fit after the current step: the checkpoint is written, if there is a folder, then KeyboardInterrupt is raised.
        A second Ctrl-C ends the fit at once. A callback ends it by :meth:`stop`. Before each checkpoint and at the end the
        programs run once more, under Pyro's validation.

        Args:
            args, kwargs: arguments of the programs in every step, such as the number of rows; or else ``batches``.
            steps: number of optimisation steps of this fit. A resumed fit counts the steps before the break, so that the same lines
                end where they would have ended without it. None: one pass through ``batches``, which then need a length.
            total_steps: instead of ``steps``: the number of steps of all fits together.
            batches: an iterable of batches (a ``DataLoader``, a list), which is repeated. A tuple or list gives
                positional arguments, a mapping gives keyword arguments, anything else is the only argument.
            seed: of every random generator, set at the start; not when the fit is resumed.
            validation: :class:`~pyro_kd.training.Validation`: what to measure, how often, and when to stop early. A bare function
                that returns a loss, or bare batches, are validated every 100 steps.
            checkpoints: :class:`~pyro_kd.training.Checkpoints`: where and how often to write checkpoints. A bare folder
                takes one every 1000 steps and keeps 2.
            resume: True resumes from the newest good checkpoint in the folder, if there is one; a path resumes from that checkpoint.
                On a CPU the result is bit for bit that of a run without a break, if the order of the batches depends only on the
                generators of torch, NumPy and Python. Exceptions are persistent workers that draw random numbers, and Pyro's Jit
                losses, which draw some when they compile.
            allow_changes: resume also where teacher, loss or data differ from those of the checkpoint. The optimiser's
                state, learning rates included, comes from the checkpoint.
            return_on_interrupt: return the history after Ctrl-C, with a warning, which is convenient in a notebook.
            progress: whether to show a progress bar; a string is its label.
            callbacks: see :class:`~pyro_kd.training.Callback`.

        Returns:
            The history.

        Raises:
            BatchesExhaustedError: the batches cannot be restarted, and ran out.
            NonFiniteLossError: the loss or its gradient is NaN or infinite. The error names the step, the site and the last
            checkpoint. InvalidParameterError: a parameter or a distribution is not valid. No checkpoint is written of it.
            NoParametersError: an objective depends on nothing that is trained.
            CheckpointError: the folder cannot be written (before training), or holds no good checkpoint to resume from.
            FolderInUseError: a different run writes into the folder.
            RunMismatchError: teacher, loss or data differ from those of the checkpoint.
            ArchitectureMismatchError: the checkpoint's parameters are not those of the student.
            KeyboardInterrupt: Ctrl-C.

        Warns:
            UserWarning: there is nothing to train: the resumed fit is complete, or ``total_steps`` are done.
        """
        refuse_former_names(kwargs)
        if batches is not None and (args or kwargs):
            raise TypeError(
                "pass either arguments of the programs or batches, not both: an objective's arguments=... can add to a batch"
            )
        stepper, processes = self._stepper, self._stepper.processes
        checkpoints = None if checkpoints is None else Checkpoints.of(checkpoints)
        folder = None if checkpoints is None else CheckpointFolder(checkpoints.folder, checkpoints.keep)
        with processes.together():
            processes.begin(seed)
            batches = processes.share_out(batches)
            fit = Fit(
                stepper,
                Duration(steps, total_steps, batches, stepper.accumulate),
                BatchStream(batches, (args, kwargs), stepper.device),
                validation=None if validation is None else Validation.of(validation),
                checkpoints=checkpoints,
                folder=folder,
                listeners=[*callbacks, *_progress_bar(progress)],
                run=self,
            )
            with folder.claimed() if folder is not None and processes.is_first else nullcontext():
                saved = processes.of_first(partial(_checkpoint_to_resume, folder, resume, stepper.last_checkpoint))
                undone = fit.begin(saved, seed=seed, allow_changes=allow_changes)
                if saved is not None and undone:
                    warnings.warn(
                        f"resuming from {saved.path} has undone the last {undone} steps of this trainer.", stacklevel=2
                    )
                if reason := fit.nothing_to_do():
                    warnings.warn(f"there was nothing to train: {reason}.", stacklevel=2)
                self.interrupted = fit.run()
            processes.end()
        if self.interrupted:
            go_on = f"The checkpoint is {stepper.last_checkpoint}: resume from it with resume=True."
            if folder is None:
                go_on = (
                    "There is no checkpoint: the parameters are those of the last step, and are lost when the process ends."
                )
            message = f"stopped by Ctrl-C after step {self.num_steps} of {fit.end}. {go_on}"
            if not return_on_interrupt:
                raise KeyboardInterrupt(message)
            warnings.warn(message, stacklevel=2)
        return self.history

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
            args, kwargs: arguments of the programs; or else ``batches``.
            batches: an iterable of batches, see :meth:`fit`.
            num_samples: number of evaluations of each batch, with different noise.
            seed: of the noise, and of the generators of a ``DataLoader``, so that two evaluations have the same noise and batches.
                All generators end as they were. None draws from the global stream.
            step: the step whose weights and schedules apply; None: the next one.

        Raises:
            ValueError: there is no batch.
        """
        stream = BatchStream(batches, (args, kwargs), self._stepper.device)
        return self._stepper.evaluate(stream, num_samples=num_samples, seed=seed, step=step)

    def save_student(self, path: str | Path) -> None:
        """Write the trained tensors alone, for use without pyro_kd.

        The ending of the file's name decides what is written:

        - ``.safetensors``: every parameter (before its constraint) and buffer by name, a file of that library;
        - otherwise, where all of them are in the module that the student is or is a method of: its ``state_dict``, for
          ``module.load_state_dict(torch.load(path, weights_only=True))``;
        - otherwise, where all of them are in Pyro's parameter store: those entries, for ``pyro.get_param_store().load(path)``.

        What is written is valid: the parameters are finite and within their constraints, and the programs have run with them on the
        arguments of the last step, under Pyro's validation. The file is written as a whole or not at all.

        Args:
            path: a file in a folder that exists.

        Raises:
            CheckpointError: neither form holds all of the tensors, so the file would lose some; or the file cannot be written.
            InvalidParameterError: a parameter or a distribution is not valid.
            NonFiniteLossError: the loss is NaN or infinite.
            NoParametersError: there was no step yet.
        """
        if not self.parameters:
            raise NoParametersError(
                "there is nothing to save before the first step: the student's parameters are found by running it"
            )
        self._stepper.check_validity()
        if self._stepper.processes.is_first:
            save_tensors(self._stepper.state, path)


def _progress_bar(progress: bool | str) -> list[ProgressBar]:
    return [ProgressBar(progress if isinstance(progress, str) else "")] if progress else []


def _checkpoint_to_resume(
    folder: CheckpointFolder | None, resume: bool | str | Path, last_checkpoint: Path | None
) -> Checkpoint | None:
    """The checkpoint to resume from, or None.

    Args:
        folder: of the fit.
        resume: as the user gave it.
        last_checkpoint: the one that this trainer wrote or loaded last.

    Raises:
        CheckpointError: there is no good checkpoint; or nothing is to be resumed, and the folder belongs to a different run.
        TypeError: there is no folder to resume from.
    """
    if resume is True:
        if folder is None:
            raise TypeError("resume=True needs the folder: fit(..., checkpoints='runs/student', resume=True)")
        return folder.newest()
    if resume is not False:
        return CheckpointFolder.read(resume)
    existing = [] if folder is None else folder.all()
    if existing and last_checkpoint not in existing:
        raise CheckpointError(
            f"{existing[-1].parent} holds checkpoints of a different run, up to {existing[-1].name}. Nothing was trained. To resume "
            "that run: fit(..., resume=True). Or use a different folder."
        )
    return None
