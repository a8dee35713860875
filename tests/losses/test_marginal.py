"""The exact KL as a loss, against sums over all states: its value, its gradient, what it is trained and reported by, and its errors."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from models.helmholtz import HelmholtzMachine
from pyro_kd import Distiller, LocalKD, MarginalKD, SurrogateKD, check, freeze, site_report, to_inference_data
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
from pyro_kd.metrics import Estimate, marginal_kl, marginal_log_prob

ROWS = 64


class Coins(nn.Module):
    """Two latent bits, and two targets: y1 given the first bit, and y2 given y1 and the second, which depends on the first."""

    def __init__(self, seed, latents=2):
        super().__init__()
        torch.manual_seed(seed)
        self.z1, self.z2 = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(2))
        self.y1, self.y2 = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, 2))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.z1)).long()
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[z1])).long()
            z2 = pyro.sample("z2", dist.Bernoulli(logits=self.z2[z1])).long()
            pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, z2]))

    def table(self):
        """log p(y1, y2) by hand, of shape (2, 2)."""
        rows = []
        for y1, y2 in itertools.product([0.0, 1.0], repeat=2):
            terms = []
            for z1, z2 in itertools.product([0, 1], repeat=2):
                laws = [
                    (self.z1, z1),
                    (self.y1[z1], y1),
                    (self.z2[z1], z2),
                    (self.y2[int(y1), z2], y2),
                ]
                terms.append(sum(dist.Bernoulli(logits=a).log_prob(torch.tensor(float(b))) for a, b in laws))
            rows.append(torch.stack(terms).logsumexp(0))
        return torch.stack(rows).reshape(2, 2)

    def kl_from(self, teacher):
        p = teacher.table().detach()
        return (p.exp() * (p - self.table())).sum()


class Registered(Coins):
    """The same student, for Pyro's SVI."""

    def forward(self, rows):
        pyro.module("coins", self)
        super().forward(rows)


TARGETS = ["y1", "y2"]


def gradients(module, value):
    module.zero_grad()
    value.backward()
    return [param.grad.clone() for param in module.parameters()]


def sgd(params):
    return torch.optim.Adam(params, lr=0.05)


# Value and gradient.


def test_enumerated_targets_give_the_exact_kl_and_its_gradient():
    student, teacher = Coins(1), Coins(0)
    loss = MarginalKD(TARGETS, enumerate_targets=True)
    value, expected = loss(student, freeze(teacher))(ROWS), ROWS * student.kl_from(teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, by_hand in zip(gradients(student, value), gradients(student, expected), strict=True):
        assert torch.allclose(found, by_hand, rtol=1e-4, atol=1e-5)


def test_drawn_targets_give_an_unbiased_estimate_of_value_and_gradient():
    student, teacher = Coins(1), Coins(0)
    bound = MarginalKD(TARGETS)(student, freeze(teacher))
    exact = student.kl_from(teacher)
    by_hand = torch.cat([g.flatten() for g in gradients(student, exact)])
    values, found = [], []
    for _ in range(120):
        value = bound(ROWS)
        found.append(torch.cat([g.flatten() for g in gradients(student, value)]) / ROWS)
        values.append(value.item() / ROWS)
    estimate = Estimate.of(torch.tensor(values).double())
    assert abs(estimate.mean - exact.item()) < 5 * estimate.standard_error
    found = torch.stack(found)
    errors = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - by_hand).abs() <= 5 * errors + 1e-6).all()


def test_it_lies_below_both_bounds():
    student, teacher = Coins(3), freeze(Coins(2))
    exact = MarginalKD(TARGETS, enumerate_targets=True).loss(student, teacher, 1000)
    for loss in (SurrogateKD(TARGETS, latent_weight=0.0), LocalKD(TARGETS)):
        bounds = Estimate.of(torch.tensor([loss.loss(student, teacher, 1000) for _ in range(20)]).double())
        assert exact < bounds.mean + 5 * bounds.standard_error


def test_it_is_the_ratio_of_marginal_log_probs():
    torch.manual_seed(0)
    student, teacher = HelmholtzMachine(3).model, freeze(HelmholtzMachine(4).model)
    (particle,) = MarginalKD(["y1", "y2"]).particles(student, teacher, 20)
    data = {pair.name: pair.value for pair in particle.run.pairs}
    expected = (marginal_log_prob(teacher, data, 20) - marginal_log_prob(student, data, 20)).sum()
    assert sum(term.value for term in particle.terms).item() == pytest.approx(expected.item(), rel=1e-4)


