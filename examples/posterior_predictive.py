"""Can one network stand for a whole posterior? Bayesian models, by NUTS and by an autoguide, distilled into a single student.

    python -m examples.posterior_predictive                   # three seeds, a few minutes each on one core
    python -m examples.posterior_predictive --preset smoke    # the same in seconds, too short to learn

**Digits.** A Bayesian neural network learns a few hundred of scikit-learn's digits. Its prediction is an average over many
networks drawn from the posterior. A student is one network of the same size. It learns from the posterior predictive
(surrogate, ours), on images without labels, each image with a draw of its own. One network learns from the labels alone
(scratch), by their likelihood or with the prior of the Bayesian network. Measured on held-out images: accuracy, log-likelihood,
expected calibration error, and how many networks a prediction evaluates.

**Eight schools.** A hierarchical model of the effects of coaching in eight schools. A run draws the parameters once for all
schools, so that the eight estimates depend on each other. One student has independent schools, and one has a covariance. Measured
by the log-likelihood of replicated data from a second set of draws of NUTS.

Written to ``--out``: results.json.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from examples._experiment import Experiment, Place, Settings, fingerprint, run
from examples._methods import SCRATCH, SURROGATE, TEACHER, explain
from examples._tables import Run, Table, estimates
from examples._training import batches_of, distil, learn
from examples.information_bottleneck import calibration, calibration_error
from models.bayesian_classifier import BayesianClassifier, Classifier
from models.eight_schools import EightSchools, GaussianSchools
from pyro_kd import SurrogateKD, mixture_of, posterior_predictive
from pyro_kd.datasets import digits
from pyro_kd.training import ELBOObjective

PIXELS, CLASSES, HELD_OUT = 64, 10, 360
BY_NUTS, BY_GUIDE, BY_BOTH = "NUTS", "autoguide", "a mixture of both"
DIGIT_FIGURES = {
    "accuracy": "accuracy, %",
    "log_likelihood": "log-likelihood",
    "calibration_error": "calibration error, %",
}
SCHOOL_FIGURES = {
    "log_likelihood": "log-likelihood",
    "coverage": "coverage of a school, %",
    "coverage_of_mean": "coverage of the mean, %",
}
EVALUATIONS = "evaluations"
MOST_LIKELY = f"{SCRATCH}, with the prior"
MEANING = {
    EVALUATIONS: "how many networks or densities a prediction computes",
    "with the prior": "the network with the highest posterior density",
    "after the comma": "how the posterior of the teacher was found",
    "coverage": "how much of the replicated data lies in the law's central 90 % interval, for one school and for the mean of all",
    "independent": "the student has no covariance between schools",
    "covariance": "the student has a covariance of low rank between schools",
}


@dataclass(frozen=True)
class PosteriorPredictiveSettings(Settings):
    """The settings; the defaults are the cpu preset.

    Attributes:
        labelled: number of images whose labels are learnt.
        scale: of the prior of the weights; chosen by the log-likelihood, under NUTS, of images of which no model is given the labels.
    """

    labelled: int = 1000
    hidden: int = 16
    scale: float = 6.0
    draws: int = 100
    warmup: int = 100
    tree_depth: int = 5
    guide_steps: int = 1500
    steps: int = 2000
    rows: int = 64
    jitter: float = 0.1
    learning_rate: float = 1e-2
    school_draws: int = 200
    school_steps: int = 1000
    particles: int = 64
    rank: int = 2


PRESETS = {
    "smoke": PosteriorPredictiveSettings(
        labelled=40, hidden=3, draws=3, warmup=3, tree_depth=2, guide_steps=5, steps=5, school_draws=4, school_steps=5
    ),
    "cpu": PosteriorPredictiveSettings(),
}


class Draws(nn.Module):
    """Draws of latents by name, tensors of shape (draws, ...), as buffers, so that they can be kept."""

    def __init__(self, description: str, shapes: dict[str, tuple[int, ...]], draws: int) -> None:
        super().__init__()
        self.description = description
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(draws, *shape))

    def extra_repr(self) -> str:
        """What the draws are of, and their shapes: different draws are kept in different files."""
        return f"{self.description}, " + ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.samples().items())

    def samples(self) -> dict[str, Tensor]:
        """The draws."""
        return dict(self.named_buffers())


def run_nuts(
    draws: Draws, model: Callable[..., Any], data: tuple[Tensor, ...], settings: PosteriorPredictiveSettings
) -> None:
    """Fill the draws by a run of NUTS."""
    count = len(next(iter(draws.samples().values())))
    mcmc = MCMC(
        NUTS(model, max_tree_depth=settings.tree_depth),
        num_samples=count,
        warmup_steps=settings.warmup,
        disable_progbar=True,
    )
    mcmc.run(*data)
    for name, values in mcmc.get_samples().items():
        getattr(draws, name).copy_(values)


def log_mean(log_probs: Tensor) -> Tensor:
    """The logarithm of the mean of probabilities along the first dimension."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def draws_of_guide(guide: Callable[..., Any], count: int, *args: Any) -> dict[str, Tensor]:
    """Draws of the latents of an autoguide, of shape (count, ...) each."""
    with torch.no_grad():
        runs = [guide(*args) for _ in range(count)]
    return {name: torch.stack([run[name].detach() for run in runs]) for name in runs[0]}


