"""One optimisation step on a weighted sum of objectives: parameters found, gradients added up, checked and clipped."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_kd.errors import InvalidParameterError, NonFiniteLossError, NoParametersError
from pyro_kd.isolation.freezing import FrozenProgram
from pyro_kd.isolation.programs import require_callable
from pyro_kd.losses.checks import lasting
from pyro_kd.losses.isolation import reached_again
from pyro_kd.losses.module import owners
from pyro_kd.training.batches import Call, to_device
from pyro_kd.training.devices import require_device
from pyro_kd.training.history import History
from pyro_kd.training.objectives import Objective, learns_nothing
from pyro_kd.training.optimisers import Optimiser, Scheduler, make_optimiser
from pyro_kd.training.parameters import ProgramState
from pyro_kd.training.progress import Progress
from pyro_kd.training.validity import check_validity, naming_invalid_parameters
from pyro_kd.utils.autograd import leaves_of
from pyro_kd.utils.display import as_html, as_text
from pyro_kd.utils.randomness import RandomState
from pyro_kd.utils.tensors import tensors_in

__all__ = ["Stepper"]


class Stepper:
    """Takes single steps, and knows how far it has come; see :class:`~pyro_kd.training.Trainer` for its arguments."""

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
        if device is not None:
            require_device(device)
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.device = device
        self.log_every = log_every
        self.interrupted = False
        self._scheduler = scheduler
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
        self._last_call: Call | None = None
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

    def __repr__(self) -> str:
        return as_text(type(self).__name__, self._rows())

    def _repr_html_(self) -> str:
        return as_html(type(self).__name__, self._rows())

    def _rows(self) -> dict[str, str]:
        done = f"{self.num_steps} done" + (f", last loss {self.history.losses[-1]:.4g}" if self.num_steps else "")
        count = sum(param.numel() for param in self._params.values())
        is_bound = bool(self._params)
        return {
            "steps": done,
            **{f"objective {name}": repr(objective) for name, objective in self.objectives.items()},
            "optimiser": self._optimiser.name if is_bound else "made at the first step",
            "parameters": f"{count:,} in {len(self._params)} tensors" if is_bound else "found at the first step",
        }

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimisation step on these arguments of the programs. Returns the loss before it.

        Raises:
            NonFiniteLossError: the loss or its gradient is NaN or infinite; the parameters are as they were.
            InvalidParameterError: a distribution's parameter is outside of its constraint; likewise.
            NoParametersError: the loss depends on nothing that is trained.
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
                "the student has no parameter that requires a gradient: give it pyro.param statements or nn.Module parameters. If "
                "the frozen teacher stands in the student's place, exchange them: Distiller(student, teacher, ...)."
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
            with naming_invalid_parameters():
                for call in calls:
                    self._backward(step, call, 1 / len(calls), row)
                    self._prepare(call)  # a parameter may have come into being
                self._check_gradient()
        except (NonFiniteLossError, InvalidParameterError) as error:
            for param in self._params.values():
                param.grad = None
            raise type(error)(
                f"step {step + 1}: {error} The parameters are those of step {step} (buffers, as of batch norm, have seen the batch); "
                f"{self._where_saved()}."
            ) from error
        self._last_call = calls[-1]
        rate = self._optimiser.step()
        if rate is not None:
            row["lr"] = rate
        self._progress.num_steps += 1
        row["seconds"] = time.perf_counter() - begin
        self.history.append(row)
        return row

    def _check_validity(self) -> None:
        """Raise where the parameters after the last step are not valid, or make a loss that is not finite."""
        try:
            check_validity(self._state, self.objectives, self._last_call, max(self.num_steps - 1, 0))
        except (NonFiniteLossError, InvalidParameterError) as error:
            raise type(error)(f"after step {self.num_steps}: {error} Now {self._where_saved()}.") from error

    def _where_saved(self) -> str:
        return f"the last checkpoint is {self._last_checkpoint}" if self._last_checkpoint else "no checkpoint was written"

    def _backward(self, step: int, call: Call, share: float, row: dict[str, float]) -> None:
        """Add the gradient of the objectives on one batch."""
        args, kwargs = call
        is_logged = step % self.log_every == 0
        for name, objective in self._trained.items():
            weight = objective.weight_at(step)
            if weight == 0:
                continue
            if not objective.is_differentiable:
                number = objective.add_gradients(step, args, kwargs, weight * share, self._params.values())
                self._note(row, name, number, weight, share)
                continue
            terms = objective.terms(step, args, kwargs) if is_logged else None
            if terms is None:
                value = objective.value(step, args, kwargs, validated=is_logged)
            else:
                value = torch.stack(list(terms.values())).sum() if terms else torch.zeros(())
                for site, term in terms.items():
                    label = f"term/{site}" if len(self.objectives) == 1 else f"term/{name}/{site}"
                    row[label] = row.get(label, 0.0) + weight * share * term.item()
            if is_logged or name not in self._checked or not value.requires_grad:
                once_more = partial(objective.value, step, args, kwargs)
                self._check_leaves(name, value, call, partial(reached_again, once_more, *objective.programs))
                self._checked.add(name)
            self._note(row, name, value.item(), weight, share)
            (value if weight * share == 1 else weight * share * value).backward()

    def _note(self, row: dict[str, float], name: str, number: float, weight: float, share: float) -> None:
        """Add the value of an objective to what is measured."""
        row["loss"] += weight * share * number
        if len(self.objectives) > 1:
            row[f"loss/{name}"] = row.get(f"loss/{name}", 0.0) + share * number

    def _check_leaves(self, name: str, value: Tensor, call: Call, again: Callable[[], set[Tensor]]) -> None:
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
            raise learns_nothing(f"objective {name!r}")

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
