"""Draws that floating point rounds to the border of their support: inside of it, with the right density, and 0 between equal laws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform, TanhTransform

from pyro_kd import LocalKD, freeze, record_noise, replay_noise
from pyro_kd.divergences import jensen_shannon, kl, reverse_kl
from tests.support.losses import SurrogateKD

ROWS = 20_000
COLD = torch.tensor(0.05)


def tensor(*values):
    return torch.tensor(values)


def relaxed(family, temperature):
    return lambda logits: family(torch.as_tensor(temperature, dtype=logits.dtype), logits=logits)


def image(*transforms):
    return lambda loc, scale: dist.TransformedDistribution(dist.Normal(loc, scale), list(transforms))


LOGITS = tensor(0.5, -0.3, 0.0, 0.2), tensor(0.0, 0.4, -0.2, 0.1)
MANY = torch.linspace(-1, 1, 50), torch.linspace(1, -1, 50)
BITS = tensor(3.0, -2.0), tensor(2.5, -1.0)
WIDE = (tensor(1.0), tensor(8.0)), (tensor(0.0), tensor(9.0))
SQUASH = AffineTransform(0.0, 3.0), TanhTransform()
CASES = {  # a family, the parameters of two of it, and what it is a one-to-one image of, where nothing rounds to a border
    "RelaxedOneHotCategorical": (relaxed(dist.RelaxedOneHotCategorical, 0.1), LOGITS[:1], LOGITS[1:], relaxed(ExpRelaxedCategorical, 0.1)),
    "RelaxedOneHotCategorical(cold)": (relaxed(dist.RelaxedOneHotCategorical, 0.01), LOGITS[:1], LOGITS[1:], relaxed(ExpRelaxedCategorical, 0.01)),
    "RelaxedOneHotCategorical(many)": (relaxed(dist.RelaxedOneHotCategorical, 0.1), MANY[:1], MANY[1:], relaxed(ExpRelaxedCategorical, 0.1)),
    "RelaxedOneHotCategoricalStraightThrough": (relaxed(dist.RelaxedOneHotCategoricalStraightThrough, 0.1), MANY[:1], MANY[1:], relaxed(ExpRelaxedCategorical, 0.1)),
    "RelaxedBernoulli": (relaxed(dist.RelaxedBernoulli, 0.05), BITS[:1], BITS[1:], relaxed(LogitRelaxedBernoulli, 0.05)),
    "RelaxedBernoulliStraightThrough": (relaxed(dist.RelaxedBernoulliStraightThrough, 0.05), BITS[:1], BITS[1:], relaxed(LogitRelaxedBernoulli, 0.05)),
    "tanh": (image(TanhTransform()), *WIDE, dist.Normal),
    "tanh with a cache": (image(TanhTransform(cache_size=1)), *WIDE, dist.Normal),
    "tanh of an affine map": (image(*SQUASH), *WIDE, dist.Normal),
    "sigmoid": (image(SigmoidTransform()), *WIDE, dist.Normal),
    "exp": (image(ExpTransform()), (tensor(-40.0), tensor(60.0)), (tensor(-30.0), tensor(50.0)), dist.Normal),
    "LogNormal": (dist.LogNormal, (tensor(-40.0), tensor(60.0)), (tensor(-30.0), tensor(50.0)), dist.Normal),
    "StudentT through tanh": (lambda df, scale: dist.TransformedDistribution(dist.StudentT(df, 0.0, scale), [TanhTransform()]), (tensor(3.0), tensor(5.0)), (tensor(4.0), tensor(6.0)), lambda df, scale: dist.StudentT(df, 0.0, scale)),
}  # fmt: skip
each = pytest.mark.parametrize(("family", "first", "second", "before"), CASES.values(), ids=CASES.keys())


def draw(fn, rows=ROWS):
    """Draws as a latent of a program has them."""
    with record_noise(), torch.no_grad(), pyro.plate("rows", rows, dim=-1 - len(fn.batch_shape)):
        return pyro.sample("x", fn)


@each
def test_draws_lie_in_the_support_and_estimates_are_those_before_rounding(family, first, second, before):
    p, q = family(*first), family(*second)
    value = draw(p)
    if not hasattr(value, "_unquantize"):
        assert p.support.check(value).all()
        assert q.log_prob(value).shape == value.shape[: value.dim() - len(p.event_shape)]  # with validation, no error
    found = kl(p, q, value)
    wide = [fn.to(torch.float64) if isinstance(fn, torch.Tensor) else fn for fn in (*first, *second)]
    p64, q64 = before(*wide[: len(first)]), before(*wide[len(first) :])
    x = p64.sample((ROWS,))
    right = p64.log_prob(x) - q64.log_prob(x)
    error = ((right.var(0) + found.double().var(0) if found.shape == right.shape else right.var(0) * 2) / ROWS).sqrt()
    exact = kl.is_exact(p, q)
    mean = found.double() if exact and found.shape != right.shape else found.double().mean(0)
    assert (mean - right.mean(0)).abs().le(5 * error + 1e-4).all(), (mean, right.mean(0), error)


@each
@pytest.mark.parametrize("divergence", [kl, reverse_kl, jensen_shannon], ids=lambda d: d.__name__)
def test_equal_laws_at_the_border_have_divergence_0(family, first, second, before, divergence):
    value = draw(family(*first))
    assert (divergence(family(*first), family(*first), value) == 0).all()


KEPT_INSIDE = {
    "Beta": lambda: dist.Beta(torch.full((3,), 1e-3), torch.full((3,), 1e-3)),
    "Dirichlet": lambda: dist.Dirichlet(torch.full((3,), 1e-3)),
    "Dirichlet(many)": lambda: dist.Dirichlet(torch.full((200,), 0.3)),
    "Kumaraswamy": lambda: dist.Kumaraswamy(torch.full((3,), 1e-3), torch.full((3,), 1e-3)),
    "Gamma": lambda: dist.Gamma(torch.full((3,), 1e-3), 1.0),
    "InverseGamma": lambda: dist.InverseGamma(torch.full((3,), 1e-3), 1.0),
    "Weibull": lambda: dist.Weibull(torch.ones(3), 1e-2),
    "Pareto": lambda: dist.Pareto(torch.ones(3), 1e-2),
    "LogitNormal": lambda: dist.TransformedDistribution(dist.Normal(torch.zeros(3), 50.0), [SigmoidTransform()]),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(4), torch.full((4,), 50.0)),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(logits=tensor(-80.0, 80.0)),
    "Uniform": lambda: dist.Uniform(tensor(0.0, 1e4), tensor(1.0, 1e4 + 0.01)),
    "AffineBeta": lambda: dist.AffineBeta(torch.full((3,), 1e-2), torch.full((3,), 1e-2), 2.0, 3.0),
    "FisherSnedecor": lambda: dist.FisherSnedecor(torch.full((3,), 1e-2), torch.full((3,), 1e-2)),
    "HalfCauchy": lambda: dist.HalfCauchy(torch.full((3,), 1e30)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(COLD, logits=torch.linspace(-3, 3, 50)),
}  # fmt: skip


@pytest.mark.parametrize("make", KEPT_INSIDE.values(), ids=KEPT_INSIDE.keys())
@pytest.mark.parametrize("targets", [["x"], ["y"]], ids=["target", "latent"])
def test_draws_with_extreme_parameters_lie_in_their_support(make, targets):
    def program():
        with pyro.plate("rows", 500):
            fn = make()
            x = pyro.sample("x", fn.to_event(len(fn.batch_shape)))
            assert x.isfinite().all()
            assert fn.support.check(x).all()
            return pyro.sample("y", dist.Normal(0.0, 1.0))

    with torch.no_grad():
        for divergence in (kl, jensen_shannon):
            assert SurrogateKD(targets, divergence=divergence, latent_divergence=divergence).loss(program, program) == 0


def kumaraswamy(a, b):
    return dist.Kumaraswamy(torch.tensor(a), torch.tensor(b))


def beta(a, b):
    return dist.Beta(torch.tensor(a), torch.tensor(b))


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (kumaraswamy(1e-3, 1.0), kumaraswamy(2e-3, 1.0)),
        (beta(1e-3, 1.0), kumaraswamy(2e-3, 1.0)),
        (kumaraswamy(1e-3, 1.0), beta(2e-3, 1.0)),
        (kumaraswamy(1.0, 1e-3), kumaraswamy(1.0, 2e-3)),
        (beta(1.0, 1e-3), kumaraswamy(1.0, 2e-3)),
        (kumaraswamy(1.0, 1e-3), beta(1.0, 2e-3)),
    ],
    ids=["Kumaraswamy at 0", "Beta, Kumaraswamy at 0", "Kumaraswamy, Beta at 0", "Kumaraswamy at 1", "Beta, Kumaraswamy at 1", "Kumaraswamy, Beta at 1"],
)  # fmt: skip
def test_values_near_the_border_keep_their_logarithm(p, q):
    """Densities a x^(a - 1), or those of 1 - x, with a of 1e-3 and 2e-3: the KL is log(1 / 2) + 2 - 1; most draws round to the border."""
    found = kl(p, q, draw(p))
    right = 1 - math.log(2)
    assert abs(float(found.mean()) - right) < 5 * float(found.std()) / ROWS**0.5


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_squashed_latents_have_the_closed_form_of_gaussians(loss):
    """A cache in a transform is no parameter of it: the closed form of the Gaussians holds, and a wide one rounds to 1 without NaN."""

    class Squashed(torch.nn.Module):
        def __init__(self, loc, cache_size, scale=1.0):
            super().__init__()
            self.loc, self.scale, self.cache_size = torch.nn.Parameter(torch.tensor(loc)), scale, cache_size

        def forward(self):
            with pyro.plate("rows", 10):
                squash = TanhTransform(cache_size=self.cache_size)
                z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(self.loc, self.scale), [squash]))
                pyro.sample("x", dist.Normal(z, 1.0))

    for cache_size in (0, 1):
        term = loss(["x"]).terms(Squashed(1.0, cache_size), freeze(Squashed(0.0, cache_size)))["z"]
        assert term.analytic
        assert term.value.item() == pytest.approx(10 * 0.5)
        assert loss(["x"]).loss(Squashed(0.5, cache_size, 9.0), freeze(Squashed(0.5, cache_size, 9.0))) == 0


FLOWS = {
    "planar": lambda: dist.transforms.Planar(3),
    "affine coupling": lambda: dist.transforms.affine_coupling(3, [8]),
    "spline": lambda: dist.transforms.Spline(3),
    "affine autoregressive": lambda: dist.transforms.affine_autoregressive(3, [8]),
    "batch norm": lambda: dist.transforms.BatchNorm(3).eval(),
    "matrix exponential": lambda: dist.transforms.MatrixExponential(3),
    "spline coupling": lambda: dist.transforms.spline_coupling(3, hidden_dims=[8]),
    "householder": lambda: dist.transforms.Householder(3, 2),
}


class Flow(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        pyro.set_rng_seed(5)
        self.flow, self.loc = make(), torch.nn.Parameter(torch.zeros(3))

    def forward(self):
        with pyro.plate("rows", 20):
            z = pyro.sample(
                "z", dist.TransformedDistribution(dist.Normal(self.loc, 1.0).to_event(1), [self.flow, SigmoidTransform()])
            )
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "planar"])
@pytest.mark.parametrize("targets", [["x"], ["z"]], ids=["latent", "target"])
def test_flows_with_equal_weights_have_loss_0(name, targets):
    """The teacher's density by its cached pre-image and the student's by the inverse would differ by rounding."""
    student, teacher = Flow(FLOWS[name]), freeze(Flow(FLOWS[name]))
    is_trained = name != "matrix exponential"  # torch multiplies batches otherwise by a matrix that requires a gradient
    teacher()  # after which its parameters require none
    for divergence in (kl, jensen_shannon):
        loss = SurrogateKD(targets, latent_weight=1.0, divergence=divergence, latent_divergence=divergence)
        with torch.set_grad_enabled(is_trained):
            terms = loss.terms(student.requires_grad_(is_trained), teacher)
        assert all(term.value.item() == 0 for term in terms.values())


def test_the_density_of_a_flow_without_inverse_uses_the_steps_of_the_draw():
    """Of the teacher alone, to a student whose density needs none."""
    flow = FLOWS["planar"]()
    p, q = (
        dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow]),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
    )
    x = torch.randn(50, 3)
    y = flow(x)
    right = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - flow.log_abs_det_jacobian(x, y) - q.log_prob(y)
    with record_noise() as noise, torch.no_grad():
        pyro.sample("y", q, sample_shape=torch.Size([50]))
    draws = tuple(type(d)(d.law, x, d.op) for d in noise["y"])
    with replay_noise(noise={"y": draws}), torch.no_grad():
        value = pyro.sample("y", p, sample_shape=torch.Size([50]))
    torch.testing.assert_close(kl(p, q, value), right)


def logit_normal(loc, scale):
    return dist.TransformedDistribution(dist.Normal(torch.tensor(loc), torch.tensor(scale)), [SigmoidTransform()])


def in_plate(fn):
    def program():
        with pyro.plate("rows", ROWS):
            pyro.sample("x", fn)

    return program


def by_logit(p, q):
    """The KL of two laws on (0, 1) by a sum over logits, log(x / (1 - x)), each law given as a function of both logarithms."""
    logit = torch.linspace(-20_000, 20_000, 4_000_001, dtype=torch.float64)
    log, log1m = -torch.nn.functional.softplus(-logit), -torch.nn.functional.softplus(logit)
    log_p, log_q = p(logit, log, log1m), q(logit, log, log1m)
    return float((log_p.exp() * (log_p - log_q)).sum() * (logit[1] - logit[0]))


def beta_of_logit(a):
    norm = 2 * math.lgamma(a) - math.lgamma(2 * a)
    return lambda logit, log, log1m: a * log + a * log1m - norm


def normal_of_logit(scale):
    return lambda logit, log, log1m: -((logit / scale) ** 2) / 2 - math.log(scale) - math.log(2 * math.pi) / 2


@pytest.mark.parametrize(
    ("p", "q", "right"),
    [
        (beta(1e-3, 1.0), kumaraswamy(2e-3, 1.0), lambda: 1 - math.log(2)),
        (kumaraswamy(1.0, 1e-3), beta(1.0, 2e-3), lambda: 1 - math.log(2)),
        (beta(1e-3, 1e-3), logit_normal(0.0, 1000.0), lambda: by_logit(beta_of_logit(1e-3), normal_of_logit(1000.0))),
        (logit_normal(0.0, 1000.0), beta(1e-3, 1e-3), lambda: by_logit(normal_of_logit(1000.0), beta_of_logit(1e-3))),
    ],
    ids=["Beta, Kumaraswamy", "Kumaraswamy, Beta", "Beta, LogitNormal", "LogitNormal, Beta"],
)
def test_estimates_between_families_near_the_border_are_those_before_rounding(p, q, right):
    """At a target, whose draws are Pyro's own but for these families."""
    pyro.set_rng_seed(0)
    with torch.no_grad():
        found = torch.tensor([SurrogateKD(["x"]).loss(in_plate(q), in_plate(p)) / ROWS for _ in range(10)])
    assert abs(found.mean() - right()) < 7 * found.std() / 10**0.5  # Student's t of nine degrees, at 5e-5