# Digits.


def measure_digits(log_probs: Tensor, labels: Tensor, evaluations: int) -> dict[str, float]:
    """The figures of log probabilities of shape (rows, classes)."""
    return {
        "accuracy": 100 * (log_probs.argmax(-1) == labels).double().mean().item(),
        "log_likelihood": log_probs.gather(-1, labels.unsqueeze(-1)).double().mean().item(),
        "calibration_error": 100 * calibration_error(calibration(log_probs, labels)),
        "evaluations": evaluations,
    }


def predictive(samples: dict[str, Tensor], x: Tensor) -> Tensor:
    """The log probabilities of the labels of x, averaged over draws; shape (rows, classes)."""
    weights = {name: value.unsqueeze(1) for name, value in samples.items()}  # a dimension for the rows
    return log_mean(BayesianClassifier.logits(x, weights).log_softmax(-1))


def run_digits(seed: int, settings: PosteriorPredictiveSettings, place: Place) -> dict[str, dict[str, float]]:
    """Train and measure the classifiers of one seed."""
    seen, unseen = digits().split(HELD_OUT, seed)
    pool, test, labels = seen.images.flatten(1), unseen.images.flatten(1), unseen.labels
    x, y = pool[: settings.labelled], seen.labels[: settings.labelled]
    model = BayesianClassifier(PIXELS, settings.hidden, CLASSES, settings.scale)
    start = Classifier(PIXELS, settings.hidden, CLASSES).state_dict()

    def small() -> Classifier:
        pyro.set_rng_seed(seed)
        student = Classifier(PIXELS, settings.hidden, CLASSES)
        student.load_state_dict(start)
        return student

    draws = Draws("digits", model.shapes, settings.draws)
    names = ("scale", "warmup", "tree_depth")
    depends_on = {"seed": seed, "data": fingerprint(x, y)} | {name: getattr(settings, name) for name in names}
    place.trained(draws, depends_on, lambda: run_nuts(draws, model, (x, y), settings))
    pyro.set_rng_seed(seed)

    guide = AutoNormal(model, init_scale=0.02)
    elbo = ELBOObjective(Trace_ELBO(), model, guide, weight=1 / settings.labelled)
    learn(elbo, x, y, steps=settings.guide_steps, settings=settings, label=f"seed {seed}: {BY_GUIDE}")

    teachers = {
        BY_NUTS: posterior_predictive(model, draws.samples(), rows=len),
        BY_GUIDE: posterior_predictive(model, guide, rows=len),
    }
    teachers[BY_BOTH] = mixture_of(list(teachers.values()), sites=["label"], rows=len)
    guided = draws_of_guide(guide, settings.draws, test)
    posteriors = {BY_NUTS: draws.samples(), BY_GUIDE: guided}
    measured = {
        f"{TEACHER}, {name}": measure_digits(predictive(samples, test), labels, settings.draws)
        for name, samples in posteriors.items()
    }

    def one(net: Classifier) -> dict[str, float]:
        with torch.no_grad():
            return measure_digits(net.net(test).log_softmax(-1), labels, 1)

    for name, teacher in teachers.items():
        student = small()
        distil(
            student,
            teacher,
            SurrogateKD(["label"], fresh="*"),
            batches=batches_of(settings.rows, pool),
            arguments=lambda batch: (batch + settings.jitter * torch.randn_like(batch),),
            weight=1 / settings.rows,
            steps=settings.steps,
            settings=settings,
            label=f"seed {seed}: student of {name}",
        )
        measured[f"{SURROGATE}, {name}"] = one(student)
    best = AutoDelta(model)
    elbo = ELBOObjective(Trace_ELBO(), model, best, weight=1 / settings.labelled)
    learn(elbo, x, y, steps=settings.steps, settings=settings, label=f"seed {seed}: {MOST_LIKELY}")
    measured[MOST_LIKELY] = measure_digits(predictive(draws_of_guide(best, 1, test), test), labels, 1)
    scratch = small()
    likelihood = ELBOObjective(Trace_ELBO(), scratch, scratch.guide, weight=1 / settings.labelled)
    learn(likelihood, x, y, steps=settings.steps, settings=settings, label=f"seed {seed}: {SCRATCH}")
    measured[SCRATCH] = one(scratch)
    return measured


# Eight schools.


