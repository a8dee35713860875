"""Batch dimensions without a plate, as in programs written for MCMC: independent draws, whose terms are summed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import LocalKD, bound_report, freeze, site_report
from pyro_kd.divergences import kl, wasserstein2
from pyro_kd.errors import PlateMismatchError
from pyro_kd.metrics import marginal_kl, marginal_log_prob
from tests.support.losses import SurrogateKD

both = pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


class Horseshoe(nn.Module):
    """Weights of a regression with shrinkage priors, with or without ``to_event``."""

    def __init__(self, scale, declared=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.rank = int(declared)

    def forward(self, x):
        width = pyro.sample("width", dist.HalfCauchy(torch.ones(4)).to_event(self.rank))
        weight = pyro.sample("weight", dist.Normal(torch.zeros(4), self.scale * width).to_event(self.rank))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 0.5))


@both
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 3}, {"latent_divergence": wasserstein2}], ids=["one", "particles", "wasserstein2"]
)
def test_undeclared_dimensions_have_the_loss_of_declared_ones(kind, options):
    values, gradients = [], []
    for declared in (True, False):
        student, teacher = Horseshoe(2.0, declared), freeze(Horseshoe(1.0, declared))
        pyro.set_rng_seed(0)
        loss = kind(["y"], latent_weight={"width": 0.0, "weight": 0.5}, **options)(student, teacher)(X)
        loss.backward()
        values.append(float(loss.detach()))
        gradients.append(float(student.scale.grad))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-5)
    assert kind(["y"]).loss(Horseshoe(1.0), freeze(Horseshoe(1.0)), X) == 0.0


@both
def test_each_element_of_an_undeclared_dimension_counts_once(kind):
    terms = kind(["y"]).terms(Horseshoe(2.0), freeze(Horseshoe(1.0)), X)
    one = float(kl(dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0), torch.tensor(0.0)))
    assert float(terms["weight"].value.detach()) == pytest.approx(4 * one, rel=1e-4)
    assert terms["width"].value == 0


def program(loc):
    """A batch dimension left of a plate, and a target without a plate."""

    def model():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Normal(loc, torch.ones(3, 1)))
        pyro.sample("x", dist.Normal(z, 1.0))

    return model


@both
def test_an_undeclared_dimension_next_to_a_plate_counts_once(kind):
    terms = kind(["x"]).terms(program(1.0), program(0.0))
    expected = {"z": 15 * 0.5, "x": {SurrogateKD: 15 * 0.5, LocalKD: 0.0}[kind]}
    assert {name: float(term.value) for name, term in terms.items()} == pytest.approx(expected)


@both
@pytest.mark.parametrize("validation", [True, False])
def test_vectorized_particles_with_undeclared_dimensions_are_an_error(kind, validation):
    loss = kind(["x"], num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    with (
        pyro.validation_enabled(validation),
        pytest.raises(PlateMismatchError, match="'z' has batch shape .* no plate for dimension -2"),
    ):
        loss.loss(program(1.0), program(0.0))
    assert kind(["x"], num_particles=3).loss(program(0.0), program(0.0)) == 0.0
    assert kind(["x"], num_particles=1, vectorize_particles=True).loss(program(0.0), program(0.0)) == 0.0


def test_programs_with_undeclared_dimensions_compile_and_train():
    student = Horseshoe(2.0)
    module = SurrogateKD(["y"], latent_weight={"width": 0.0, "weight": 1.0})(student, freeze(Horseshoe(1.0)))
    module.compile(backend=None)
    pyro.set_rng_seed(1)
    compiled = float(module(X).detach())
    pyro.set_rng_seed(1)
    eager = SurrogateKD(["y"], latent_weight={"width": 0.0, "weight": 1.0}).loss(student, module.teacher, X)
    assert compiled == pytest.approx(eager, rel=1e-5)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        LocalKD(["y"])(student, module.teacher)(X).backward()
        optimiser.step()
    assert float(student.scale.detach()) == pytest.approx(1.0, abs=0.05)


def test_reports_work_with_undeclared_dimensions():
    report = site_report(SurrogateKD(["y"]), Horseshoe(2.0), freeze(Horseshoe(1.0)), X, num_samples=2)
    assert report["weight"].batch_shape == (4,)
    bounds = bound_report(Horseshoe(2.0), freeze(Horseshoe(1.0)), ["y"], X, num_samples=2)
    assert bounds.rows == 1
    assert bounds.exact is None


@pytest.mark.parametrize("site", ["z", "y"])
def test_enumeration_requires_that_every_dimension_is_declared(site):
    """An undeclared dimension could not be told apart from that of enumerated states."""

    def model(heads=0.5):
        sizes = {"z": (), "y": ()} | {site: (2,)}
        z = pyro.sample("z", dist.Bernoulli(torch.full(sizes["z"], heads)))
        pyro.sample("y", dist.Bernoulli((0.2 + 0.6 * z).expand(torch.broadcast_shapes(sizes["y"], z.shape))))

    with pytest.raises(PlateMismatchError, match=rf"'{site}' has batch shape \(2,\)"):
        marginal_log_prob(model, {"y": torch.zeros(2)})
    with pytest.raises(PlateMismatchError, match="batch shape"):
        marginal_kl(model, model, "y")
    assert "batch shape (2,)" in bound_report(model, model, ["y"]).reasons["exact"]
