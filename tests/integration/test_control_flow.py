"""Programs whose loops and branches depend on drawn values, and sites that are marked for enumeration."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate

from pyro_kd import LocalKD
from pyro_kd.divergences import kl
from pyro_kd.errors import UnpairedSiteError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.runs import runs_of


def geometric(probs):
    def model():
        count = 0
        while pyro.sample(f"stop_{count}", dist.Bernoulli(probs)) == 0:
            count += 1
        pyro.sample("x", dist.Normal(float(count), 1.0))
        return count

    return model


SOONER = geometric(torch.tensor(0.5))


LATER = geometric(torch.tensor(0.1))


STOP_KL = float(kl(dist.Bernoulli(torch.tensor(0.1)), dist.Bernoulli(torch.tensor(0.5)), torch.tensor(0.0)))


@pytest.mark.parametrize(
    "objective",
    [LocalKD(["x"]), SurrogateKD(lambda site: site["type"] == "sample"), LocalKD(lambda site: site["type"] == "sample")],
    ids=["local", "surrogate with the stops as targets", "local with the stops as targets"],
)
def test_a_loop_that_stops_on_a_given_value_takes_the_teachers_path(objective):
    lengths = set()
    for seed in range(8):
        pyro.set_rng_seed(seed)
        terms = objective.terms(SOONER, LATER)
        values = [float(term.value) for name, term in terms.items() if name != "x"]
        assert values == pytest.approx(len(values) * [STOP_KL])
        assert terms["x"].value == 0
        lengths.add(len(values))
    assert len(lengths) > 3


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (SOONER, LATER, r"site 'stop_\d+' is in the teacher only"),
        (LATER, SOONER, r"'stop_\d+' (?:is|are) in the student only"),
    ],
    ids=["student stops first", "teacher stops first"],
)
def test_a_loop_whose_length_depends_on_a_latent_is_an_error_if_the_paths_differ(student, teacher, message):
    """With shared noise the paths are equal or part; the error names the first site that one program has alone."""
    parted = equal = 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        try:
            terms = SurrogateKD(["x"]).terms(student, teacher)
        except UnpairedSiteError as error:
            parted += len(re.findall(message, str(error)))
        else:
            assert terms["x"].value == 0
            equal += 1
    assert parted > 0
    assert equal > 0


def test_a_branch_on_a_latent_shares_the_noise_of_the_branch_taken():
    """Both programs take the branch that the shared uniform chooses, if they agree on its probability."""

    def program(loc):
        def model():
            if pyro.sample("which", dist.Bernoulli(0.5)) > 0:
                return pyro.sample("x", dist.Normal(pyro.sample("left", dist.Normal(loc, 1.0)), 1.0))
            return pyro.sample("x", dist.Normal(2 * pyro.sample("right", dist.Normal(loc, 1.0)), 1.0))

        return model

    branches = set()
    for _ in range(20):
        terms = SurrogateKD(["x"]).terms(program(1.0), program(0.0))
        _, branch, x = terms
        assert float(terms[x].value) == pytest.approx({"left": 0.5, "right": 2.0}[branch])
        branches.add(branch)
    assert branches == {"left", "right"}


ENUMERATED = {
    "parallel": lambda fn: poutine.infer_config(fn, config_fn=lambda site: {"enumerate": "parallel"}),
    "sequential": lambda fn: poutine.infer_config(fn, config_fn=lambda site: {"enumerate": "sequential"}),
    "config_enumerate": config_enumerate,
    "config_enumerate sequential, expanded": lambda fn: config_enumerate(fn, default="sequential", expand=True),
    "none": lambda fn: fn,
}


@pytest.mark.parametrize("how", ENUMERATED)
@both
@particles
def test_sites_marked_for_enumeration_are_drawn(loss, options, how):
    def program(logits):
        def model():
            with pyro.plate("rows", 5):
                k = pyro.sample("k", dist.Categorical(logits=logits), infer={"mine": 1})
                pyro.sample("x", dist.Normal(k.float(), 1.0))

        return ENUMERATED[how](model)

    student = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    teacher = torch.tensor([0.5, 0.5, 0.0])
    objective = loss(["x"], latent_weight=2.0, max_plate_nesting=1, **options)
    value = objective.differentiable_loss(program(student), program(teacher))
    pyro.set_rng_seed(0)
    terms = objective.terms(program(student), program(teacher))
    pyro.set_rng_seed(0)
    runs = runs_of(objective, program(student), program(teacher))
    expected = 5 * float(kl(dist.Categorical(logits=teacher), dist.Categorical(logits=student), torch.tensor(0)).detach())
    assert float(terms["k"].value.detach()) == pytest.approx(expected, rel=1e-5)
    squares = [(run.student.nodes["k"]["value"] - run.teacher.nodes["k"]["value"]).square().sum() / 2 for run in runs]
    by_hand = float(sum(squares)) / objective.num_particles
    assert float(terms["x"].value.detach()) == pytest.approx(by_hand)
    (gradient,) = torch.autograd.grad(value, student)
    assert torch.allclose(gradient, 2.0 * 5 * (student.softmax(-1) - teacher.softmax(-1)).detach(), atol=1e-5)
    assert all(run.student.nodes["k"]["infer"]["mine"] == 1 for run in runs)
