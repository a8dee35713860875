"""The value of objectives without training."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import NamedTuple

import pyro
import torch

from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.metrics import Estimate
from pyro_kd.training.batches import Call
from pyro_kd.training.objectives import Objective
from pyro_kd.utils.display import as_html, as_text
from pyro_kd.utils.randomness import keeping_random_state
from pyro_kd.utils.tables import plus_minus

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """Losses of programs, without training.

    Attributes:
        loss: the weighted sum of the objectives: mean over batches and samples, with its standard error.
        terms: likewise the weighted term of each site, for distillation losses.
    """

    loss: Estimate
    terms: dict[str, Estimate]

    def __repr__(self) -> str:
        return as_text("Evaluation", self._rows())

    def _repr_html_(self) -> str:
        return as_html("Evaluation", self._rows())

    def _rows(self) -> dict[str, str]:
        estimates = {"loss": self.loss} | {f"term {name}": term for name, term in self.terms.items()}
        return {name: plus_minus(value) for name, value in estimates.items()}


def evaluate(
    objectives: Mapping[str, Objective], calls: Iterable[Call], *, num_samples: int, seed: int | None, step: int
) -> Evaluation:
    """The weighted sum of objectives, in eval mode and without gradients.

    Args:
        objectives: by name.
        calls: arguments of the programs, one batch after the other.
        num_samples: number of evaluations of each batch, with different noise.
        seed: of the noise, or None for the global stream. With a seed the random generators end as they were.
        step: the step whose weights and schedules apply. An objective whose weight is 0 there is left out, as in training.
    """
    losses, terms = list[float](), dict[tuple[str, str], list[float]]()
    with ExitStack() as contexts:
        contexts.enter_context(nullcontext() if seed is None else keeping_random_state())
        if seed is not None:
            pyro.set_rng_seed(seed)
        for objective in objectives.values():
            for program in objective.trained_programs:
                contexts.enter_context(evaluation_mode(program))
        for call in calls:
            for _ in range(num_samples):
                loss, found = _evaluate_once(objectives, call, step)
                for key in {*terms, *found}:  # a site that some batches lack has 0 there
                    terms.setdefault(key, [0.0] * len(losses)).append(found.get(key, 0.0))
                losses.append(loss)
    by_site = {
        site if len(objectives) == 1 else f"{name}/{site}": _estimate(values)
        for (name, site), values in sorted(terms.items())
    }
    return Evaluation(_estimate(losses), by_site)


def _evaluate_once(objectives: Mapping[str, Objective], call: Call, step: int) -> tuple[float, dict[tuple[str, str], float]]:
    """The weighted sum of the objectives on one batch, and its terms by objective and site."""
    total, found = 0.0, dict[tuple[str, str], float]()
    for name, objective in objectives.items():
        weight = objective.weight_at(step)
        if weight == 0:
            continue
        value, terms = objective.evaluate(step, *call)
        total += weight * value.item()
        found |= {(name, site): weight * term.item() for site, term in terms.items()}
    return total, found


def _estimate(values: list[float]) -> Estimate:
    return Estimate.of(torch.tensor(values, dtype=torch.float64))
