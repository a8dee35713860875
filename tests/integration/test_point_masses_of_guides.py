"""Guides whose latents are point masses: functions of an auxiliary draw alone, or of trained parameters as well."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide

from pyro_kd import Distiller, LocalKD, SurrogateKD, bound_report, check, freeze
from pyro_kd.errors import UnpairedSiteError

X = torch.linspace(-1, 1, 10)


def regression(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(a * x, b), obs=2 * x)


def gaussian():
    return autoguide.AutoGaussian(regression)


def structured():
    return autoguide.AutoStructured(regression, conditionals="normal", dependencies="linear")


def pair_of(make):
    """A student as it starts, and a frozen teacher with other parameters."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    teacher = make()
    teacher(X)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student = make()
    student(X)
    return student, frozen


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
@pytest.mark.parametrize(
    ("make", "draws"),
    [(gaussian, ["_AutoGaussianDense_latent"]), (structured, ["a_aux", "b_aux"])],
    ids=["Gaussian", "structured"],
)
def test_draws_that_do_not_cover_the_point_masses_are_refused(make, draws, loss):
    student, teacher = pair_of(make)
    with pytest.raises(UnpairedSiteError, match=r"leaves out the point masses 'a', 'b'.*targets=\['a', 'b'\]"):
        loss(draws).loss_and_grads(student, teacher, X)
    assert "targets=['a', 'b']" in str(check(loss(draws), student, teacher, X))
    with pytest.raises(UnpairedSiteError, match="leaves out the point masses"):
        bound_report(student, teacher, draws, X, num_samples=2)


@pytest.mark.parametrize("make", [gaussian, structured], ids=["Gaussian", "structured"])
def test_the_remedy_trains_the_guide(make):
    student, teacher = pair_of(make)
    distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.05), SurrogateKD(["a", "b"]))
    distiller.fit(X, steps=300, progress=False)

    def drawn(guide):
        pyro.set_rng_seed(0)
        values = [guide(X) for _ in range(300)]
        return torch.stack([torch.stack([value[name].detach() for value in values]) for name in ("a", "b")])

    torch.testing.assert_close(drawn(student).mean(1), drawn(teacher).mean(1), rtol=0.05, atol=0.05)
    torch.testing.assert_close(drawn(student).std(1), drawn(teacher).std(1), rtol=0.2, atol=0.05)


@pytest.mark.parametrize(
    ("make", "draws"),
    [
        (autoguide.AutoDiagonalNormal, ["_AutoDiagonalNormal_latent"]),
        (autoguide.AutoMultivariateNormal, ["_AutoMultivariateNormal_latent"]),
        (autoguide.AutoLowRankMultivariateNormal, ["_AutoLowRankMultivariateNormal_latent"]),
        (autoguide.AutoIAFNormal, ["_AutoIAFNormal_latent"]),
        (autoguide.AutoNormal, ["a_unconstrained", "b_unconstrained"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_draws_that_cover_the_point_masses_are_all_that_is_needed(make, draws):
    student, teacher = pair_of(lambda: make(regression))
    assert SurrogateKD(draws).loss(student, teacher, X) > 0
    assert not [problem for problem in check(SurrogateKD(draws), student, teacher, X).problems if problem.is_error]


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_a_student_that_starts_as_its_teacher_is_refused_as_well(loss):
    student, _ = pair_of(gaussian)
    with pytest.raises(UnpairedSiteError, match="leaves out the point masses"):
        loss(["_AutoGaussianDense_latent"]).loss_and_grads(student, freeze(student), X)


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_a_target_that_depends_on_the_point_masses_trains_what_is_behind_them(loss):
    def followed(guide):
        def program(x):
            values = guide(x)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(values["a"] * x, values["b"]))

        return program

    pyro.clear_param_store()
    teacher_guide = structured()
    teacher_guide(X)
    teacher = freeze(followed(teacher_guide))
    pyro.clear_param_store()
    student_guide = structured()
    student_guide(X)
    with torch.no_grad():
        for parameter in student_guide.parameters():
            parameter.add_(0.1)
    assert loss(["y"]).loss_and_grads(followed(student_guide), teacher, X) > 0
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student_guide.parameters())


@pytest.mark.parametrize("options", [{}, {"latent_weight": 0.0}])
def test_some_of_the_point_masses_may_be_targets(options):
    student, teacher = pair_of(structured)
    assert SurrogateKD(["a"], **options).loss_and_grads(student, teacher, X) > 0
