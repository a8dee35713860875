"""The students of the VRNN's experiment by the names that ``--students`` takes: how each is distilled."""

import re

from examples._methods import FITTED, FORCED, LOCAL, ON_POLICY, SCRATCH, SELECTED, SURROGATE
from examples._training import paper_loss
from pyro_kd import LocalKD, OnPolicyKD, SurrogateKD
from pyro_kd.divergences import kl, wasserstein2
from pyro_kd.losses import DistillationLoss

__all__ = ["student_named", "targets"]


def targets(length: int) -> list[str]:
    """The sites that a student is to reproduce: all pens and movements."""
    return [f"{kind}{t}" for t in range(1, length + 1) for kind in ("pen", "move")]


def student_named(option: str, length: int) -> tuple[str, DistillationLoss | None]:
    """The label of a student that ``--students`` names, and its distillation loss; None for ``scratch``."""
    if option == SCRATCH:
        return SCRATCH, None
    found = re.fullmatch(r"(local|surrogate|first|policy|selected|fitted)-(w2-)?(\d+\.?\d*)", option)
    if found is None:
        raise ValueError(
            f"--students {option!r} is unknown. The students are scratch, local-W, local-w2-W, surrogate-W, surrogate-w2-W, first-W, "
            "first-w2-W, policy-W, policy-w2-W, selected-W, selected-w2-W, fitted-W and fitted-w2-W, where W is a number, such as "
            "surrogate-0.001."
        )
    kind, form, weight = found.groups()
    label, make = {
        "local": (LOCAL, LocalKD),
        "surrogate": (SURROGATE, paper_loss),
        "first": (FORCED, SurrogateKD),
        "policy": (ON_POLICY, OnPolicyKD),
        "selected": (SELECTED, paper_loss),
        "fitted": (FITTED, paper_loss),
    }[kind]
    loss = make(
        targets(length),
        latent_weight=float(weight),
        latent_divergence=wasserstein2 if form else kl,
        latent_reduction="mean" if form else "sum",
    )
    return f"{label}{', mean W2²' if form else ''}, weight {weight}", loss
