"""What it is worth that a trainer's optimiser starts anew where the loss changes: local steps, then surrogate distillation.

    python -m tests.benchmarks.optimiser_restarts             # some minutes on one core
    python -m tests.benchmarks.optimiser_restarts --seeds 1

Students of the chain of 20 real-valued layers (examples/error_accumulation.py), which start at the identity, are distilled for 800
steps of Adam. The measure is the exact KL of the last state, and the norm of the gradient before and after the switch. Without the new
start, the moments of the local gradients set the size of the first steps on the other loss.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from examples._chain_laws import kl_of_laws, normal_law
from models.chains import NormalChain, NormalStudent
from pyro_kd import Distiller, SurrogateKD, freeze
from pyro_kd.training import switch

LAYERS, ROWS, STEPS = 20, 256, 800


def distilled(seed: int, share: float, restarts: bool) -> tuple[float, float]:
    """The KL of one student, and the ratio of the gradient's norms after and before the switch."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    student, teacher = NormalStudent(LAYERS, 4, 0.1, identity=True), NormalChain(LAYERS, 1.1, 0.1)
    norms: list[float] = []

    def adam(params: list[Tensor]) -> torch.optim.Optimizer:
        optim = torch.optim.Adam(params, lr=1e-2)
        optim.register_step_pre_hook(
            lambda *_: norms.append(
                float(torch.stack([p.grad.square().sum() for p in params if p.grad is not None]).sum()) ** 0.5
            )
        )
        return optim

    local = round(share * STEPS)
    distiller = Distiller(
        student.model,
        freeze(teacher.model),
        adam,
        SurrogateKD(["y"], teacher_forcing=0.0, latent_weight=0.0),
        weight=1 / ROWS,
        teacher_forcing=switch(1.0, 0.0, local),
    )
    if not restarts:
        distiller._stepper.optimiser.restart = lambda: None  # type: ignore[method-assign]
    distiller.fit(ROWS, steps=STEPS, progress=False)
    ratio = statistics.median(norms[local : local + 20]) / statistics.median(norms[local - 20 : local])
    return kl_of_laws(normal_law(teacher), normal_law(student)), ratio


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print a table, and return its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for share in (0.25, 0.5):
        for restarts in (False, True):
            name = f"local for {share:g} of the steps, {'then a new optimiser' if restarts else 'one optimiser'}"
            runs = [distilled(seed, share, restarts) for seed in range(options.seeds)]
            found[name] = runs
            kls = ", ".join(f"{kl:.3g}" for kl, _ in runs)
            print(f"{name}: KL {kls}; the gradient grows by {statistics.median(r for _, r in runs):.0f}", flush=True)
    return found


if __name__ == "__main__":
    main()
