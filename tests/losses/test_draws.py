"""The cross-entropy at a teacher's draws: its value and gradient against closed forms, its latents, and its errors."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from pyro_kd import Distiller, DrawsKD, check, stored_draws
from pyro_kd.errors import SupportMismatchError, UnknownTargetError, UnpairedSiteError, UnsupportedNoiseError
from tests.support.gradient_estimates import assert_mean, gradients
from tests.support.losses import SurrogateKD


class Student(nn.Module):
    """Rows of one family, whose two parameters are exponentials."""

    def __init__(self, family, start=(0.2, -0.3)):
        super().__init__()
        self.family = family
        self.first, self.second = (nn.Parameter(torch.tensor(value)) for value in start)

    def law(self):
        first = self.first if self.family in (dist.LogNormal, dist.Normal) else self.first.exp()
        return self.family(first, self.second.exp())

    def forward(self, rows):
        with pyro.plate("data", rows):
            pyro.sample("y", self.law())


FAMILIES = {
    "Gamma": (dist.Gamma, dist.Gamma(2.0, 1.5)),
    "LogNormal": (dist.LogNormal, dist.LogNormal(0.3, 0.5)),
    "Normal": (dist.Normal, dist.Normal(1.0, 2.0)),
    "Beta": (dist.Beta, dist.Beta(2.0, 3.0)),
}


def simulator(law):
    """A program whose target has no density: a point."""

    def program(rows):
        with pyro.plate("data", rows):
            y = pyro.sample("hidden", law)
            pyro.sample("y", dist.Delta(y))

    return program


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_kl_and_the_value_differs_by_the_entropy(family):
    pyro.set_rng_seed(0)
    kind, law = FAMILIES[family]
    student = Student(kind)
    params, loss = list(student.parameters()), DrawsKD(["y"])(student, simulator(law))
    exact = kl_divergence(law, student.law())
    truth = torch.stack(torch.autograd.grad(exact, params, retain_graph=True))
    assert_mean(gradients(loss, params, 200, 64) / 64, truth)
    with torch.no_grad():
        assert_mean(torch.stack([loss(64) / 64 for _ in range(150)]), exact.detach() + law.entropy())


def test_the_value_is_above_the_cross_entropy_of_a_student_with_latents():
    """Jensen's bound, whose gap is known: y ~ N(0, 1) against z ~ N(0, 1), y ~ N(z, 1)."""
    pyro.set_rng_seed(1)
    loc = torch.tensor(0.0, requires_grad=True)

    def student(rows):
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0))

    loss = DrawsKD(["y"])(student, simulator(dist.Normal(0.0, 1.0)))
    with torch.no_grad():
        found = torch.stack([loss(64) / 64 for _ in range(200)])
    assert_mean(found, 0.5 * math.log(2 * math.pi) + 1.0)  # E (y - z)^2 / 2 = 1
    marginal = 0.5 * math.log(2 * math.pi) + 0.5 * math.log(2) + 0.25
    assert found.mean() > marginal + 0.3


def test_a_latent_shares_the_noise_of_the_teachers_latent_of_its_name_and_others_draw_their_own():
    def teacher(rows):
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("only the teacher's", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Delta(z))

    scale = torch.tensor(0.1, requires_grad=True)

    def student(rows):
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            own = pyro.sample("own", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + 0 * own, scale))

    per_row = DrawsKD(["y"]).loss(student, teacher, 50) / 50
    assert per_row == pytest.approx(math.log(0.1) + 0.5 * math.log(2 * math.pi), abs=1e-5)  # at its mean: z is the teacher's
    mechanisms = {row.name: row.noise for row in check(DrawsKD(["y"]), student, teacher, 50).sites}
    assert mechanisms == {"z": "direct", "y": "given", "own": "its own", "only the teacher's": "its own"}
    with pytest.raises(UnpairedSiteError, match="'only the teacher's'|\"only the teacher's\""):
        DrawsKD(["y"], fresh=()).loss(student, teacher, 50)


def test_its_gradient_is_that_of_an_estimated_kl_on_the_same_draws():
    student = Student(dist.Normal)

    def teacher(rows):
        components = dist.Normal(torch.tensor([0.0, 1.0]), 0.5)
        with pyro.plate("data", rows):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))

    found = []
    for loss in (DrawsKD(["y"]), SurrogateKD(["y"])):
        pyro.set_rng_seed(3)
        found.append(gradients(loss(student, teacher), list(student.parameters()), 1, 1000))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_student_learns_stored_draws(compiled):
    pyro.set_rng_seed(4)
    data = dist.Gamma(3.0, 2.0).sample((2000,))
    student, loss = Student(dist.Gamma), DrawsKD(["y"])
    distiller = Distiller(
        student,
        stored_draws({"y": data}, rows=int),
        lambda params: torch.optim.Adam(params, lr=0.02),
        loss.compile(backend=None) if compiled else loss,
    )
    distiller.fit(256, steps=300, progress=False)
    law = student.law()  # the maximum of likelihood has the mean of the data, and their mean logarithm
    assert law.mean.item() == pytest.approx(data.mean().item(), rel=0.1)
    log_mean = (law.concentration.digamma() - law.rate.log()).item()
    assert log_mean == pytest.approx(data.log().mean().item(), abs=0.1)


