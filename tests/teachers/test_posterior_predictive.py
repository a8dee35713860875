"""The posterior predictive as a teacher, against the closed form of a conjugate Gaussian model."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule
from torch import nn

from pyro_kd import Distiller, check, posterior_predictive
from pyro_kd.errors import UnpairedSiteError
from tests.support.gradient_estimates import assert_mean, gradients
from tests.support.losses import SurrogateKD

NOISE = 0.5
X = torch.tensor([1.0, 2.0, -1.0, 0.5])
Y = torch.tensor([1.2, 2.5, -0.9, 0.8])
VARIANCE = 1 / (1 + (X**2).sum().item() / NOISE**2)  # of the posterior of the slope, whose prior is N(0, 1)
MEAN = VARIANCE * (X * Y).sum().item() / NOISE**2


def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, NOISE), obs=y)


def guide(x, y=None):
    pyro.sample("slope", dist.Normal(MEAN, VARIANCE**0.5))


def exact_samples(n=4000):
    """Draws with exactly the mean and variance of the posterior."""
    draws = torch.randn(n, dtype=torch.float64)
    draws = (draws - draws.mean()) / draws.std(correction=0)
    return {"slope": (MEAN + VARIANCE**0.5 * draws).float()}


class Student(PyroModule):
    """Independent rows N(slope x, width)."""

    def __init__(self):
        super().__init__()
        self.slope, self.log_width = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.slope * x, self.log_width.exp()))


POSTERIORS = {"draws": exact_samples, "guide": lambda: guide}
LATENT = {"draws": "draw", "guide": "slope"}


def outputs(teacher, x, count):
    """Draws of the rows in independent runs, of shape (count, rows)."""
    with pyro.plate("runs", count, dim=-2):
        return poutine.trace(teacher).get_trace(x).nodes["y"]["value"].double()


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_rows_with_their_own_draws_have_the_mean_and_variance_of_the_predictive_law(posterior):
    pyro.set_rng_seed(1)
    teacher = posterior_predictive(model, POSTERIORS[posterior](), rows=len)
    y = outputs(teacher, torch.full((40_000,), 2.0), 1)[0]
    assert_mean(y, 2 * MEAN)
    assert_mean((y - 2 * MEAN) ** 2, 4 * VARIANCE + NOISE**2)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_rows_of_one_draw_have_its_covariance_and_rows_with_their_own_have_none(posterior):
    pyro.set_rng_seed(2)
    x = torch.tensor([2.0, 3.0])
    for rows, covariance in ((None, 6 * VARIANCE), (len, 0.0)):
        y = outputs(posterior_predictive(model, POSTERIORS[posterior](), rows=rows), x, 4000)
        assert_mean(y, [2 * MEAN, 3 * MEAN])
        assert_mean((y[:, 0] - 2 * MEAN) * (y[:, 1] - 3 * MEAN), covariance)


def exact_kl(student, x):
    """The sum over rows of the KL of the predictive law of a row, which is Gaussian if the posterior is, to the student's."""
    p = dist.Normal(MEAN * x, (VARIANCE * x**2 + NOISE**2).sqrt())
    return torch.distributions.kl_divergence(p, dist.Normal(student.slope * x, student.log_width.exp())).sum()


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_gradient_is_that_of_the_exact_kl_and_varies_less_with_a_draw_for_each_row(posterior):
    """The student's rows are independent, so that only the laws of single rows matter. The KL is exact where it depends on two moments."""
    pyro.set_rng_seed(3)
    student, x = Student(), torch.linspace(-2, 2, 32)
    params = list(student.parameters())
    truth = torch.stack(torch.autograd.grad(exact_kl(student, x), params)).double()
    variances = []
    for rows in (None, len):
        teacher = posterior_predictive(model, POSTERIORS[posterior](), rows=rows)
        loss = SurrogateKD(["y"], fresh=[LATENT[posterior]])(student, teacher)
        found = gradients(loss, params, 200, x)
        assert_mean(found, truth)
        variances.append(found.var(0))
    assert (variances[1] < variances[0] / 2).all()


@pytest.mark.filterwarnings("ignore:the rows of")
def test_the_loss_is_the_kl_of_a_row_plus_what_the_draw_says_about_it():
    """The bound without the latent: KL of the marginal, and the mutual information of slope and y, known in closed form."""
    pyro.set_rng_seed(4)
    student, x = Student(), torch.full((50,), 2.0)
    loss = SurrogateKD(["y"], fresh=["slope"])(student, posterior_predictive(model, guide, rows=len))
    with torch.no_grad():
        found = torch.stack([loss(x) for _ in range(200)]) / 50
    information = 0.5 * math.log(1 + 4 * VARIANCE / NOISE**2)
    assert_mean(found, exact_kl(student, x).item() / 50 + information)


