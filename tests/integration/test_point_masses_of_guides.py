"""Guides whose latents are point masses: functions of an auxiliary draw alone, or of trained parameters as well."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide

from pyro_kd import Distiller, LocalKD, SurrogateKD, check, freeze
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
    with pytest.raises(UnpairedSiteError, match=r"on equal draws, .* at 'a', 'b'.*targets=\['a', 'b'\]"):
        loss(draws).loss(student, teacher, X)
    assert "targets=['a', 'b']" in str(check(loss(draws), student, teacher, X))


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
