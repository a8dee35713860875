"""Guides as programs: posterior distillation with Pyro's autoguides, easyguide, and hand-written amortised guides."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_feasible,
)
from pyro.optim import Adam
from torch import nn

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import UnpairedSiteError
from tests.support.inputs import X
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run, runs_of, values_of


def regression(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=x @ torch.tensor([1.0, -1.0]))


def perturbed(guide, amount):
    """A guide with parameters set to other values than those it starts from; its first call makes them."""
    guide(X)
    generator = torch.Generator().manual_seed(int(10 * amount))
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(amount * torch.randn(p.shape, generator=generator))
    return guide


def two_guides(make):
    """A student and a teacher of the same kind and the same names of parameters, which differ; and the teacher's frozen copy."""
    teacher = perturbed(make(regression), 0.3)
    frozen = freeze(teacher)
    pyro.clear_param_store()
    return perturbed(make(regression), 0.5), frozen, teacher


def posterior(guide):
    """The law of the unconstrained latents, detached."""
    with torch.no_grad():
        return guide.get_posterior()


# Guides with one auxiliary draw for all latents.

CONTINUOUS = [AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]


@pytest.mark.parametrize("make", CONTINUOUS, ids=lambda make: make.__name__)
@both
@particles
def test_gaussian_guides(loss, options, make):
    """The auxiliary draw as target: the term is the KL of the two Gaussians, in closed form, and trains every parameter."""
    student, frozen, teacher = two_guides(make)
    law = posterior(teacher)
    name = f"_{make.__name__}_latent"
    objective = loss([name], **options)
    terms = objective.terms(student, frozen, X)
    expected = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(mean_of(law), covariance_of(law)),
        torch.distributions.MultivariateNormal(mean_of(posterior(student)), covariance_of(posterior(student))),
    )
    assert values_of(terms) == pytest.approx({name: float(expected)}, rel=1e-3)
    assert terms[name].analytic is True
    objective.loss_and_grads(student, frozen, X)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


def mean_of(fn):
    return fn.mean.detach()


def covariance_of(fn):
    normal = isinstance(fn, dist.Independent)
    return (torch.diag(fn.variance) if normal else fn.covariance_matrix).detach()


@both
def test_the_latents_of_gaussian_guides_share_noise(loss):
    """Constrained values of the student's are its own map of the shared noise; of the local loss, the teacher's."""
    student, frozen, teacher = two_guides(AutoMultivariateNormal)
    law, own = posterior(teacher), posterior(student)
    run = only_run(loss(["_AutoMultivariateNormal_latent"]), student, frozen, X)
    (pair,) = run.pairs
    unconstrained = pair.value
    assert torch.allclose(run.student.nodes["w"]["value"], unconstrained[:2])  # given, as the auxiliary draw is the target
    run = only_run(loss(["w", "s"]), student, frozen, X)
    eps = torch.linalg.solve_triangular(law.scale_tril, (run.pairs[0].value - law.loc)[:, None], upper=False)
    through = own.loc + (own.scale_tril @ eps).squeeze(-1)
    expected = {SurrogateKD: through, LocalKD: run.pairs[0].value}[loss]
    assert torch.allclose(run.pairs[0].student_value, expected, atol=1e-4)
    terms = values_of(loss(["w", "s"]).terms(student, frozen, X))
    assert list(terms) == ["_AutoMultivariateNormal_latent", "w", "s"]


@both
@particles
def test_an_inverse_autoregressive_guide(loss, options):
    """No closed form: log densities at the teacher's draw, by the guides' own posteriors."""
    student, frozen, teacher = two_guides(lambda model: AutoIAFNormal(model, hidden_dim=[8], num_transforms=2))
    law = posterior(teacher)
    name = "_AutoIAFNormal_latent"
    objective = loss([name], max_plate_nesting=1, **options)
    pyro.set_rng_seed(6)
    terms = objective.terms(student, frozen, X)
    pyro.set_rng_seed(6)
    values = [run.pairs[0].value.clone() for run in runs_of(objective, student, frozen, X)]
    by_hand = sum((law.log_prob(v) - student.get_posterior().log_prob(v)).sum() for v in values) / objective.num_particles
    assert terms[name].analytic is False
    assert values_of(terms) == pytest.approx({name: float(by_hand.detach())}, rel=1e-3, abs=1e-3)
    objective.loss_and_grads(student, frozen, X)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())