def test_a_student_with_the_same_draws_shares_their_index():
    samples = exact_samples()
    teacher = posterior_predictive(model, samples, rows=len)
    student = posterior_predictive(model, {"slope": samples["slope"] + 0.1}, rows=len)
    x = torch.full((10,), 2.0)
    found = SurrogateKD(["y"]).terms(student, teacher, x)
    assert list(found) == ["draw", "y"]
    assert found["draw"].value == 0
    torch.testing.assert_close(found["y"].value, torch.tensor(10 * 0.2**2 / (2 * NOISE**2)))  # all rows are off by 0.2


def test_a_student_with_the_same_latent_shares_the_guides_noise():
    def student(x):
        slope = pyro.sample("slope", dist.Normal(MEAN + 0.1, VARIANCE**0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, NOISE))

    teacher = posterior_predictive(model, guide)
    terms = SurrogateKD(["y"]).terms(student, teacher, torch.full((10,), 2.0))
    torch.testing.assert_close(terms["slope"].value, torch.tensor(0.1**2 / (2 * VARIANCE)))
    torch.testing.assert_close(terms["y"].value, torch.tensor(10 * 0.2**2 / (2 * NOISE**2)))


def test_the_error_about_a_student_without_the_draw_names_the_remedy():
    with pytest.raises(UnpairedSiteError, match=r"site 'draw' is in the teacher only.*fresh=\['draw'\]"):
        SurrogateKD(["y"]).loss(Student(), posterior_predictive(model, exact_samples()), X)
    with pytest.raises(UnpairedSiteError, match=r"site 'slope' is in the teacher only.*fresh=\['slope'\]"):
        SurrogateKD(["y"]).loss(Student(), posterior_predictive(model, guide), X)


AUTOGUIDES = {
    AutoNormal: ["slope_unconstrained"],
    AutoDiagonalNormal: ["_AutoDiagonalNormal_latent"],
    AutoMultivariateNormal: ["_AutoMultivariateNormal_latent"],
    AutoLowRankMultivariateNormal: ["_AutoLowRankMultivariateNormal_latent"],
    AutoDelta: ["slope"],
}


@pytest.mark.parametrize("rows", [None, len])
@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_autoguides(kind, rows):
    """What a student must declare fresh, and that the model is given what the guide draws."""
    made = kind(model)
    made(X, Y)
    teacher = posterior_predictive(model, made, rows=rows)
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rows or kind is AutoDelta else "ignore")
        report = check(SurrogateKD(["y"], fresh=AUTOGUIDES[kind]), Student(), teacher, X, try_capture=False)
    assert report.is_ok
    trace = poutine.trace(teacher).get_trace(X)
    assert trace.nodes["slope"]["value"].shape == (() if rows is None else (4,))
    torch.testing.assert_close(trace.nodes["y"]["fn"].mean, trace.nodes["slope"]["value"] * X)


def test_mcmc():
    pyro.set_rng_seed(6)
    mcmc = MCMC(NUTS(model), num_samples=40, warmup_steps=20, disable_progbar=True)
    mcmc.run(X, Y)
    teacher = posterior_predictive(model, mcmc, rows=len)
    index = poutine.trace(teacher).get_trace(X).nodes["draw"]["fn"]
    assert index.n == 40
    slopes = mcmc.get_samples()["slope"].double()
    y = outputs(teacher, torch.full((20_000,), 2.0), 1)[0]
    assert_mean(y, 2 * slopes.mean())
    assert_mean((y - 2 * slopes.mean()) ** 2, 4 * slopes.var(correction=0) + NOISE**2)


@pytest.mark.parametrize("make", [lambda p: posterior_predictive(p), lambda p: posterior_predictive(model, p)])
def test_a_predictive(make):
    drawn = make(Predictive(model, exact_samples()))
    assert poutine.trace(drawn).get_trace(X).nodes["draw"]["fn"].n == 4000
    guided = make(Predictive(model, guide=guide, num_samples=7))
    assert "slope" in poutine.trace(guided).get_trace(X).nodes


def test_draws_of_a_parallel_predictive_have_a_dimension_for_the_plate():
    samples = Predictive(model, guide=guide, num_samples=5, parallel=True)(X)["slope"]
    assert samples.shape == (5, 1)
    for rows in (None, len):
        trace = poutine.trace(posterior_predictive(model, {"slope": samples}, rows=rows)).get_trace(X)
        slopes = trace.nodes["y"]["fn"].mean / X
        assert torch.isclose(slopes[:, None], samples.flatten()).any(-1).all()


