"""A loss averaged over several teachers, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_kd import freeze
from pyro_kd.divergences import reverse_kl
from pyro_kd.errors import InvalidProgramError
from pyro_kd.training import Trainer, averaged_objectives
from tests.support.losses import SurrogateKD


def normal(loc, scale):
    def program(rows):
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(loc, scale))

    return freeze(program)


def student(rows):
    loc, log_scale = pyro.param("loc", torch.tensor(0.5)), pyro.param("log_scale", torch.tensor(0.0))
    with pyro.plate("rows", rows):
        pyro.sample("y", dist.Normal(loc, log_scale.exp()))


TEACHERS = [normal(-1.0, 1.0), normal(3.0, 0.5)]
WEIGHTS = [3.0, 1.0]
MIXTURE = (0.0, math.sqrt(0.75 * (1 + 1) + 0.25 * (0.25 + 9)))  # mean and standard deviation of 3/4 N(-1, 1) + 1/4 N(3, 1/2)
PRECISION = 0.75 * 1 + 0.25 * 4
PRODUCT = ((0.75 * -1 + 0.25 * 4 * 3) / PRECISION, PRECISION**-0.5)  # of the normalised geometric mean


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("divergence", "optimum"), [(None, MIXTURE), (reverse_kl, PRODUCT)], ids=["kl", "reverse_kl"])
def test_the_kl_leads_to_the_mixture_and_its_reverse_to_the_product(divergence, optimum, compiled):
    loss = SurrogateKD(["y"]) if divergence is None else SurrogateKD(["y"], divergence=divergence)
    if compiled:
        loss.compile(backend=None)
    objectives = averaged_objectives(loss, student, TEACHERS, weights=WEIGHTS)
    trainer = Trainer(objectives, lambda params: torch.optim.Adam(params, lr=0.05))
    trainer.fit(1, steps=400, progress=False)
    assert pyro.param("loc").item() == pytest.approx(optimum[0], abs=1e-2)
    assert pyro.param("log_scale").exp().item() == pytest.approx(optimum[1], abs=1e-2)


def test_all_weights_are_equal_by_default_and_each_objective_has_a_loss_of_its_own():
    loss = SurrogateKD(["y"])
    objectives = averaged_objectives(loss, student, TEACHERS)
    assert list(objectives) == ["teacher 0", "teacher 1"]
    assert [objective.weight_at(0) for objective in objectives.values()] == [0.5, 0.5]
    assert len({id(objective.loss) for objective in objectives.values()} | {id(loss)}) == 3


@pytest.mark.parametrize(
    ("teachers", "weights"), [([], None), (TEACHERS, [1.0]), (TEACHERS, [1.0, -1.0]), (TEACHERS, [0.0, 0.0])]
)
def test_weights_that_do_not_fit_the_teachers_are_refused(teachers, weights):
    with pytest.raises(InvalidProgramError, match="at least one teacher, and a weight for each.*none below 0 and not all 0"):
        averaged_objectives(SurrogateKD(["y"]), student, teachers, weights=weights)


def test_the_average_as_a_loss_of_svi():
    """The recipe of docs/teachers.md."""
    losses = [SurrogateKD(["y"]) for _ in TEACHERS]

    def averaged(student, guide, *args):
        return (
            sum(loss.differentiable_loss(student, teacher, *args) for loss, teacher in zip(losses, TEACHERS, strict=True))
            / 2
        )

    svi = SVI(student, TEACHERS[0], pyro.optim.Adam({"lr": 0.05}), loss=averaged)
    for _ in range(300):
        svi.step(1)
    assert pyro.param("loc").item() == pytest.approx(1.0, abs=1e-2)
    assert pyro.param("log_scale").exp().item() == pytest.approx(math.sqrt(0.5 * (1 + 4) + 0.5 * (0.25 + 4)), abs=1e-2)
