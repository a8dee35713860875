"""Compress a Helmholtz machine of the Old Faithful geyser without data, and measure exactly what was lost.

    python -m examples.helmholtz                   # three seeds, some minutes
    python -m examples.helmholtz --preset smoke    # the same in seconds, too short to learn

A teacher of width 8 learns the 272 eruptions by wake-sleep. Students of width 2 learn from the data (scratch), or from the teacher
alone: by local distillation (local), by the paper's surrogate and latent loss (surrogate, ours), or locally for half of the steps and
then by an objective that sees what the layers do together: the bound of K samples (K samples, ours), or the KL of the targets itself
(exact marginal, ours). Where the loss changes, the optimiser starts anew, which helps by itself. So there are two further rows:
local distillation with a new optimiser in the middle (local, restarted), and the same for as many seconds as the K samples take
(local, as long as K samples). All latents are bits, through which no gradient passes.

A network of two hidden units may start with dead ones. So each student is the best of a few short starts by its own loss, and within
a seed all methods have the same starts. The model has 256 latent states, so that likelihoods and KL(teacher || student) are exact
sums.

Written to ``--out``: results.json, densities-SEED.png.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from examples._experiment import Experiment, Place, Settings, run
from examples._methods import LOCAL, MARGINAL, MULTI_SAMPLE, SCRATCH, SURROGATE, TEACHER, explain
from examples._pictures import save, subplots
from examples._tables import Estimates, Run, Table, estimates
from examples._training import distiller_of, paper_loss, trainer_of
from models.helmholtz import HelmholtzMachine
from pyro_kd import LocalKD, MarginalKD, MultiSampleKD, freeze
from pyro_kd.datasets import Standardisation, old_faithful
from pyro_kd.losses import DistillationLoss
from pyro_kd.metrics import marginal_kl, marginal_log_prob, mmd, nearest_neighbour_accuracy
from pyro_kd.training import ELBOObjective, Trainer, best_start

TARGETS = ["y1", "y2"]
RESTARTED = f"{LOCAL}, restarted"
AS_LONG = f"{LOCAL}, as long as K samples"
FIGURES = {
    "log_likelihood": "log p(data)",
    "kl": "KL(teacher ‖ student)",
    "surrogate_bound": "surrogate bound",
    "local_bound": "local bound",
    "mmd": "MMD² to data",
    "nearest_neighbour": "1-NN accuracy",
    "steps": "steps",
    "seconds": "seconds of training",
}


@dataclass(frozen=True)
class HelmholtzSettings(Settings):
    """What a run depends on. The defaults are the paper's, with 272 rows per batch."""

    steps: int = 1000
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    cosine: bool = False
    teacher_width: int = 8
    student_width: int = 2
    latent_weight: float = 1.0
    rows: int = 20_000  # samples of the teacher for KL and bounds
    repeats: int = 20  # samples, each as large as the data, for MMD and 1-NN
    samples: int = 64  # of the K-sample bound
    starts: int = 5
    start_steps: int = 100  # of each start; those of the best count among the steps


PRESETS = {
    "smoke": HelmholtzSettings(steps=10, rows=500, repeats=2, samples=4, starts=2, start_steps=2),
    "cpu": HelmholtzSettings(),
    "paper": HelmholtzSettings(),
}


class WakeSleep:
    """The loss of wake-sleep: the sample of each phase is fixed, and trains only the program that did not make it.

    References:
        Hinton, Dayan, Frey and Neal, The wake-sleep algorithm for unsupervised neural networks, 1995.
    """

    def differentiable_loss(self, model: Any, guide: Any, rows: int, y1: Tensor, y2: Tensor) -> Tensor:
        """The sum of both phases, in nats, for y1 and y2 of shape (rows,)."""
        with torch.no_grad():
            inferred = poutine.trace(guide).get_trace(rows, y1, y2)
            dreamt = poutine.trace(model).get_trace(rows)
        dream = [dreamt.nodes[name]["value"] for name in TARGETS]
        wake = poutine.trace(poutine.replay(model, trace=inferred)).get_trace(rows, y1, y2).log_prob_sum()
        sleep = poutine.trace(poutine.replay(guide, trace=dreamt)).get_trace(rows, *dream).log_prob_sum()
        return -(wake + sleep)