def replicate(model: EightSchools, samples: dict[str, Tensor], count: int) -> Tensor:
    """Replicated data of shape (count, 8), each from a posterior draw taken at random."""
    index = torch.randint(len(samples["mu"]), (count,))
    return given(model, {name: value[index] for name, value in samples.items()}).sample()


def given(model: EightSchools, samples: dict[str, Tensor]) -> Any:
    """The law of the estimates given draws of the parameters, of batch shape (draws,)."""
    return poutine.trace(poutine.condition(model, samples)).get_trace().nodes["effects"]["fn"]


def measure_schools(log_prob: Tensor, drawn: Tensor, data: Tensor, evaluations: int) -> dict[str, float]:
    """The figures of a law of the estimates.

    Args:
        log_prob: its log densities of the data, of shape (sets,).
        drawn: draws from it, of shape (draws, 8).
        data: of shape (sets, 8).
        evaluations: how many densities a prediction computes.
    """

    def coverage(drawn: Tensor, data: Tensor) -> float:
        low, high = drawn.quantile(torch.tensor([0.05, 0.95]), 0)
        return 100 * ((data > low) & (data < high)).double().mean().item()

    return {
        "log_likelihood": log_prob.double().mean().item(),
        "coverage": coverage(drawn, data),
        "coverage_of_mean": coverage(drawn.mean(-1), data.mean(-1)),
        "evaluations": evaluations,
    }


def run_schools(seed: int, settings: PosteriorPredictiveSettings, place: Place) -> dict[str, dict[str, float]]:
    """Train and measure the laws of the eight estimates of one seed."""
    model = EightSchools()
    shapes: dict[str, tuple[int, ...]] = {"mu": (), "tau": (), "eta": (8,)}
    chain = Draws("eight schools", shapes, 2 * settings.school_draws)
    depends_on = {"seed": seed, "warmup": settings.warmup, "tree_depth": settings.tree_depth}
    place.trained(chain, depends_on, lambda: run_nuts(chain, model, (model.effects,), settings))
    pyro.set_rng_seed(seed)
    first = {name: value[: settings.school_draws] for name, value in chain.samples().items()}
    second = {name: value[settings.school_draws :] for name, value in chain.samples().items()}
    data = replicate(model, second, 4000)

    guide = AutoMultivariateNormal(model)
    elbo = ELBOObjective(Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0), model, guide)
    learn(elbo, model.effects, steps=settings.guide_steps, settings=settings, label=f"seed {seed}: schools, {BY_GUIDE}")
    posteriors: dict[str, tuple[Any, dict[str, Tensor]]] = {
        BY_NUTS: (first, first),
        BY_GUIDE: (guide, draws_of_guide(guide, settings.school_draws)),
    }

    measured = {}
    for name, (posterior, samples) in posteriors.items():
        density = log_mean(given(model, {key: value.unsqueeze(1) for key, value in samples.items()}).log_prob(data))
        measured[f"{TEACHER}, {name}"] = measure_schools(
            density, replicate(model, samples, 4000), data, settings.school_draws
        )
        teacher = posterior_predictive(model, posterior)
        for kind, rank in (("independent", 0), ("covariance", settings.rank)):
            pyro.set_rng_seed(seed)
            student = GaussianSchools(rank)
            distil(
                student,
                teacher,
                SurrogateKD(["effects"], fresh="*", num_particles=settings.particles, vectorize_particles=True),
                weight=1.0,
                steps=settings.school_steps,
                settings=settings,
                label=f"seed {seed}: schools, {kind} student of {name}",
            )
            with torch.no_grad():
                law = student.law()
                figures = measure_schools(law.log_prob(data), law.sample((4000,)), data, 1)
            measured[f"{SURROGATE}, {name}, {kind}"] = figures
    return measured


def run_seed(seed: int, settings: PosteriorPredictiveSettings, place: Place) -> Run:
    """Train and measure all models of one seed."""
    return {"digits": run_digits(seed, settings, place), "schools": run_schools(seed, settings, place)}


def tables(runs: list[Run]) -> dict[str, Table]:
    """The figures of both experiments."""
    titles = {
        "digits": "Held-out digits; log-likelihood in nats per image",
        "schools": "Replicated data of the eight schools; log-likelihood in nats per set",
    }
    found = {}
    for part, figures in (("digits", DIGIT_FIGURES), ("schools", SCHOOL_FIGURES)):
        rows = estimates([{"models": run[part]} for run in runs], list(figures))
        counts = {name: str(measured["evaluations"]) for name, measured in runs[0][part].items()}
        cells = {name: [counts[name], *row] for name, row in rows.items()}
        found[part] = Table(titles[part], [EVALUATIONS, *figures.values()], cells, explain(rows, MEANING))
    return found


EXPERIMENT = Experiment("posterior_predictive", __doc__ or "", PRESETS, run_seed, tables, may_be_zero=("warmup",))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()
