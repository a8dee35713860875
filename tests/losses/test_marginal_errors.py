"""The exact KL as a loss: programs and options that it refuses, and what the errors say."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import Distiller, MarginalKD, freeze
from pyro_kd.errors import (
    NonFiniteLossError,
    NoParametersError,
    ObservedValueError,
    PlateMismatchError,
    SharedParameterError,
    SupportMismatchError,
    UnknownTargetError,
    UnpairedSiteError,
    UnsupportedDivergenceError,
)
from tests.support.latent_coins import ROWS, TARGETS, Coins, sgd

NAMES = ["latent_weight", "divergence", "latent_divergence", "latent_reduction", "latent_form"]


@pytest.mark.parametrize("name", [*NAMES, "discrete_gradient", "target_values", "fresh"])
def test_options_without_a_meaning_are_refused(name):
    with pytest.raises(TypeError, match=rf"MarginalKD takes no {name}: .*Leave it out"):
        MarginalKD(["y"], **{name: 0.1})


def test_a_schedule_of_the_latent_weight_is_refused():
    distiller = Distiller(Coins(1), freeze(Coins(0)), sgd, MarginalKD(TARGETS), latent_weight=lambda step: 0.1)
    with pytest.raises(TypeError, match="MarginalKD takes no latent_weight: its latents are summed out.*schedule"):
        distiller.fit(ROWS, steps=1, progress=False)


def test_max_states_below_one_is_refused():
    with pytest.raises(ValueError, match="max_states must be at least 1, not 0"):
        MarginalKD(["y"], max_states=0)


def wide(bits):
    """One site that depends on all latents together."""

    def model(rows=4):
        with pyro.plate("rows", rows):
            total = 0.0
            for i in range(bits):
                total = total + pyro.sample(f"z{i}", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Bernoulli(total / bits * 0.5 + 0.2))

    return model


def test_too_many_states_are_an_error_before_memory_is_taken():
    """2^40 states: had the programs been enumerated, the user's own sum of the latents would have been too large."""
    with pytest.raises(UnsupportedDivergenceError, match=r"have 1.1e\+12 joint states.* max_states is .*MultiSampleKD"):
        MarginalKD(["y"]).loss(wide(40), wide(40))
    with pytest.raises(UnsupportedDivergenceError, match=r"have 32 joint states.* 128 numbers, and max_states is 127"):
        MarginalKD(["y"], max_states=127).loss(wide(5), wide(5))
    assert MarginalKD(["y"], max_states=128).loss(wide(5), wide(5)) == 0.0

    def vector():
        z = pyro.sample("z", dist.Bernoulli(torch.full((40,), 0.5)).to_event(1))
        pyro.sample("y", dist.Bernoulli(z.mean(-1)))

    with pytest.raises(UnsupportedDivergenceError, match=r"the latents 'z' have 1.1e\+12 joint states"):
        MarginalKD(["y"]).loss(vector, vector)


def test_more_latents_than_dimensions_are_refused():
    with pytest.raises(UnsupportedDivergenceError, match=r"has 70 latents.* at most 60 .*to_event.*MultiSampleKD"):
        MarginalKD(["y"], max_states=2**80).loss(wide(70), wide(70))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_latent_that_cannot_be_enumerated_is_refused(which):
    def poisson(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("count", dist.Poisson(2.0))
            pyro.sample("y1", dist.Bernoulli(0.5 + 0 * z))
            pyro.sample("y2", dist.Bernoulli(0.5 + 0 * z))

    pair = (poisson, Coins(0)) if which == "student" else (Coins(0), poisson)
    with pytest.raises(UnsupportedDivergenceError, match="latent site 'count' is Poisson, whose values .*MultiSampleKD"):
        MarginalKD(TARGETS).loss(*pair, ROWS)


def test_targets_that_cannot_be_enumerated_are_refused():
    def program():
        pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedDivergenceError, match="target 'y' is Normal, whose values .*Leave out enumerate_targets"):
        MarginalKD(["y"], enumerate_targets=True).loss(program, program)

    def inner():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * z))

    with pytest.raises(PlateMismatchError, match="target 'y' lies in the plates 'rows', which do not hold all sites"):
        MarginalKD(["y"], enumerate_targets=True).loss(inner, inner)


def test_a_program_that_does_not_broadcast_is_refused():
    def program():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(torch.stack([0.2 + 0.5 * z[0], z[1] * 0.5, z[2] * 0.1])))

    with pytest.raises((UnsupportedDivergenceError, PlateMismatchError), match="MultiSampleKD"):
        MarginalKD(["y"]).loss(program, program)

    def branching():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Bernoulli(0.9 if z else 0.1))

    with pytest.raises(UnsupportedDivergenceError, match="does not broadcast over dimensions on the left.*MultiSampleKD"):
        MarginalKD(["y"]).loss(branching, branching)


def test_draws_between_sites_are_refused():
    def program():
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Bernoulli(torch.rand(3)))

    with pytest.raises(UnsupportedDivergenceError, match="draws outside of its sample sites .*rand.*Make the draw a site"):
        MarginalKD(["y"]).loss(program, program)