def dead_perceptrons(machine: HelmholtzMachine, rows: int = 2000) -> list[str]:
    """Names of the generative perceptrons that have no active hidden unit on any input that the model gives them."""
    peak: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            peak[name] = float(output.max())

        return hook

    hooks = [net[1].register_forward_hook(watch(name)) for name, net in machine.generative.items()]
    with torch.no_grad(), poutine.block():
        machine.model(rows)
    for hook in hooks:
        hook.remove()
    return [name for name, value in peak.items() if value <= 0]


def evaluate(
    machine: HelmholtzMachine, teacher: Any, data: dict[str, Tensor], settings: HelmholtzSettings
) -> dict[str, Any]:
    """The figures of a machine; likelihoods are of standardised data, in nats per row."""
    program = freeze(machine.model)
    rows = len(data["y1"])
    truth = torch.stack([data[name] for name in TARGETS], -1).cpu()
    distances: dict[str, list[float]] = {"mmd": [], "nearest_neighbour": []}
    for _ in range(settings.repeats):
        sample = torch.stack(program(rows), -1).cpu()
        distances["mmd"].append(mmd(sample, truth))
        distances["nearest_neighbour"].append(nearest_neighbour_accuracy(sample, truth))
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in machine.generative.parameters()),
        "log_likelihood": float(marginal_log_prob(program, data, rows).mean()),
        "dead": dead_perceptrons(machine),
        **{name: statistics.mean(values) for name, values in distances.items()},
    }
    if teacher is not None:
        kl = marginal_kl(program, teacher, TARGETS, settings.rows)
        result |= {"kl": kl.mean, "kl_standard_error": kl.standard_error}
        bounds = {"surrogate_bound": paper_loss(TARGETS, latent_weight=0.0), "local_bound": LocalKD(TARGETS)}
        result |= {name: loss.loss(program, teacher, settings.rows) / settings.rows for name, loss in bounds.items()}
    return result


