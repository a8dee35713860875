"""Can a program with few layers replace one with many?

    python -m examples.shallow                    # three seeds
    python -m examples.shallow --study chain      # the chain alone, about a minute per seed
    python -m examples.shallow --preset smoke     # the same in seconds, too short to learn

Two teachers, each with students that have fewer layers (``site_map`` says which latents belong together, ``fresh`` which have no
counterpart):

- A chain of 20 transitions (models/chains.py) into one of 5. The student's z_k is paired with the teacher's state after as many
  transitions as four times its own number: z_1 with z_1, z_2 with z_5, ..., z_5 with z_17, and y with y. So a state means the same in
  both, and one transition of the student replaces four. It has the noise of the last of the four; the noise of the other three is the
  teacher's alone, and becomes a part of the student's scale, which is learned. For comparison, a student shares the noise of z_1 alone.
  The measure is the exact KL of y (examples/error_accumulation.py). Scratch is maximum likelihood on draws of y, with the exact
  density of the student: it shows what a student of this size can reach.

- The hierarchical VAE of five latent layers (models/hierarchical_vae.py) into two. Which layers to keep is measured first: the noise of
  one layer is drawn anew, and the table shows how far the image moves. The student's upper layer is paired with z5, which starts the
  program, and its lower one with the layer that moves the image most, at the same resolution. The noise of the other layers is left
  out. For comparison, students are paired with z5 and z4, which hardly move the image.

Written to ``--out``: results.json, samples-SEED.png (images of all VAEs from the same noise).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from examples._experiment import Experiment, Place, fingerprint, run
from examples._images import MEASURES, distances, feature_network, generate, load
from examples._methods import LOCAL, SCRATCH, SURROGATE, TEACHER, explain
from examples._pictures import save_grid
from examples._tables import Run, Table, estimates
from examples._training import distil, optimisation, paper_loss
from examples.error_accumulation import kl_of_laws, normal_law, quadrature
from examples.hierarchical_vae import HierarchicalSettings, learn_from_data
from models.chains import NormalChain, NormalStudent
from models.hierarchical_vae import HierarchicalVAE
from pyro_kd import LocalKD, freeze, record_noise, replay_noise
from pyro_kd.divergences import wasserstein2
from pyro_kd.losses import DistillationLoss

FIRST = "first noise"
MEANINGS = {
    "lambda": "multiplies the latent terms",
    FIRST: "z_1 alone is paired, and all other latents have noise of their own",
    "two numbers": "the layers of the teacher that the student's two are paired with",
}


@dataclass(frozen=True)
class ShallowSettings(HierarchicalSettings):
    """Sizes and lengths of both studies; the defaults are the ``cpu`` preset.

    Attributes:
        study: ``chain``, ``vae`` or ``both``.
        chain_layers, chain_student_layers: transitions of the teacher, and of the students: a divisor of them.
        chain_width: of the students' networks.
        chain_draws: draws of y that the student learns from without a teacher.
        keep: the layers of the VAE that the two layers of a student are paired with.
        keep_instead: the same for comparison.
    """

    study: str = "both"
    steps: int = 600
    chain_layers: int = 20
    chain_student_layers: int = 5
    chain_width: int = 8
    chain_steps: int = 2000
    chain_rows: int = 256
    chain_learning_rate: float = 1e-2
    chain_draws: int = 10_000
    chain_bound_rows: int = 10_000
    keep: tuple[int, ...] = (5, 2)
    keep_instead: tuple[int, ...] = (5, 4)


PRESETS = {
    "smoke": ShallowSettings(
        teacher_width=8, student_width=4, latents=4, rows=8, teacher_steps=4, steps=4, samples=40, classifier_epochs=1,
        chain_layers=4, chain_student_layers=2, chain_steps=15, chain_draws=500, chain_bound_rows=500,
    ),
    "cpu": ShallowSettings(),
    "paper": ShallowSettings(
        data="cifar10", teacher_width=128, student_width=32, rows=128, teacher_steps=19_500, steps=19_500, warm_up=0.5,
        learning_rate=1e-4, samples=10_000, chain_steps=10_000, chain_rows=1024,
    ),
}  # fmt: skip


def chain_pairs(layers: int, student_layers: int) -> dict[str, Any]:
    """The options ``site_map`` and ``fresh`` of a loss between two chains whose states mean the same.

    Args:
        layers: transitions of the teacher.
        student_layers: transitions of the student, each of which replaces ``layers / student_layers``.
    """
    if layers % student_layers:
        raise ValueError(f"the student's {student_layers} transitions must divide the teacher's {layers}")
    stride = layers // student_layers
    site_map = {f"z_{k + 1}": f"z_{k * stride + 1}" for k in range(student_layers)}
    return {"site_map": site_map, "fresh": [f"z_{k + 1}" for k in range(layers) if k % stride]}


def chain_losses(settings: ShallowSettings) -> dict[str, DistillationLoss]:
    """The losses between the two chains, by name."""
    pairs = chain_pairs(settings.chain_layers, settings.chain_student_layers)
    alone = {"fresh": [f"z_{k}" for k in range(2, settings.chain_layers + 1)]}
    return {
        LOCAL: LocalKD(["y"], **pairs),
        f"{SURROGATE}, lambda 1": paper_loss(["y"], latent_weight=1.0, **pairs),
        f"{SURROGATE}, lambda 0.1": paper_loss(["y"], latent_weight=0.1, **pairs),
        f"{SURROGATE}, lambda 0": paper_loss(["y"], latent_weight=0.0, **pairs),
        f"{SURROGATE}, {FIRST}": paper_loss(["y"], latent_weight=0.0, **alone),
    }


def log_density(chain: NormalStudent, y: Tensor, points: int = 241, reach: float = 3.0) -> Tensor:
    """The log density of y under a short chain, of the shape of ``y``, which is (rows,); differentiable.

    The states between are summed out on a grid. It is coarse: the spacing is a quarter of the smallest scale.
    """
    grid, spacing = torch.linspace(-reach, reach, points), 2 * reach / (points - 1)
    states, law = (part.float() for part in quadrature(-1.0, 1.0, 100))
    for layer in range(chain.layers - 1):
        density = chain.transition(layer, states.unsqueeze(-1)).log_prob(grid).exp()
        states, law = grid, law @ density * spacing
    density = chain.transition(chain.layers - 1, states.unsqueeze(-1)).log_prob(y).exp()
    return (law @ density).clamp_min(1e-30).log()


def fit_to_draws(student: NormalStudent, y: Tensor, settings: ShallowSettings) -> None:
    """Maximum likelihood with the exact density: batches of draws ``y``, shape (draws,)."""
    optim = torch.optim.Adam(student.parameters(), lr=settings.chain_learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optim, settings.chain_steps)
    for _ in range(settings.chain_steps):
        batch = y[torch.randint(len(y), (settings.chain_rows,))]
        optim.zero_grad()
        (-log_density(student, batch).mean()).backward()
        optim.step()
        scheduler.step()


def run_chain(seed: int, settings: ShallowSettings) -> dict[str, dict[str, float]]:
    """Train and measure all students of the chain: figures by method."""
    pyro.set_rng_seed(seed)

    def new() -> NormalStudent:
        return NormalStudent(settings.chain_student_layers, settings.chain_width, learn_scale=True)

    teacher, start = NormalChain(settings.chain_layers), new().state_dict()
    exact, program = normal_law(teacher), freeze(teacher.model)
    with torch.no_grad():
        draws = program(settings.chain_draws)
    pairs, rows = chain_pairs(settings.chain_layers, settings.chain_student_layers), settings.chain_bound_rows
    measured = {}
    for name, loss in {SCRATCH: None, **chain_losses(settings)}.items():
        pyro.set_rng_seed(seed)
        student = new()
        student.load_state_dict(start)
        if loss is None:
            fit_to_draws(student, draws, settings)
        else:
            distil(
                student.model,
                program,
                loss,
                settings.chain_rows,
                weight=1 / settings.chain_rows,
                steps=settings.chain_steps,
                settings=replace(settings, learning_rate=settings.chain_learning_rate, weight_decay=0.0),
                label=f"seed {seed}, chain: {name}",
            )
        measured[name] = {
            "kl": kl_of_laws(exact, normal_law(student)),
            "surrogate": paper_loss(["y"], latent_weight=0.0, **pairs).loss(student.model, program, rows) / rows,
            "local": LocalKD(["y"], **pairs).loss(student.model, program, rows) / rows,
        }
    return measured


def vae_pairs(keep: Sequence[int], layers: int = 5) -> dict[str, Any]:
    """The options ``site_map`` and ``fresh`` of a loss whose student has as many layers as are kept, from the top down."""
    site_map = {f"z{len(keep) - i}": f"z{layer}" for i, layer in enumerate(keep)}
    return {"site_map": site_map, "fresh": [f"z{layer}" for layer in range(layers, 0, -1) if layer not in keep]}


def sides_of(keep: Sequence[int], size: int) -> tuple[int, ...]:
    """The resolutions of the kept layers of a VAE of images with this side."""
    return tuple(1 if layer == 5 else size // 2**layer for layer in keep)


@torch.no_grad()
def moved_by(teacher: Callable[..., Tensor], fresh: Sequence[str], rows: int) -> float:
    """How far images of a program move where the noise of these sites is drawn anew: the mean squared distance per image."""
    with record_noise() as noise:
        images = teacher(rows)
    again = replay_noise(teacher, noise=noise, fresh=[*fresh, "x"])(rows)
    return float((images - again).square().flatten(1).sum(1).mean())


def run_vae(seed: int, settings: ShallowSettings, place: Place) -> Run:
    """Train the teacher, measure its layers, train and measure the students."""
    data, test = load(settings, train=True), load(settings, train=False)
    size, channels = data.images.shape[-1], data.images.shape[1]
    features = feature_network(data, place, settings.classifier_epochs, settings.device).features
    pyro.set_rng_seed(seed)
    vae = HierarchicalVAE(size, settings.teacher_width, channels, settings.latents).to(settings.device)
    depends_on = {"seed": seed, "data": fingerprint(data.images), **optimisation(settings)}
    depends_on |= {key: getattr(settings, key) for key in ("rows", "teacher_steps", "warm_up")}
    steps = settings.teacher_steps
    place.trained(vae, depends_on, lambda: learn_from_data(vae, data, steps, settings, f"seed {seed}: teacher"))
    teacher = freeze(vae.to(settings.device).model)
    pyro.set_rng_seed(seed)
    rows = min(200, settings.samples)
    layers = {f"z{layer}": {"moved": moved_by(teacher, [f"z{layer}"], rows)} for layer in range(5, 0, -1)}
    from_teacher, real = features(generate(teacher, settings.samples)), features(test.floats()[: settings.samples])
    shown = {"test data": test.floats()[:12]}
    pyro.set_rng_seed(0)
    with torch.no_grad(), record_noise() as noise:
        shown[TEACHER] = teacher(12).cpu()
    measured: dict[str, dict[str, float]] = {}

    def measure(name: str, program: Any, pairs: Mapping[str, Any] | None, parameters: int) -> None:
        pyro.set_rng_seed(seed + 1000)
        made = features(generate(program, settings.samples))
        measured[name] = {"parameters": float(parameters)}
        measured[name] |= {f"teacher/{key}": value for key, value in distances(made, from_teacher).items()}
        measured[name] |= {f"data/{key}": value for key, value in distances(made, real).items()}
        if pairs is None:
            return
        with torch.no_grad():
            with record_noise() as recorded:
                theirs = teacher(rows)
            ours = replay_noise(program, noise=recorded, site_map=pairs["site_map"], fresh=["x"])(rows)
            shown[name] = replay_noise(program, noise=noise, site_map=pairs["site_map"], fresh=["x"])(12).cpu()
        measured[name]["distance"] = float((theirs - ours).square().flatten(1).sum(1).mean())
        measured[name]["bound"] = paper_loss(["x"], latent_weight=0.0, **pairs).loss(program, teacher, rows) / rows

    measure(TEACHER, teacher, None, sum(p.numel() for p in vae.top_down.parameters()))
    for keep in (settings.keep, settings.keep_instead):
        pairs, which = vae_pairs(keep), ", " + " ".join(map(str, keep))
        options: dict[str, Any] = {"latent_divergence": wasserstein2, "latent_reduction": "mean", **pairs}
        losses: dict[str, DistillationLoss | None] = {
            f"{SCRATCH}{which}": None,
            f"{LOCAL}{which}": LocalKD(["x"], latent_weight=0.1, **options),
            f"{SURROGATE}{which}": paper_loss(["x"], latent_weight=0.1, **options),
            f"{SURROGATE}, lambda 0{which}": paper_loss(["x"], latent_weight=0.0, **options),
        }
        for name, loss in losses.items():
            pyro.set_rng_seed(seed)
            student = HierarchicalVAE(size, settings.student_width, channels, settings.latents, sides=sides_of(keep, size))
            student.to(settings.device)
            label = f"seed {seed}, VAE: {name}"
            if loss is None:
                learn_from_data(student, data, settings.steps, settings, label)
            else:
                one = {"weight": 1 / settings.rows, "steps": settings.steps, "settings": settings, "label": label}
                distil(student.model, teacher, loss, settings.rows, **one)
            count = sum(p.numel() for p in student.top_down.parameters())
            measure(name, freeze(student.eval().model), pairs, count)
    save_grid(shown, place.out / f"samples-{seed}.png", explain(shown, MEANINGS), columns=12)
    return {"models": measured, "layers": {"models": layers}}


def run_seed(seed: int, settings: ShallowSettings, place: Place) -> Run:
    """Both studies, or one of them."""
    found: Run = {}
    if settings.study in ("chain", "both"):
        found["chain"] = {"models": run_chain(seed, settings)}
    if settings.study in ("vae", "both"):
        found["vae"] = run_vae(seed, settings, place)
    return found


def tables(runs: list[Run]) -> dict[str, Table]:
    """The chain; the layers of the VAE; its students against the teacher and against the data."""
    made = {}
    if "chain" in runs[0]:
        columns = {"kl": "KL(teacher || student)", "surrogate": "surrogate bound", "local": "local bound"}
        rows = estimates([run["chain"] for run in runs], list(columns))
        note = explain(rows, {name: MEANINGS[name] for name in ("lambda", FIRST)})
        made["chain"] = Table("A chain into a shorter one: the last state y, nats", list(columns.values()), rows, note)
    if "vae" in runs[0]:
        found = [run["vae"] for run in runs]
        layers = estimates([run["layers"] for run in found], ["moved"])
        made["layers"] = Table(
            "How far images of the teacher move where the noise of one layer is drawn anew",
            ["mean squared distance per image"],
            layers,
        )
        names = found[0]["models"]
        note = explain(names, {name: MEANINGS[name] for name in ("lambda", "two numbers")})
        further = {"distance": "squared distance on shared noise", "bound": "surrogate bound, nats"}
        sizes = {name: str(int(figures["parameters"])) for name, figures in names.items()}
        teacher = estimates(found, [*(f"teacher/{key}" for key in MEASURES), *further])
        made["teacher"] = Table(
            "A VAE of five layers into two: against the teacher's images",
            ["parameters of the generator", *MEASURES.values(), *further.values()],
            {name: [sizes[name], *row] for name, row in teacher.items()},
            note,
        )
        made["data"] = Table(
            "The same against the test images",
            list(MEASURES.values()),
            estimates(found, [f"data/{key}" for key in MEASURES]),
            note,
        )
    return made


EXPERIMENT = Experiment("shallow", __doc__ or "", PRESETS, run_seed, tables)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