def test_equal_laws_with_different_latents_have_loss_zero():
    """The student has one latent of three states and other names, in another coding; the law of the target is the same."""

    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1))
            pyro.sample("y", dist.Categorical(torch.eye(4)[z.sum(-1).long()] * 0.6 + 0.1))

    def student(rows):
        with pyro.plate("rows", rows):
            w = pyro.sample("w", dist.OneHotCategorical(torch.tensor([0.25, 0.5, 0.25])))
            pyro.sample("out", dist.OneHotCategorical(torch.eye(3, 4)[w.argmax(-1)] * 0.6 + 0.1))

    for options in ({}, {"enumerate_targets": True}):
        loss = MarginalKD(["y"], site_map={"out": "y"}, **options)
        assert loss.loss(student, teacher, 50) == pytest.approx(0.0, abs=1e-4)


def test_the_cross_entropy_has_the_same_gradient_for_any_teacher():
    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y1", dist.Bernoulli(logits=z))
            pyro.sample("y2", dist.Bernoulli(logits=-z))

    student = Coins(1)
    loss = MarginalKD(TARGETS, cross_entropy=True)
    (particle,) = loss.particles(student, teacher, 30)
    data = {pair.name: pair.value.long() for pair in particle.run.pairs}
    expected = -student.table()[data["y1"], data["y2"]].sum()
    assert loss.combine([particle]).item() == pytest.approx(expected.item(), rel=1e-5)
    for frozen in (freeze(Coins(0)),):
        pyro.set_rng_seed(0)
        one = gradients(student, MarginalKD(TARGETS)(student, frozen)(ROWS))
        pyro.set_rng_seed(0)
        other = gradients(student, loss(student, frozen)(ROWS))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
    whole = MarginalKD(TARGETS, cross_entropy=True, enumerate_targets=True).loss(student, Coins(0), 1)
    assert whole == pytest.approx(-(Coins(0).table().exp() * student.table()).sum().item(), rel=1e-5)


def test_a_long_chain_needs_the_memory_of_one_transition():
    """30 layers of 4 bits have 16^30 joint states. The law of y by matrix products."""

    def chain(seed, layers=30):
        torch.manual_seed(seed)
        weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(layers)]

        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z0", dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))
                for layer in range(1, layers):
                    z = pyro.sample(f"z{layer}", dist.Bernoulli(logits=(z - 0.5) @ weights[layer]).to_event(1))
                pyro.sample("y", dist.Bernoulli(logits=(z - 0.5) @ weights[0]).to_event(1))

        return model, weights

    def law(weights):
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
        p = torch.full((16,), 1 / 16)
        for weight in [*weights[1:], weights[0]]:
            p = p @ dist.Bernoulli(logits=((states - 0.5) @ weight).unsqueeze(1)).log_prob(states).sum(-1).exp()
        return p

    (teacher, theirs), (student, own) = chain(0), chain(1)
    exact = (law(theirs) * (law(theirs) / law(own)).log()).sum()
    value = MarginalKD(["y"], enumerate_targets=True, max_states=16**3 * 3)(student, freeze(teacher))(3)
    assert value.item() == pytest.approx(3 * exact.item(), rel=1e-3)
    (found,) = torch.autograd.grad(value, own[5])
    (by_hand,) = torch.autograd.grad(3 * exact, own[5])
    assert torch.allclose(found, by_hand, rtol=1e-2, atol=1e-5)