def test_batch_norm_in_train_mode_is_refused():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self):
            with pyro.plate("rows", 8):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
                flat = self.norm(z.reshape(-1, 2)).reshape(z.shape)
                pyro.sample("y", dist.Bernoulli(logits=flat.sum(-1)))

    student, teacher = Normed(), freeze(Normed())
    with pytest.raises(PlateMismatchError, match="density of site 'y' in a row depends on .*no batch norm in train mode"):
        MarginalKD(["y"]).loss(student, teacher)
    assert math.isfinite(MarginalKD(["y"]).loss(student.eval(), teacher))


def test_the_usual_mistakes_have_the_usual_errors():
    student, teacher = Coins(1), Coins(0)
    with pytest.raises(UnknownTargetError, match="target 'y3' is not a sample site of the teacher"):
        MarginalKD(["y3"]).loss(student, teacher, 5)
    with pytest.raises(UnpairedSiteError, match="site 'y1' is in the teacher only.*site_map"):
        MarginalKD(["y1"]).loss(lambda rows: pyro.sample("other", dist.Bernoulli(0.5)), teacher, 5)
    with pytest.raises(SharedParameterError, match="belongs to both teacher and student"):
        MarginalKD(TARGETS)(student, student)(5)
    with pytest.raises(SharedParameterError, match="belongs to both teacher and student"):
        MarginalKD(TARGETS)(lambda rows: student(rows), lambda rows: student(rows))(5)
    with pytest.raises(NoParametersError, match="depends on no parameter of the student"):
        MarginalKD(TARGETS)(lambda rows: freeze(Coins(1))(rows), teacher)(5)
    with pytest.raises(PlateMismatchError, match="plate 'rows' has size 5 in the teacher and 4 in the student"):
        MarginalKD(TARGETS).loss(lambda rows: student(4), teacher, 5)

    def normal(rows):
        with pyro.plate("rows", rows):
            pyro.sample("y1", dist.Normal(0.0, 1.0))

    with pytest.raises(SupportMismatchError, match="supports differ at site 'y1'"):
        MarginalKD(["y1"]).loss(normal, teacher, 5)

    def observed(data):
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=data)
            pyro.sample("y1", dist.Bernoulli(0.5))

    with pytest.raises(ObservedValueError, match="'x' differs between teacher and student"):
        MarginalKD(["y1"]).loss(lambda: observed(torch.zeros(5)), lambda: observed(torch.ones(5)))


def test_an_infinite_kl_is_an_error():
    def program(logits):
        return lambda: pyro.sample("y", dist.Categorical(logits=torch.tensor(logits)))

    logits = nn.Parameter(torch.tensor([0.0, -math.inf]))
    with pytest.raises(NonFiniteLossError, match="'y'"):
        for _ in range(40):
            MarginalKD(["y"]).differentiable_loss(
                lambda: pyro.sample("y", dist.Categorical(logits=logits, validate_args=False)), program([0.0, 0.0])
            )


@pytest.mark.parametrize("swap", [False, True])
def test_a_point_mass_against_a_density_is_an_error(swap):
    def program(family):
        def model(rows=10):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))
                pyro.sample("y", family(2 * z))

        return model

    point, density = program(dist.Delta), program(lambda loc: dist.Normal(loc, 0.1))
    pair = (point, density) if swap else (density, point)
    with pytest.raises(
        SupportMismatchError, match="target 'y' is a point mass in the .* and has a density in the other program"
    ):
        MarginalKD(["y"]).loss(pair[0], freeze(pair[1]))


def hidden_in_part(logits, mask, *, inside=False):
    with pyro.plate("rows", 4):
        law = dist.Categorical(logits=logits * torch.arange(3.0))
        x = pyro.sample("x", law.mask(mask)) if inside else None
        if x is None:
            with pyro.poutine.mask(mask=mask):
                pyro.sample("x", law)
        pyro.sample("y", dist.Bernoulli(logits=logits))


def test_enumerated_targets_that_a_mask_hides_are_refused():
    mask = torch.tensor([True, False, False, True])
    loss = MarginalKD(["x", "y"], enumerate_targets=True)
    with pytest.raises(PlateMismatchError, match="hides elements of target 'x'.*Leave out enumerate_targets"):
        loss.loss(lambda: hidden_in_part(torch.tensor(0.3), mask), lambda: hidden_in_part(torch.tensor(0.1), mask))
    shown = torch.ones(4, dtype=torch.bool)
    value = loss.loss(lambda: hidden_in_part(torch.tensor(0.3), shown), lambda: hidden_in_part(torch.tensor(0.1), shown))
    assert 0 < value < 1


def test_equal_masks_inside_of_a_distribution_are_equal():
    mask = torch.tensor([True, False, False, True])

    def program(logit):
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z + logit, 1.0).mask(mask))

    def outside(logit):
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            with pyro.poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(z + logit, 1.0))

    found = []
    for model in (program, outside):
        pyro.set_rng_seed(0)
        found.append(MarginalKD(["y"]).loss(lambda m=model: m(0.5), lambda m=model: m(0.0)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0] > 0