def test_the_weight_of_a_latent_that_both_have_gives_it_a_term():
    def program(loc):
        def run(rows):
            with pyro.plate("data", rows):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0))

        return run

    loc = torch.tensor(0.5, requires_grad=True)
    terms = DrawsKD(["y"], latent_weight=2.0).terms(program(loc), program(0.0), 4)
    assert terms["z"].weight == 2.0
    torch.testing.assert_close(terms["z"].value.detach(), torch.tensor(4 * 0.5**2 / 2))


class Unsampled(dist.TorchDistribution):
    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self):
        super().__init__(validate_args=False)

    def log_prob(self, value):
        return -value.square()


def test_a_draw_outside_of_the_students_support():
    with pytest.raises(
        SupportMismatchError, match="site 'y': the teacher's draw, from Delta, is outside the support.*Gamma"
    ):
        DrawsKD(["y"]).loss(Student(dist.Gamma), simulator(dist.Normal(-5.0, 0.1)), 8)


def test_a_teacher_without_draws():
    def teacher(rows):
        pyro.sample("y", Unsampled())

    with pytest.raises(UnsupportedNoiseError, match=r"site 'y': Unsampled cannot be sampled.*register_sampler\(Unsampled\)"):
        DrawsKD(["y"]).loss(Student(dist.Normal), teacher, 8)


def test_a_target_that_only_the_teacher_has_is_an_error():
    def student(rows):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(UnpairedSiteError, match="'y' is in the teacher only"):
        DrawsKD(["y"]).loss(student, simulator(dist.Normal(0.0, 1.0)), 8)
    with pytest.raises(UnknownTargetError, match="'x' is not a sample site of the teacher"):
        DrawsKD(["x"]).loss(student, simulator(dist.Normal(0.0, 1.0)), 8)


def test_it_takes_no_divergence():
    with pytest.raises(TypeError, match="DrawsKD takes no divergence.*SurrogateKD"):
        DrawsKD(["y"], divergence=lambda p, q, value: value)


@pytest.mark.parametrize("family", [lambda x: dist.Exponential(x), lambda x: dist.Poisson(x)], ids=["reals", "counts"])
def test_a_draw_outside_of_the_support_is_an_error_in_every_call(family):
    """Torch checks values only now and then, and these families have finite densities there."""
    rate = nn.Parameter(torch.tensor(1.0))
    draws = torch.ones(10)

    def student():
        with pyro.plate("rows", 10):
            pyro.sample("y", family(rate.exp()))

    def teacher():
        with pyro.plate("rows", 10):
            pyro.sample("y", dist.Delta(draws))

    module = DrawsKD(["y"])(student, teacher)
    module().backward()
    draws.fill_(-1.0)
    with pytest.raises(SupportMismatchError, match="'y': the teacher's draw, from Delta, is outside the support"):
        module()


def test_draws_between_the_sites_of_either_program_bring_no_warning():
    """A simulator is taught by its draws, whatever they are made from, and the student's noise is its own."""
    generator, learned = np.random.default_rng(0), Student(dist.Normal)

    def teacher(rows):
        noise = torch.randn(rows) + torch.tensor(generator.normal(size=rows)).float()
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Delta(noise))

    def student(rows):
        torch.rand(rows)
        learned(rows)

    with warnings.catch_warnings(record=True) as caught:
        DrawsKD(["y"])(student, teacher)(8).backward()
        report = check(DrawsKD(["y"]), student, teacher, 8, try_capture=False)
    assert [str(warning.message) for warning in caught] == []
    assert report.problems == ()
    assert [draw.op for draw in report.between] == ["rand", "randn"]
    shared = SurrogateKD(["y"], divergence=lambda p, q, value: -q.log_prob(value))
    with pytest.warns(UserWarning, match="the student draws these outside of its sample sites, and the teacher does not"):
        shared(student, teacher)(8)


@pytest.mark.parametrize("draws", [torch.tensor([1, 0]), torch.tensor([True, False])])
def test_bits_that_are_no_floating_point_numbers_are_named(draws):
    def student(rows):
        with pyro.plate("rows", rows):
            pyro.sample("c", dist.Bernoulli(0.3))

    with pytest.raises(SupportMismatchError, match="takes bits as floating-point numbers"):
        DrawsKD(["c"]).loss(student, stored_draws({"c": draws}, rows=int), 4)