def test_a_global_latent_and_rows_of_latents():
    """A latent outside of the plate: the plate is one row of the marginal, and the loss is the KL of all its targets together."""

    def program(a, b):
        def model():
            z = pyro.sample("z", dist.Bernoulli(a))
            with pyro.plate("rows", 3):
                w = pyro.sample("w", dist.Bernoulli(0.2 + b * z))
                pyro.sample("y", dist.Bernoulli(0.1 + 0.7 * w))

        return model

    def law(a, b):
        total = []
        for y in itertools.product([0.0, 1.0], repeat=3):
            p = 0.0
            for z in (0, 1):
                w = 0.2 + b * z
                heads = 0.1 + 0.7 * w
                p = p + (a if z else 1 - a) * math.prod(heads if v else 1 - heads for v in y)
            total.append(p)
        return torch.tensor(total).double()

    p, q = law(0.3, 0.6), law(0.6, 0.3)
    exact = float((p * (p / q).log()).sum())
    loss, student, teacher = MarginalKD(["y"]), program(0.6, 0.3), program(0.3, 0.6)
    found = Estimate.of(torch.tensor([loss.loss(student, teacher) for _ in range(100)]).double())
    assert abs(found.mean - exact) < 5 * found.standard_error
    assert marginal_kl(student, teacher, ["y"]).num_samples == 1, "there is one row"


def test_a_subsampled_plate_scales_its_rows():
    teacher, student = Coins(0), Coins(1)

    def inner(coins):
        class Inner(Coins):
            def forward(self):
                with pyro.plate("all", 100, subsample_size=10):
                    z1 = pyro.sample("z1", dist.Bernoulli(logits=self.z1)).long()
                    y1 = pyro.sample("y1", dist.Bernoulli(logits=self.y1[z1])).long()
                    z2 = pyro.sample("z2", dist.Bernoulli(logits=self.z2[z1])).long()
                    pyro.sample("y2", dist.Bernoulli(logits=self.y2[y1, z2]))

        return Inner(coins)

    loss = MarginalKD(TARGETS, enumerate_targets=True)
    assert loss.loss(inner(1), inner(0)) == pytest.approx(100 * student.kl_from(teacher).item(), rel=1e-5)


def test_masked_elements_have_no_term():
    def program(heads):
        def model():
            with pyro.plate("rows", 4):
                z = pyro.sample("z", dist.Bernoulli(heads))
                with pyro.poutine.mask(mask=torch.tensor([True, False, True, False])):
                    pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

        return model

    p, q = 0.5, 0.62
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    loss, student, teacher = MarginalKD(["y"]), program(0.7), program(0.5)
    found = Estimate.of(torch.tensor([loss.loss(student, teacher) for _ in range(60)]).double())
    assert abs(found.mean - 2 * kl) < 5 * found.standard_error


def test_inputs_that_both_programs_observe_have_no_term():
    def program(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(weight, 1.0), obs=x)
                z = pyro.sample("z", dist.Bernoulli(logits=x))
                pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z))

        return model

    x = torch.linspace(-1, 1, 5)
    assert MarginalKD(["y"]).loss(program(3.0), program(0.0), x) == pytest.approx(0.0, abs=1e-5)


def test_point_masses_are_functions_of_other_sites():
    def program(logit):
        def model():
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Bernoulli(logits=logit))
                h = pyro.sample("h", dist.Delta(2 * z - 1))
                pyro.deterministic("twice", 2 * h)
                pyro.sample("y", dist.Bernoulli(logits=h))

        return model

    def heads(logit):
        return dist.Bernoulli(0.5).probs.new_tensor(logit).sigmoid() * math.tanh(0.5) + 1 / (1 + math.e)

    p, q = dist.Bernoulli(heads(0.3)), dist.Bernoulli(heads(-1.0))
    found = MarginalKD(["y"], enumerate_targets=True).loss(program(-1.0), program(0.3))
    assert found == pytest.approx(5 * torch.distributions.kl_divergence(p, q).item(), rel=1e-4)


# Training, capture, reports.


def test_svi_trains_it():
    student, teacher = Registered(1), freeze(Coins(0))
    svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.05}), loss=MarginalKD(TARGETS, enumerate_targets=True))
    first = svi.step(ROWS)
    for _ in range(80):
        svi.step(ROWS)
    assert svi.step(ROWS) < 0.1 * first


@pytest.mark.parametrize("options", [{}, {"compile": {"backend": None}}], ids=["eager", "captured"])
def test_distiller_trains_it(options):
    student, teacher = Coins(1), Coins(0)
    distiller = Distiller(student, freeze(teacher), sgd, MarginalKD(TARGETS), log_every=10, **options)
    before = student.kl_from(teacher).item()
    history = distiller.fit(ROWS, steps=100, progress=False)
    assert student.kl_from(teacher).item() < 0.2 * before
    assert {"term/y1", "term/y2"} <= set(history)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3}, {"enumerate_targets": True}, {"cross_entropy": True}])