# Guides by site.


def kl_normal(p, q):
    return float(torch.distributions.kl_divergence(p, q).sum().detach())


def by_site(guide, name):
    return dist.Normal(getattr(guide.locs, name), getattr(guide.scales, name))


@both
@particles
def test_auto_normal(loss, options):
    student, frozen, teacher = two_guides(AutoNormal)
    terms = loss(["w_unconstrained", "s_unconstrained"], **options).terms(student, frozen, X)
    expected = {f"{name}_unconstrained": kl_normal(by_site(teacher, name), by_site(student, name)) for name in "ws"}
    assert values_of(terms) == pytest.approx(expected, rel=1e-4)


@both
@particles
def test_auto_delta(loss, options):
    """Point estimates: squared distances in the space of the model, and their gradient."""
    student, frozen, teacher = two_guides(AutoDelta)
    w, s = teacher.w, teacher.s
    objective = loss(["w", "s"], **options)
    terms = objective.terms(student, frozen, X)
    expected = {"w": float((student.w - w).square().sum().detach()), "s": float((student.s - s).square().detach())}
    assert values_of(terms) == pytest.approx(expected, rel=1e-4)
    assert {term.divergence for term in terms.values()} == {"wasserstein2"}
    objective.loss_and_grads(student, frozen, X)
    assert torch.allclose(student.w.grad, 2 * (student.w - w).detach(), atol=1e-5)


def mixed(model):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["s"])))
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["w"])))
    return guide


@both
@particles
def test_a_list_of_guides(loss, options):
    student, frozen, teacher = two_guides(mixed)
    name = "_AutoGuideList.1_latent"
    terms = loss(["s", name], **options).terms(student, frozen, X)
    expected = {
        "s": float((student[0].s - teacher[0].s).square().detach()),
        name: kl_normal(posterior(teacher[1]), posterior(student[1])),
    }
    assert values_of(terms) == pytest.approx(expected, rel=1e-3)


def structured(model):
    return AutoStructured(model, conditionals={"w": "normal", "s": "normal"}, dependencies={"s": {"w": "linear"}})


@both
@particles
def test_a_structured_guide(loss, options):
    """Each latent has an auxiliary draw w_aux, s_aux ~ N(0, 1), and a Delta that depends on both by the parameters."""
    student, frozen, _ = two_guides(structured)
    with pytest.raises(UnpairedSiteError, match=r"targets=\['w', 's'\]"):
        loss(["w_aux", "s_aux"], max_plate_nesting=1, **options).loss_and_grads(student, frozen, X)
    objective = loss(["w", "s"], max_plate_nesting=1, **options)
    pyro.set_rng_seed(1)
    terms = values_of(objective.terms(student, frozen, X))
    pyro.set_rng_seed(1)
    runs = runs_of(objective, student, frozen, X)
    for name in ("w", "s"):
        points = [(run.student.nodes[name]["fn"], run.teacher.nodes[name]["value"]) for run in runs]
        squares = sum((_point(fn) - value).square().sum() for fn, value in points) / objective.num_particles
        assert terms[name] == pytest.approx(float(squares.detach()), rel=1e-4)
        assert terms[name] > 0 or loss is LocalKD