def run_seed(seed: int, settings: HelmholtzSettings, place: Place) -> Run:
    """Train and measure the teacher and the students of one seed."""
    minutes = old_faithful().rows
    scale = Standardisation.of(minutes)
    data = dict(zip(TARGETS, scale(minutes).to(settings.device).unbind(-1), strict=True))
    rows = len(data["y1"])

    losses: dict[str, tuple[DistillationLoss, DistillationLoss | None]] = {  # of the first and the second half of the steps
        LOCAL: (LocalKD(TARGETS), None),
        RESTARTED: (LocalKD(TARGETS), LocalKD(TARGETS)),
        SURROGATE: (paper_loss(TARGETS, latent_weight=settings.latent_weight), None),
        MULTI_SAMPLE: (LocalKD(TARGETS), MultiSampleKD(TARGETS, num_samples=settings.samples)),
        MARGINAL: (LocalKD(TARGETS), MarginalKD(TARGETS, control_variate=True)),
        AS_LONG: (LocalKD(TARGETS), LocalKD(TARGETS)),
    }

    def trainer_for(method: str, machine: HelmholtzMachine, teacher: Any, steps: int) -> Trainer:
        if method in losses:
            (first, then), half = losses[method], max(steps // 2, 1)
            turns = {"then": then, "then_from": half, "weight": 1 / rows, "settings": settings, "steps": steps}
            return distiller_of(machine.model, teacher, first, **turns)
        objective = ELBOObjective(WakeSleep(), machine.model, machine.guide, weight=1 / rows)
        return trainer_of(objective, settings=replace(settings, compile=False), steps=steps)

    def train(method: str, teacher: Any = None, steps: int = settings.steps) -> tuple[HelmholtzMachine, list[float]]:
        """The best of some starts of a method, trained, and the seconds of its steps."""
        made: list[tuple[Trainer, HelmholtzMachine]] = []

        def make() -> Trainer:
            width = settings.teacher_width if method == TEACHER else settings.student_width
            with torch.random.fork_rng():
                torch.manual_seed(1000 * seed + len(made))  # the starts are the same for all methods
                machine = HelmholtzMachine(width).to(settings.device)
            made.append((trainer_for(method, machine, teacher, steps), machine))
            return made[-1][0]

        args, label = (rows,) if method in losses else (rows, *data.values()), f"seed {seed}: {method}"
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        best = best_start(make, *args, starts=settings.starts, steps=settings.start_steps, total_steps=steps, progress=label)
        best.fit(*args, total_steps=steps, progress=label)
        pyro.clear_param_store()
        return next(machine for trainer, machine in made if trainer is best), best.history["seconds"]

    machines, seconds = dict[str, HelmholtzMachine](), dict[str, list[float]]()
    machines[TEACHER], seconds[TEACHER] = train(TEACHER)
    teacher = freeze(machines[TEACHER].model)
    for method in (SCRATCH, *losses):
        steps = settings.steps
        if method == AS_LONG:
            steps = round(steps * sum(seconds[MULTI_SAMPLE]) / sum(seconds[LOCAL]))
        machines[method], seconds[method] = train(method, teacher, steps)
    pyro.set_rng_seed(seed)
    measured = {
        name: evaluate(machine, None if name == TEACHER else teacher, data, settings)
        | {"seconds": sum(seconds[name]), "steps": len(seconds[name])}
        for name, machine in machines.items()
    }
    draw_densities(machines, minutes, scale, place.out / f"densities-{seed}.png")
    return {"models": measured}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The figures, and the perceptrons that died."""
    models = runs[0]["models"]
    died = {name: f"{sum(bool(run['models'][name]['dead']) for run in runs)} of {len(runs)}" for name in models}
    medians = {
        name: f"{statistics.median(run['models'][name]['kl'] for run in runs):.2g}" if "kl" in model else "-"
        for name, model in models.items()
    }
    rows: dict[str, Estimates] = {
        name: [str(models[name]["parameters"]), *row, medians[name], died[name]]
        for name, row in estimates(runs, list(FIGURES)).items()
    }
    dead = {
        f"seed {run['seed']}, {name}": [", ".join(model["dead"])]
        for run in runs
        for name, model in run["models"].items()
        if model["dead"]
    }
    title = "Exact likelihoods over 256 latent states, in nats per row of standardised data; KL over rows of the teacher"
    further = {"died": "seeds in which a perceptron of the model has no active hidden unit"}
    found = {"figures": Table(title, ["parameters", *FIGURES.values(), "median KL", "died"], rows, explain(models, further))}
    if dead:
        found["dead"] = Table("Perceptrons without an active hidden unit", ["perceptrons"], dead)
    return found


def draw_densities(machines: dict[str, HelmholtzMachine], minutes: Tensor, scale: Standardisation, path: Path) -> None:
    """Draw the densities of data (kernel estimate), teacher and students (exact) side by side, with axes in minutes."""
    from scipy.stats import gaussian_kde

    duration, waiting = torch.linspace(1, 6, 80), torch.linspace(35, 105, 80)
    grid, edges = torch.cartesian_prod(duration, waiting), (duration.numpy(), waiting.numpy())
    to_minutes = float(scale.std.log().sum())  # log Jacobian of the standardisation
    panels = {f"data ({len(minutes)} eruptions)": torch.tensor(gaussian_kde(minutes.T.numpy())(grid.T.numpy()))}
    shown = [name for name in machines if name != AS_LONG]
    for name in shown:
        machine = machines[name]
        device = next(machine.parameters()).device
        y = scale(grid).to(device)
        log_prob = marginal_log_prob(machine.model, {"y1": y[:, 0], "y2": y[:, 1]}, len(y)).cpu()
        size = sum(p.numel() for p in machine.generative.parameters())
        panels[f"{name}\n{size} parameters"] = (log_prob - to_minutes).exp()
    top = max(float(density.max()) for density in panels.values())
    columns = (len(panels) + 1) // 2
    figure, axes = subplots(2, columns, figsize=(2.9 * columns, 6.4), sharex=True, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, density) in zip(axes.flat, panels.items(), strict=False):
        image = ax.pcolormesh(*edges, density.reshape(80, 80).T.numpy(), vmin=0, vmax=top, cmap="magma_r", rasterized=True)
        ax.plot(*minutes.T.numpy(), ".", color="black", markersize=1.5, alpha=0.5)
        ax.set_title(title, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("eruption (minutes)")
    for ax in axes[:, 0]:
        ax.set_ylabel("waiting time to the next (minutes)")
    figure.colorbar(image, ax=axes, label="density per minute squared")
    save(figure, path, explain(shown))


EXPERIMENT = Experiment("helmholtz", __doc__ or "", PRESETS, run_seed, tables)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