def test_captured_it_equals_the_eager_loss(options):
    student, teacher = Coins(1), freeze(Coins(0))
    eager, captured = (MarginalKD(TARGETS, **options)(student, teacher) for _ in range(2))
    captured.compile(backend=None)
    for seed in range(3):
        found = []
        for module in (eager, captured):
            pyro.set_rng_seed(seed)
            value = module(ROWS)
            found.append((value.item(), gradients(student, value)))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_vectorized_particles_are_averaged():
    student, teacher = Coins(1), Coins(0)
    for options in ({"num_particles": 4}, {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 2}):
        loss = MarginalKD(TARGETS, enumerate_targets=True, **options)
        assert loss.loss(student, teacher, ROWS) == pytest.approx(ROWS * student.kl_from(teacher).item(), rel=1e-4)
    guessed = MarginalKD(TARGETS, num_particles=4, vectorize_particles=True, enumerate_targets=True)
    assert guessed.loss(student, teacher, ROWS) == pytest.approx(ROWS * student.kl_from(teacher).item(), rel=1e-4)
    assert guessed.max_plate_nesting == 2


def test_terms_follow_the_chain_rule():
    """The term of y1 is the KL of its own law, and that of y2 the rest."""
    student, teacher = Coins(1), Coins(0)
    terms = MarginalKD(TARGETS, enumerate_targets=True).terms(student, teacher, 10)
    p, q = (module.table().logsumexp(1).detach() for module in (teacher, student))
    first = 10 * float((p.exp() * (p - q)).sum())
    assert list(terms) == TARGETS
    assert terms["y1"].value.item() == pytest.approx(first, rel=1e-4)
    assert terms["y2"].value.item() == pytest.approx(10 * student.kl_from(teacher).item() - first, rel=1e-4)
    assert terms.loss.item() == pytest.approx(10 * student.kl_from(teacher).item(), rel=1e-5)
    assert terms["y1"].analytic is True
    drawn = MarginalKD(TARGETS).terms(student, teacher, 10)
    assert drawn["y2"].analytic is False
    assert sum(term.value.item() for term in drawn.values()) == pytest.approx(drawn.loss.item(), rel=1e-4)


def test_programs_with_their_targets_in_different_orders_have_one_term():
    def program(first, second):
        def model():
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample(first, dist.Bernoulli(0.2 + 0.5 * z))
            pyro.sample(second, dist.Bernoulli(0.7 - 0.3 * z))

        return model

    terms = MarginalKD(["a", "b"], enumerate_targets=True).terms(program("b", "a"), program("a", "b"))
    assert terms["a"].value == 0
    assert terms["b"].value == terms.loss != 0


def test_reports_and_checks_take_it():
    student, teacher = Coins(1), freeze(Coins(0))
    loss = MarginalKD(TARGETS)
    report = site_report(loss, student, teacher, ROWS, num_samples=5)
    assert [(row.name, row.mechanism, row.divergence) for row in report.rows] == [
        ("y1", "given", "kl"),
        ("y2", "given", "kl"),
    ]
    assert report.unit == "nats"
    assert report["y1"].gradient_norm > 0
    checked = check(loss, student, teacher, ROWS)
    assert checked.is_ok, checked
    assert checked.is_captured
    assert [site.name for site in checked.sites] == TARGETS
    assert not checked.unreached
    assert to_inference_data(loss, student, teacher, 8, num_samples=2) is not None


def test_the_check_before_training_reports_its_problems():
    def continuous(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("y1", dist.Bernoulli(logits=z))

    report = check(MarginalKD(["y1"]), continuous, Coins(0), ROWS)
    assert not report.is_ok
    assert "latent site 'z' is Normal, whose values cannot be enumerated" in report.errors[0].text


def test_its_options_are_shown():
    loss = MarginalKD(["y"], enumerate_targets=True, max_states=100)
    assert repr(loss) == "MarginalKD(targets=['y'], enumerate_targets=True, max_states=100)"


# Errors.


@pytest.mark.parametrize("name", ["latent_weight", "divergence", "latent_divergence", "latent_reduction", "fresh"])
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
    with pytest.raises(UnsupportedDivergenceError, match=r"has 70 latents.* at most 60 .*MultiSampleKD.*to_event"):
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