def _point(fn):
    while not isinstance(fn, dist.Delta):
        fn = fn.base_dist
    return fn.v


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (AutoNormal, ["w_unconstrained", "s_unconstrained"]),
        (AutoDiagonalNormal, ["_AutoDiagonalNormal_latent"]),
        (AutoDelta, ["w", "s"]),
    ],
    ids=["AutoNormal", "AutoDiagonalNormal", "AutoDelta"],
)
def test_a_guide_learns_the_posterior_of_a_different_guide_without_data(make, names):
    """The teacher was fitted to data; its student needs none of them, and no model."""
    pyro.set_rng_seed(1)
    teacher = make(regression, init_loc_fn=init_to_feasible)
    svi = SVI(regression, teacher, Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    for _ in range(50):
        svi.step(X)
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student = make(regression, init_loc_fn=init_to_feasible)
    distil = SVI(student, frozen, Adam({"lr": 0.05}), SurrogateKD(names))
    first = distil.step(X)
    for _ in range(150):
        last = distil.step(X)
    assert abs(last) < 0.1 * abs(first)


def test_a_guide_of_a_different_class_is_paired_by_site_map():
    """A diagonal student of a guide of full covariance: the closed form holds across the families."""
    teacher = perturbed(AutoMultivariateNormal(regression), 0.3)
    law = posterior(teacher)
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student = perturbed(AutoLowRankMultivariateNormal(regression, rank=1), 0.5)
    names = {"_AutoLowRankMultivariateNormal_latent": "_AutoMultivariateNormal_latent"}
    terms = SurrogateKD(list(names.values()), site_map=names).terms(student, frozen, X)
    own = posterior(student)
    expected = torch.distributions.kl_divergence(
        law, torch.distributions.MultivariateNormal(own.mean, own.covariance_matrix)
    )
    assert values_of(terms) == pytest.approx({names.popitem()[1]: float(expected.detach())}, rel=1e-3)


# Local latents in a subsampled plate.


def with_local_latents(data):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with rows_plate(data):
        batch = pyro.subsample(data, event_dim=0)
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=batch)


def rows_plate(data):
    return pyro.plate("rows", len(data), subsample_size=4, dim=-1)


@both
def test_local_latents_of_a_guide_in_a_subsampled_plate(loss):
    """create_plates: the guides' parameters of the drawn rows, the same in both, scaled up to all rows."""
    data = torch.arange(10.0)
    teacher = AutoNormal(with_local_latents, create_plates=rows_plate)
    teacher(data)
    frozen = freeze(teacher)
    pyro.clear_param_store()
    student = AutoNormal(with_local_latents, create_plates=rows_plate)
    student(data)
    with torch.no_grad():
        student.locs.z.copy_(torch.arange(10.0))
        frozen.program.locs.z.zero_()
    objective = loss(["z_unconstrained"], latent_weight=0.0)
    pyro.set_rng_seed(5)
    value = objective.loss_and_grads(student, frozen, data)
    pyro.set_rng_seed(5)
    run = only_run(objective, student, frozen, data)
    rows = run.teacher.nodes["rows"]["value"]
    assert torch.equal(run.student.nodes["rows"]["value"], rows)
    scale = float(student.scales.z.detach()[0])
    assert value == pytest.approx(10 / 4 * float((rows.float() / scale).square().sum()) / 2, rel=1e-4)
    expected = torch.zeros(10).index_put((rows,), 10 / 4 * rows.float() / scale**2)
    assert torch.allclose(student.locs.z.grad, expected, rtol=1e-4)


# Guides of one's own.


class Encoder(nn.Module):
    """An amortised posterior q(z | x), conditional on its argument."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x):
        loc, log_scale = self.net(x).unbind(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    def law(self, x):
        loc, log_scale = self.net(x).unbind(-1)
        return dist.Normal(loc, log_scale.exp())


@both
@particles
def test_an_amortised_posterior(loss, options):
    student, teacher = Encoder(3), Encoder(5)
    terms = loss(["z"], **options).terms(student, freeze(teacher), X)
    assert values_of(terms) == pytest.approx({"z": kl_normal(teacher.law(X), student.law(X))}, rel=1e-4)


def easy(loc):
    @easy_guide(regression)
    def guide(self, x):
        group = self.group(match="[ws]")
        group.sample("both", dist.Normal(loc + torch.zeros(group.event_shape), 1.0).to_event(1))

    return guide


@both
def test_an_easyguide_with_its_draw_as_target(loss):
    """The auxiliary draw covers the latents: 3 unconstrained numbers whose mean differs by 1."""
    run = only_run(loss(["both"]), easy(1.0), freeze(easy(0.0)), X)
    assert float(run.student.nodes["s"]["value"].log()) == pytest.approx(float(run.teacher.nodes["both"]["value"][2]))
    terms = values_of(loss(["both"]).terms(easy(1.0), freeze(easy(0.0)), X))
    assert terms["both"] == pytest.approx(1.5)


@both
def test_the_deltas_of_an_easyguide_are_covered_by_its_draw(loss):
    terms = values_of(loss(["both"]).terms(easy(1.0), freeze(easy(0.0)), X))
    assert list(terms) == ["both"]
