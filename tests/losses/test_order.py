"""Sites in different orders in the two programs: the conditional divergences are then no bound, and the loss says so."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import Distiller, DrawsKD, LocalKD, MarginalKD, MultiSampleKD, check, freeze
from tests.support.losses import SurrogateKD

ROWS = 2000
JOINT = torch.tensor([[0.45, 0.05], [0.05, 0.45]])
WARNING = "the teacher has site 'y1' before 'y2', and the student has 'y2' first"


@freeze
def teacher(rows):
    with pyro.plate("rows", rows):
        y1 = pyro.sample("y1", dist.Categorical(JOINT.sum(1)))
        pyro.sample("y2", dist.Categorical(JOINT[y1]))


def backwards(joint):
    """A program that draws y2 first, whose law of both is this table."""

    def student(rows):
        table = joint / joint.sum() * pyro.param("one", torch.tensor(1.0))
        with pyro.plate("rows", rows):
            y2 = pyro.sample("y2", dist.Categorical(table.sum(0)))
            pyro.sample("y1", dist.Categorical(table.T[y2]))

    return student


OPPOSITE = torch.tensor([[0.05, 0.45], [0.45, 0.05]])


@pytest.mark.parametrize(
    "loss", [SurrogateKD(["y1", "y2"]), LocalKD(["y1", "y2"]), MultiSampleKD(["y1", "y2"], num_samples=1)]
)
def test_the_sum_of_conditional_divergences_is_no_bound_and_the_loss_warns(loss):
    pyro.clear_param_store()
    exact = float((JOINT * (JOINT / OPPOSITE).log()).sum())
    with pytest.warns(UserWarning, match=WARNING):
        value = loss.loss(backwards(OPPOSITE), teacher, ROWS) / ROWS
    assert value < 0.9 * exact


@pytest.mark.parametrize("loss", [MarginalKD(["y1", "y2"]), MultiSampleKD(["y1", "y2"], num_samples=4)])
def test_joint_densities_have_no_order(loss):
    pyro.clear_param_store()
    exact = float((JOINT * (JOINT / OPPOSITE).log()).sum())
    values = torch.tensor([loss.loss(backwards(OPPOSITE), teacher, ROWS) / ROWS for _ in range(20)])
    assert abs(values.mean() - exact) < 5 * values.std() / 20**0.5


def test_it_warns_once_and_a_user_can_say_that_the_sites_are_independent():
    pyro.clear_param_store()
    loss = SurrogateKD(["y1", "y2"])
    student = backwards(OPPOSITE)
    with pytest.warns(UserWarning, match=WARNING):
        loss.loss(student, teacher, ROWS)
    loss.loss(student, teacher, ROWS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the teacher has site")
        SurrogateKD(["y1", "y2"]).loss(student, teacher, ROWS)


def test_latents_on_shared_noise_have_no_order():
    def program(first, second):
        def model():
            with pyro.plate("rows", 10):
                zs = {name: pyro.sample(name, dist.Normal(0.0, 1.0)) for name in (first, second)}
                pyro.sample("y", dist.Normal(zs["a"] - zs["b"], 1.0))

        return model

    student, frozen = program("a", "b"), freeze(program("b", "a"))
    assert SurrogateKD(["y"], latent_weight=0.0).loss(student, frozen) == 0
    with pytest.warns(UserWarning, match="the teacher has site 'b' before 'a'"):
        LocalKD(["y"]).loss(student, frozen)


def test_a_distiller_and_the_check_before_training_say_it():
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match=WARNING):
        Distiller(backwards(OPPOSITE), teacher, lambda params: torch.optim.Adam(params), SurrogateKD(["y1", "y2"])).fit(
            ROWS, steps=1, progress=False
        )
    report = check(SurrogateKD(["y1", "y2"]), backwards(OPPOSITE), teacher, ROWS)
    assert any(WARNING in str(problem) for problem in report.problems), report
    assert DrawsKD(["y1", "y2"]).compares_conditionals
