"""The VRNN of handwriting, 24 points a drawing. What docs/objectives.md advises for it is the paper's loss."""

from dataclasses import replace

import pyro

from examples._experiment import Place, fingerprint
from examples._training import distiller_of, optimisation, paper_loss
from examples._vrnn_students import targets
from examples.vrnn import PRESETS as OF_EXAMPLE
from examples.vrnn import VRNNSettings, learn_from_data, load
from models.vrnn import VRNN
from pyro_kd import freeze
from pyro_kd.metrics import fid
from pyro_kd.training import Trainer, fit_layers, select_weights
from tests.benchmarks.applications.vrnn import LATENT_WEIGHT, loss_by_hand
from tests.benchmarks.time_to_quality.problem import PairedDraws, Problem
from tests.benchmarks.time_to_quality.variants import Variant

__all__ = ["OBJECTIVES", "PRESETS", "build"]

OBJECTIVES = ["paper"]
PRESETS = {"smoke": OF_EXAMPLE["smoke"], "cpu": replace(OF_EXAMPLE["cpu"], measured=500)}


def build(seed: int, settings: VRNNSettings, place: Place) -> Problem:
    """The example's teacher, and the student's start."""
    length, rows = settings.length, settings.batch
    seen, _ = load(settings, seed)

    def new(width: int, recurrent: int) -> VRNN:
        return VRNN(width, recurrent, settings.latents, settings.scale).to(settings.device)

    pyro.set_rng_seed(seed)
    vrnn = new(settings.teacher_width, settings.teacher_recurrent)
    names = ("length", "scale", "batch", "warm_up")
    depends_on = {"seed": seed, "steps": settings.teacher_steps, "data": fingerprint(seen.points, seen.mask)}
    depends_on |= {name: getattr(settings, name) for name in names} | optimisation(settings)
    place.trained(
        vrnn, depends_on, lambda: learn_from_data(vrnn, seen, settings.teacher_steps, settings, f"seed {seed}: teacher")
    )
    vrnn.eval()
    teacher = freeze(vrnn.model)
    pyro.set_rng_seed(seed)
    weights = new(settings.student_width, settings.student_recurrent).state_dict()
    paired = PairedDraws(teacher, settings.measured, length)

    def student() -> VRNN:
        made = new(settings.student_width, settings.student_recurrent)
        made.load_state_dict(weights)
        return made

    def inherit(student: VRNN, steps: int) -> int:
        select_weights(student, vrnn)
        return 0

    def fit(student: VRNN, steps: int) -> int:
        fit_layers(student.generative, vrnn.generative, student.model, vrnn.model, 2 * rows, length, ridge=0.1)
        return 0

    def trainer(student: VRNN, steps: int, variant: Variant) -> Trainer:
        return distiller_of(
            student.model,
            teacher,
            paper_loss(targets(length), latent_weight=LATENT_WEIGHT, reuse=variant.reuse),
            weight=1 / (rows * length),
            steps=steps,
            settings=replace(settings, compile=variant.compile),
        )

    def measure(student: VRNN) -> dict[str, float]:
        number = settings.measured
        bound = paper_loss(targets(length), latent_weight=0.0).loss(student.model, teacher, number, length)
        made = paired.of(student.model)
        return {"bound": bound / (number * length), "fid": fid(made.flatten(1).cpu(), paired.teachers.flatten(1).cpu())}

    return Problem(
        sizes=(
            f"2x{settings.teacher_width} + LSTM {settings.teacher_recurrent} -> 2x{settings.student_width} + "
            f"LSTM {settings.student_recurrent}, {length} points, {rows} rows"
        ),
        settings=settings,
        steps=settings.steps,
        student=student,
        trained=lambda student: student.generative.parameters(),
        loop_loss=lambda student, rows, length: loss_by_hand(student, vrnn, rows, length),
        objectives={"paper": trainer},
        args=(rows, length),
        measures={"bound": "bound on fresh noise, nats a point", "fid": "FD of drawings to the teacher's"},
        measure=measure,
        inherit=inherit,
        fit=fit,
    )