ROUNDED = {
    "Gamma, LogNormal": (lambda: dist.Gamma(1e-3, torch.tensor(1.0)), lambda: dist.LogNormal(torch.tensor(-1e3), 1e3)),
    "Weibull, LogNormal": (lambda: dist.Weibull(1.0, torch.tensor(0.03)), lambda: dist.LogNormal(torch.tensor(-30.0), 30.0)),
    "Dirichlet, LogisticNormal": (lambda: dist.Dirichlet(tensor(1e-3, 1e-3, 1.0)), lambda: dist.LogisticNormal(torch.zeros(2), 100.0 * torch.ones(2))),
    "FisherSnedecor": (lambda: dist.FisherSnedecor(torch.tensor(0.01), 1.0), lambda: dist.FisherSnedecor(torch.tensor(0.02), 1.0)),
    "tanh, Uniform": (lambda: dist.TransformedDistribution(dist.Normal(torch.tensor(0.0), 50.0), [TanhTransform()]), lambda: dist.Uniform(torch.tensor(-2.0), 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_an_estimate_that_rounding_biases_warns(name):
    p, q = ROUNDED[name]
    with torch.no_grad():
        for divergence in (kl, jensen_shannon):
            with pytest.warns(UserWarning, match=f"site 'x': the estimate of {divergence.__name__} is biased: .*float64"):
                SurrogateKD(["x"], divergence=divergence).loss(in_plate(q()), in_plate(p()))
        assert SurrogateKD(["x"]).loss(in_plate(p()), in_plate(p())) == 0  # and equal laws have equal densities also there


def test_an_estimate_from_draws_inside_does_not_warn():
    p, q = dist.Gamma(torch.tensor(0.5), 1.0), dist.LogNormal(torch.tensor(0.0), 1.0)
    with torch.no_grad():
        assert SurrogateKD(["x"]).loss(in_plate(q), in_plate(p)) > 0