@pytest.mark.parametrize("loop", ["SVI", "compiled SVI", "Distiller"])
def test_a_student_learns_the_predictive_law(loop):
    pyro.set_rng_seed(7)
    student, x = Student(), torch.full((256,), 2.0)
    teacher, loss = posterior_predictive(model, exact_samples(), rows=len), SurrogateKD(["y"], fresh=["draw"])
    if loop == "Distiller":
        Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.05), loss).fit(x, steps=200, progress=False)
    else:
        svi = SVI(
            student, teacher, pyro.optim.Adam({"lr": 0.05}), loss.compile(backend=None) if "compiled" in loop else loss
        )
        assert len({svi.step(x) for _ in range(200)}) > 150
    assert abs(student.slope.item() - MEAN) < 0.1
    assert abs(student.log_width.exp().item() - (4 * VARIANCE + NOISE**2) ** 0.5) < 0.1


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("rows", [None, len])
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_vectorized_particles_have_their_own_draws(posterior, rows):
    pyro.set_rng_seed(8)
    student, x = Student(), torch.full((6,), 2.0)
    teacher, options = posterior_predictive(model, POSTERIORS[posterior](), rows=rows), {"fresh": [LATENT[posterior]]}
    one, many = (
        SurrogateKD(["y"], num_particles=count, vectorize_particles=count > 1, **options)(student, teacher)
        for count in (1, 50)
    )
    with torch.no_grad():
        singles, means = torch.stack([one(x) for _ in range(200)]), torch.stack([many(x) for _ in range(40)])
    error = (singles.var() / len(singles) + means.var() / len(means)).sqrt()
    assert abs(singles.mean() - means.mean()) < 5 * error
    assert means.std() < singles.std() / 3


def test_latents_of_new_rows_are_sites_of_the_teacher():
    def with_rows(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(slope * x, 1.0))
            pyro.sample("y", dist.Normal(z, NOISE))

    trace = poutine.trace(posterior_predictive(with_rows, exact_samples())).get_trace(X)
    assert [name for name in trace.nodes if name in ("draw", "slope", "z", "y")] == ["draw", "z", "y"]


def schools(schools):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", schools):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("effect", dist.Normal(theta, 1.0))


def test_latents_in_a_plate_of_the_model_have_one_draw_for_all_rows():
    samples = {"mu": torch.zeros(7), "theta": torch.arange(7.0)[:, None] + torch.tensor([0.0, 10.0, 20.0])}
    fn = poutine.trace(posterior_predictive(schools, samples)).get_trace(3).nodes["effect"]["fn"]
    torch.testing.assert_close(fn.mean - fn.mean[0], torch.tensor([0.0, 10.0, 20.0]))

    def guide(schools):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", schools):
            pyro.sample("theta", dist.Normal(torch.tensor([0.0, 10.0, 20.0]), 0.01))

    trace = poutine.trace(posterior_predictive(schools, guide)).get_trace(3)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["mu", "theta", "schools", "effect"]
    torch.testing.assert_close(trace.nodes["effect"]["fn"].mean, trace.nodes["theta"]["value"])


def test_a_guide_and_a_model_that_subsample_take_the_same_rows():
    def subsampled(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(slope, 1.0))
            pyro.sample("y", dist.Normal(z + x[rows], 1.0))

    def rows_guide(x):
        pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(100 * x[rows], 0.01))

    x = torch.arange(10.0)
    trace = poutine.trace(posterior_predictive(subsampled, rows_guide)).get_trace(x)
    rows = trace.nodes["data"]["value"]
    torch.testing.assert_close(trace.nodes["y"]["fn"].mean, 101 * x[rows], atol=0.1, rtol=0)


def test_the_teacher_keeps_its_draws_and_moves_with_them():
    samples = exact_samples()
    teacher = posterior_predictive(model, samples)
    samples["slope"].fill_(-100.0)
    assert poutine.trace(teacher).get_trace(X).nodes["y"]["fn"].mean[0] > 0
    teacher.to(torch.float64)
    assert poutine.trace(teacher).get_trace(X.double()).nodes["y"]["value"].dtype == torch.float64


# A plate of size 1.


@pytest.mark.parametrize("shape", [(7, 1), (7,), (7, 1, 1)], ids=["of its shape", "without its dimension", "of Predictive"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_latent_in_a_plate_of_size_1_keeps_its_dimension(shape, num_rows):
    """The model looks the latent up by the group of each row, as for any number of groups."""

    def groups(rows):
        with pyro.plate("groups", 1):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Normal(effect[torch.zeros(rows, dtype=torch.long)], NOISE))

    effects = torch.arange(7.0).reshape(shape)
    trace = poutine.trace(posterior_predictive(groups, {"effect": effects})).get_trace(num_rows)
    assert torch.equal(trace.nodes["y"]["fn"].loc, trace.nodes["draw"]["value"].expand(num_rows).float())


def test_rows_may_be_a_single_one():
    teacher = posterior_predictive(model, {"slope": torch.full((5, 1), 2.0)}, rows=len)
    assert poutine.trace(teacher).get_trace(torch.ones(1)).nodes["y"]["fn"].loc.tolist() == [2.0]
