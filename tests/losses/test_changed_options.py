"""Options of a loss that change between steps: the next step is that of a new loss with these options, captured or not."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD, MarginalKD, MultiSampleKD, OnPolicyKD, SurrogateKD, freeze
from pyro_kd.divergences import jensen_shannon, reverse_kl
from tests.support.captured import MARKS

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*(continues without a graph|the probabilities|reverse)")]


def program(make, is_discrete=False):
    def model(rows):
        a = make()
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(logits=a))
            w = z if is_discrete else pyro.sample("w", dist.Normal(a * z, 1.0))
            pyro.sample("x", dist.Normal(w + a * z, 0.5))

    return model


def param():
    return pyro.param("a", torch.tensor(0.3))


MIXED = program(param), freeze(program(lambda: torch.tensor(0.8)))
DISCRETE = program(param, is_discrete=True), freeze(program(lambda: torch.tensor(0.8), is_discrete=True))

LOSSES = {
    "surrogate": (SurrogateKD, {"latent_weight": 0.1}, MIXED),
    "the paper's": (SurrogateKD, {"latent_weight": 0.1, "teacher_forcing": 0.0, "num_particles": 2}, MIXED),
    "local": (LocalKD, {}, MIXED),
    "several samples": (MultiSampleKD, {"num_samples": 3}, MIXED),
    "marginal": (MarginalKD, {}, DISCRETE),
    "on policy": (OnPolicyKD, {}, MIXED),
}
OPTIONS = {
    "latent_weight": 0.7,
    "divergence": reverse_kl,
    "latent_divergence": jensen_shannon,
    "latent_reduction": "mean",
    "discrete_gradient": "score",
    "fresh": ["w"],
    "num_particles": 3,
    "vectorize_particles": True,
    "teacher_forcing": 0.5,
    "given_weight": 0.3,
    "reuse": 2,
    "student_fraction": 0.5,
    "num_samples": 5,
    "control_variate": True,
}


def steps(loss, student, teacher, count):
    """Value and gradient of each step."""
    found = []
    for seed in range(count):
        pyro.set_rng_seed(seed)
        value = loss.loss_and_grads(student, teacher, 6)
        param = pyro.get_param_store()._params["a"]
        found.append((value, param.grad.item()))
        param.grad = None
    return found


def takes(name, option):
    """Whether a loss has the option. On the student's own targets there are no gradients by score."""
    kind, options, _ = LOSSES[name]
    try:
        kind(["x"], **{**options, option: OPTIONS[option]})
    except (TypeError, ValueError, NotImplementedError):
        return False
    return hasattr(kind(["x"], **options), option) and (name, option) != ("on policy", "discrete_gradient")


CASES = [(name, option) for name in LOSSES for option in OPTIONS if takes(name, option)]


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(("name", "option"), CASES)
def test_a_changed_option_counts_from_the_next_step_on(name, option, is_captured):
    kind, options, programs = LOSSES[name]
    loss, other = kind(["x"], **options), kind(["x"], **{**options, option: OPTIONS[option]})
    expected = steps(other, *programs, 4)
    if is_captured:
        loss.compile(backend=None)
    steps(loss, *programs, 3)
    setattr(loss, option, getattr(other, option))
    assert steps(loss, *programs, 4) == expected


def test_there_are_cases_of_every_option_and_loss():
    assert {name for name, _ in CASES} == set(LOSSES)
    assert {option for _, option in CASES} == set(OPTIONS)
