"""Learn the two halves of Old Faithful one after the other, with and without distillation, and see what is forgotten.

    python -m examples.continual_toy                   # three seeds, about a minute
    python -m examples.continual_toy --preset smoke    # the same in seconds, too short to learn

A small VAE, with a learned prior for each task, learns the short eruptions (task 0), and then the long ones (task 1), when the
short ones are no longer available. Fine-tuning maximises the ELBO of the second task alone. Continual learning adds surrogate
distillation (ours): the model after the first task is frozen, and teaches its copy, which goes on, what it made in task 0. The weight
of the distillation is the share of the old data. The figures are log likelihoods of held-out eruptions, each given its task, and the
share of short eruptions among those that the model makes in task 0.

Written to ``--out``: results.json, forgetting-SEED.png.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from examples._experiment import Experiment, Place, Settings, run
from examples._methods import SURROGATE
from examples._pictures import save, subplots
from examples._tables import Run, Table, estimates
from examples._training import distil, learn, paper_loss
from pyro_kd import freeze
from pyro_kd.datasets import Standardisation, old_faithful
from pyro_kd.training import ELBOObjective, Objective

FIRST, FINE_TUNED, BOTH = "after the first task", "fine-tuned", "both tasks at once"
METHODS = {
    FIRST: "the model from which the second task goes on",
    FINE_TUNED: "learns the second task by its ELBO alone",
    SURROGATE: "learns the second task, while surrogate distillation holds what it knew of the first",
    BOTH: "learns both tasks at the same time",
}
NOTE = "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items()) + "."
FIGURES = {"old": "log p(short | task 0)", "new": "log p(long | task 1)", "short": "short in task 0"}
SHORT = 3.0  # minutes: shorter eruptions are the first task


@dataclass(frozen=True)
class ToySettings(Settings):
    """What a run depends on.

    Attributes:
        scale: standard deviation of a standardised column given the code.
    """

    steps: int = 2000
    latents: int = 2
    width: int = 32
    scale: float = 0.15
    learning_rate: float = 3e-3
    likelihood_samples: int = 5000


PRESETS = {"smoke": ToySettings(steps=10, likelihood_samples=100), "cpu": ToySettings()}


class ToyVAE(nn.Module):
    """z in R^k -> the two columns of the geyser. Sites ``z`` and ``y`` in the plate ``rows``."""

    def __init__(self, settings: ToySettings) -> None:
        super().__init__()
        self.scale = settings.scale
        width, latents = settings.width, settings.latents
        self.prior = nn.Embedding(2, latents)  # the mean of z in each task
        self.decoder = nn.Sequential(
            nn.Linear(latents, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        self.encoder = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, 2 * latents))

    def model(self, rows: int, task: int, y: Tensor | None = None) -> Tensor:
        """Generate eruptions of a task, or score y of shape (rows, 2)."""
        pyro.module("toy_decoder", self.decoder)
        pyro.module("toy_prior", self.prior)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(self.prior(torch.full((rows,), task)), 1.0).to_event(1))
            return pyro.sample("y", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=y)

    def guide(self, rows: int, task: int, y: Tensor) -> None:
        """Infer the codes of y, of shape (rows, 2)."""
        pyro.module("toy_encoder", self.encoder)
        loc, log_scale = self.encoder(y).chunk(2, -1)
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def elbo(vae: ToyVAE, task: int, y: Tensor, weight: float = 1.0) -> Objective:
    """The ELBO of all rows y of a task, shape (rows, 2), in nats per row."""
    return ELBOObjective(Trace_ELBO(), vae.model, vae.guide, weight=weight / len(y), arguments=lambda: (len(y), task, y))


@torch.no_grad()
def log_likelihood(vae: ToyVAE, task: int, y: Tensor, samples: int) -> float:
    """Mean log p(y | task) over rows y of shape (rows, 2), in nats, by Monte Carlo over the prior, whose latents are few."""
    z = vae.prior(torch.tensor(task)) + torch.randn(samples, vae.prior.embedding_dim)
    log_prob = dist.Normal(vae.decoder(z).unsqueeze(1), vae.scale).to_event(1).log_prob(y)
    return (log_prob.logsumexp(0) - torch.tensor(float(samples)).log()).mean().item()


def run_seed(seed: int, settings: ToySettings, place: Place) -> Run:
    """Learn both tasks by each method, and draw eruptions that the models make."""
    minutes = old_faithful().rows
    scale = Standardisation.of(minutes)
    rows = scale(minutes)[torch.randperm(len(minutes))]
    is_short = scale.restore(rows)[:, 0] < SHORT
    seen = torch.arange(len(rows)) >= len(rows) // 5
    old, new = rows[is_short & seen], rows[~is_short & seen]
    held_out = {"old": (0, rows[is_short & ~seen]), "new": (1, rows[~is_short & ~seen])}
    share = len(old) / (len(old) + len(new))

    options: dict[str, Any] = {"steps": settings.steps, "settings": settings}

    def copy_of(vae: ToyVAE) -> ToyVAE:
        new = ToyVAE(settings)
        new.load_state_dict(vae.state_dict())
        return new

    vaes = {FIRST: ToyVAE(settings)}
    vaes[BOTH] = copy_of(vaes[FIRST])
    learn(elbo(vaes[FIRST], 0, old), label=f"seed {seed}: {FIRST}", **options)

    vaes[FINE_TUNED] = copy_of(vaes[FIRST])
    learn(elbo(vaes[FINE_TUNED], 1, new), label=f"seed {seed}: {FINE_TUNED}", **options)

    vaes[SURROGATE] = copy_of(vaes[FIRST])
    distil(
        vaes[SURROGATE].model,
        freeze(vaes[FIRST].model),
        paper_loss(["y"], latent_weight=1.0),
        weight=share / len(old),
        arguments=lambda: (len(old), 0),
        objectives={"new": elbo(vaes[SURROGATE], 1, new, 1 - share)},
        label=f"seed {seed}: {SURROGATE}",
        **options,
    )

    tasks = {"old": elbo(vaes[BOTH], 0, old, share), "new": elbo(vaes[BOTH], 1, new, 1 - share)}
    learn(tasks, label=f"seed {seed}: {BOTH}", **options)

    figures: dict[str, dict[str, float]] = {}
    made: dict[str, Tensor] = {}
    for name, vae in vaes.items():
        pyro.set_rng_seed(seed)
        figures[name] = {
            key: log_likelihood(vae, task, y, settings.likelihood_samples) for key, (task, y) in held_out.items()
        }
        program, count = freeze(vae.model), round(600 * share)
        of_task = [scale.restore(program(2000, task)) for task in (0, 1)]
        figures[name]["short"] = (of_task[0][:, 0] < SHORT).double().mean().item()
        made[name] = of_task[0][:count] if name == FIRST else torch.cat([of_task[0][:count], of_task[1][: 600 - count]])
    draw_forgetting(made, place.out / f"forgetting-{seed}.png")
    return {"models": figures}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The figures of each method."""
    title = "Nats per held-out row of standardised data, and the share of short eruptions in task 0"
    return {"figures": Table(title, list(FIGURES.values()), estimates(runs, list(FIGURES)), NOTE)}


def draw_forgetting(made: dict[str, Tensor], path: Path) -> None:
    """Draw the data, and what the model makes after each way of learning the second task."""
    minutes = old_faithful().rows
    short = minutes[:, 0] < SHORT
    figure, axes = subplots(1, len(METHODS), figsize=(3.2 * len(METHODS), 3.8), sharex=True, sharey=True)
    for ax, name in zip(axes, METHODS, strict=True):
        ax.plot(*made[name].T.numpy(), ".", color="tab:red", markersize=3, alpha=0.4, label="made by the model, both tasks")
        ax.plot(*minutes[short].T.numpy(), ".", color="black", markersize=2, label="short eruptions, seen first")
        ax.plot(*minutes[~short].T.numpy(), ".", color="tab:blue", markersize=2, label="long eruptions, seen second")
        ax.set(title=name, xlabel="eruption (minutes)", xlim=(1, 6), ylim=(35, 105))
    axes[0].set_ylabel("waiting time to the next (minutes)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, markerscale=3)
    save(figure, path, NOTE)


EXPERIMENT = Experiment("continual_toy", __doc__ or "", PRESETS, run_seed, tables)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
