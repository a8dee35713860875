"""Objectives without training."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import pyro
import torch

from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.metrics import Estimate
from pyro_kd.training.batches import Call
from pyro_kd.training.objectives import Objective
from pyro_kd.utils.display import as_html, as_text
from pyro_kd.utils.randomness import RandomState
from pyro_kd.utils.tables import plus_minus

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """Losses of programs that are not being trained.

    Attributes:
        loss: the weighted sum of the objectives: mean over batches or samples, with its standard error.
        terms: likewise each site's weighted term, of distillation losses.
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
        num_samples: how often to evaluate each, on other noise.
        seed: of the noise, or None for the global stream; with a seed the random generators end as they were.
        step: whose weights and schedules to take.
    """
    losses, terms = list[float](), dict[tuple[str, str], list[float]]()
    before = RandomState.now()
    if seed is not None:
        pyro.set_rng_seed(seed)
    try:
        with ExitStack() as modes:
            for objective in objectives.values():
                for program in objective.programs:
                    modes.enter_context(evaluation_mode(program))
            for call in calls:
                for _ in range(num_samples):
                    found = _terms(objectives, call, step)
                    losses.append(sum(found.values()))
                    for key in {*terms, *found}:  # a site that some batches lack has 0 there
                        terms.setdefault(key, [0.0] * (len(losses) - 1)).append(found.get(key, 0.0))
    finally:
        if seed is not None:
            before.restore()
    by_site = {
        site if len(objectives) == 1 else f"{name}/{site}": _estimate(values)
        for (name, site), values in sorted(terms.items())
        if site != _WHOLE
    }
    return Evaluation(_estimate(losses), by_site)


_WHOLE = ""  # the site of a loss that has no terms


def _terms(objectives: Mapping[str, Objective], call: Call, step: int) -> dict[tuple[str, str], float]:
    """The weighted terms of one batch, by objective and site."""
    found = dict[tuple[str, str], float]()
    for name, objective in objectives.items():
        args, kwargs = call
        weight = objective.weight_at(step)
        terms = objective.terms(step, args, kwargs)
        if terms is None:
            terms = {_WHOLE: objective.value(step, args, kwargs, validated=True)}
        found |= {(name, site): weight * term.item() for site, term in terms.items()}
    return found


def _estimate(values: list[float]) -> Estimate:
    return Estimate.of(torch.tensor(values, dtype=torch.float64))
