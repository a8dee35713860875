"""The terms of the losses: which sites have one, and how targets, reductions, scales, masks and pairing enter it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import Distiller, LocalKD, MultiSampleKD, freeze, site_report
from pyro_kd.divergences import wasserstein2
from tests.support.loss_programs import chain, vector_program
from tests.support.losses import SurrogateKD


@pytest.mark.filterwarnings("ignore:pyro.factor .* has no part in the loss")
def test_observed_sites_are_targets_and_only_the_shape_of_their_data_counts():
    def program(loc):
        def model(data):
            with pyro.plate("rows", len(data)):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=data)
                pyro.deterministic("twice", 2 * z)
                pyro.factor("potential", -z)

        return model

    loss = SurrogateKD()
    data = torch.full((5,), 1e6)
    terms = loss.terms(program(1.0), program(0.0), data)
    assert {name: term.kind for name, term in terms.items()} == {"z": "latent", "x": "target"}
    assert float(terms["x"].value) == pytest.approx(2.5)
    run = loss.particles(program(1.0), program(0.0), data)[0].run
    assert run.pairs[1].value.abs().max() < 100


def test_targets_by_name_and_by_predicate():
    teacher, student = chain(torch.zeros(4)), chain(torch.ones(4))
    assert SurrogateKD("x").terms(student, teacher)["x"].kind == "target"
    kinds = SurrogateKD(lambda site: site["name"] != "z1").terms(student, teacher)
    assert [term.kind for term in kinds.values()] == ["latent", "target", "target"]


def test_targets_do_not_need_shared_noise():
    def program(loc):
        def model():
            pyro.sample("count", dist.NegativeBinomial(5.0, loc))

        return model

    terms = SurrogateKD(["count"]).terms(program(torch.tensor(0.5)), program(torch.tensor(0.3)))
    assert terms["count"].analytic is False


def test_terms_add_up_to_the_loss():
    teacher, student = chain(torch.tensor([0.0, 1.0, -0.7, 2.0])), chain(torch.tensor([0.3, 0.8, -0.5, 1.5]))
    loss = SurrogateKD(["x"], latent_weight={"z1": 0.0, "z2": 3.0}, num_particles=2)
    pyro.set_rng_seed(5)
    terms = loss.terms(student, teacher)
    pyro.set_rng_seed(5)
    assert sum(term.weight * float(term.value) for term in terms.values()) == pytest.approx(loss.loss(student, teacher))
    assert list(terms) == ["z1", "z2", "x"]
    assert terms["z1"].weight == 0
    assert float(terms["z1"].value) == pytest.approx(50 * 0.3**2 / 2)
    assert all(term.analytic for term in terms.values())
    assert {term.divergence for term in terms.values()} == {"kl"}


def test_latent_reduction_mean_divides_by_the_event():
    teacher, _ = vector_program(4)
    loss = {r: SurrogateKD(["x"], latent_reduction=r) for r in ("sum", "mean")}

    def shifted(n=32):
        with pyro.plate("rows", n):
            pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(3), 0.5).to_event(1))

    values = {r: float(loss[r].terms(shifted, freeze(teacher))["z"].value) for r in loss}
    assert values["sum"] == pytest.approx(32.0)
    assert values["mean"] == pytest.approx(16.0)


def test_a_users_own_divergence():
    calls = []

    def absolute(p, q, value):
        calls.append(value.shape)
        return (p.mean - q.mean).abs()

    terms = SurrogateKD(["x"], divergence=absolute, latent_divergence=wasserstein2).terms(
        chain(torch.ones(4)), chain(torch.zeros(4))
    )
    assert terms["x"].divergence == "absolute"
    assert terms["x"].analytic is None
    assert terms["z1"].divergence == "wasserstein2"
    assert float(terms["z1"].value) == pytest.approx(50.0)
    assert calls == [torch.Size([50])]


def test_scale_and_mask_enter_as_in_an_elbo():
    mask = torch.arange(50) < 10

    def scaled(weight):
        return poutine.scale(poutine.mask(chain(weight), mask=mask), scale=3.0)

    plain = SurrogateKD(["x"], latent_weight=0.0)
    assert float(plain.terms(scaled(torch.ones(4)), scaled(torch.zeros(4)))["z1"].value) == pytest.approx(10 * 3.0 / 2)

    def masked_distribution(loc):
        def model():
            with pyro.plate("rows", 50):
                pyro.sample("x", dist.Normal(loc, 1.0).mask(mask))

        return model

    assert plain.loss(masked_distribution(1.0), masked_distribution(0.0)) == pytest.approx(5.0)


def test_subsampled_plates_share_indices_and_scale():
    data = torch.arange(100.0)

    def program(loc):
        def model():
            with pyro.plate("data", 100, subsample_size=10) as index:
                pyro.sample("x", dist.Normal(data[index] + loc, 1.0))

        return model

    for loss in (SurrogateKD(["x"]), LocalKD(["x"])):
        assert loss.loss(program(2.0), program(0.0)) == pytest.approx(100 * 2.0)


def test_delta_sites_are_compared_by_the_squared_distance():
    def program(shift):
        def model():
            feature = pyro.sample("feature", dist.Delta(torch.zeros(3) + shift, event_dim=1))
            pyro.sample("x", dist.Normal(feature.sum(), 1.0))

        return model

    terms = SurrogateKD(["x"]).terms(program(2.0), program(0.0))
    assert terms["feature"].divergence == "wasserstein2"
    assert float(terms["feature"].value) == pytest.approx(12.0)


def test_site_map_and_fresh_pair_sites_and_leave_them_alone():
    def teacher():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("mine", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    def student():
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        z = pyro.sample("latent", dist.Normal(1.0, 1.0))
        pyro.sample("output", dist.Normal(z, 1.0))

    for loss in (SurrogateKD, LocalKD):
        terms = loss(["x"], site_map={"latent": "z", "output": "x"}, fresh=["extra", "mine"]).terms(student, teacher)
        assert list(terms) == ["z", "x"]
        assert float(terms["z"].value) == pytest.approx(0.5)


def test_observed_sites_that_are_not_targets_are_inputs():
    """Both programs keep their value, and they have no term."""

    def program(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
                pyro.sample("y", dist.Normal(weight * x, 1.0))

        return model

    terms = SurrogateKD(["y"]).terms(program(2.0), program(1.0), torch.full((4,), 10.0))
    assert {name: term.value.item() for name, term in terms.items()} == {"y": pytest.approx(4 * 100 / 2)}


def test_a_conditioned_teacher_conditions_the_student():
    teacher, student = chain(torch.zeros(4)), chain(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    fixed = pyro.condition(teacher, data={"z2": torch.full((50,), 3.0)})
    terms = SurrogateKD(["x"]).terms(student, fixed)
    assert list(terms) == ["z1", "x"]
    assert terms["x"].value.item() == pytest.approx(50 * 3.0**2 / (2 * 0.5**2))


def test_deterministic_values_are_the_students_own():
    seen = {}

    def program(loc, label):
        def model():
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            seen[label] = pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(seen[label], 1.0))

        return model

    SurrogateKD(["x"]).loss(program(1.0, "student"), program(0.0, "teacher"))
    assert torch.allclose(seen["student"], seen["teacher"] + 2.0)


def test_autoguides_are_compared_at_their_auxiliary_sites():
    """Pyro's autoguides write each latent as a Delta of an auxiliary draw: only that draw has a term."""
    from pyro.infer.autoguide import AutoNormal

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    teacher, student = AutoNormal(model, init_scale=0.5), AutoNormal(model, init_scale=0.1)
    teacher()
    frozen = freeze(teacher)
    pyro.clear_param_store()
    terms = SurrogateKD(["a_unconstrained"]).terms(student, frozen)
    assert {name: term.kind for name, term in terms.items()} == {"a_unconstrained": "target", "b_unconstrained": "latent"}


def test_a_delta_beside_auxiliary_sites_keeps_its_term():
    def program(shift):
        def model():
            e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("feature", dist.Delta(torch.zeros(2) + shift, event_dim=1))
            pyro.sample("x", dist.Delta(e + shift))

        return model

    terms = SurrogateKD(["x"]).terms(program(2.0), program(0.0))
    assert list(terms) == ["e", "feature", "x"]
    assert terms["feature"].value.item() == pytest.approx(8.0)
    assert terms["x"].value.item() == pytest.approx(4.0)  # GAN distillation, Eq. 9


def test_a_latent_of_an_autoguide_can_be_a_target():
    from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.LogNormal(0.0, 1.0))

    for guide in (AutoNormal, AutoDiagonalNormal):
        pyro.clear_param_store()
        teacher = guide(model)
        teacher()
        frozen = freeze(teacher)
        pyro.clear_param_store()
        terms = SurrogateKD(["a", "b"]).terms(guide(model), frozen)
        assert [terms[name].kind for name in ("a", "b")] == ["target", "target"]


def test_fresh_sites_of_both_programs_have_no_term():
    def program(loc):
        def model():
            own = pyro.sample("own", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(0 * own, 1.0))
            return own

        return model

    for loss in (SurrogateKD(["x"], fresh=["own"]), LocalKD(["x"], fresh=["own"])):
        run = loss.particles(program(5.0), program(0.0))[0].run
        assert [pair.name for pair in run.pairs] == ["x"]
        teacher, student = run.teacher.nodes["own"]["value"], run.student.nodes["own"]["value"]
        assert not torch.allclose(student, teacher)
        assert not torch.allclose(student, teacher + 5.0)


def impossible(logit):
    """As in Pyro's AIR: where a is 0, b is too. The programs differ in a, so that the KL of b can be infinite."""

    def model(rows):
        with pyro.plate("rows", rows):
            a = pyro.sample("a", dist.Bernoulli(logits=logit))
            b = pyro.sample("b", dist.Bernoulli(torch.sigmoid(logit) * a))
            pyro.sample("x", dist.Normal(a + b + logit, 1.0))

    return model


@pytest.mark.parametrize(
    "loss",
    [MultiSampleKD(["x"], num_samples=4), SurrogateKD(["x"], latent_weight=0.0, teacher_forcing=0.0)],
    ids=["samples", "surrogate"],
)
def test_an_infinite_term_of_weight_0_is_shown_and_ends_nothing(loss):
    student, teacher = impossible(torch.tensor(-1.0, requires_grad=True)), freeze(impossible(torch.tensor(1.0)))
    terms = loss.terms(student, teacher, 200)
    assert terms["b"].value.isinf()
    assert terms["b"].weighted == 0
    assert terms.loss.isfinite()
    assert "inf" in repr(terms)
    assert "nan" not in repr(terms)
    assert "inf" in repr(site_report(loss, student, teacher, 200))


def test_an_infinite_term_of_weight_0_does_not_stop_a_fit():
    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(-1.0))

        def forward(self, rows):
            impossible(self.logit)(rows)

    distiller = Distiller(
        Student(),
        freeze(impossible(torch.tensor(1.0))),
        lambda params: torch.optim.Adam(params, lr=0.05),
        MultiSampleKD(["x"], num_samples=4),
        log_every=1,
    )
    history = distiller.fit(100, steps=4, progress=False)
    assert torch.tensor(history["loss"]).isfinite().all()
    assert torch.tensor(distiller.evaluate(100, num_samples=2).loss.mean).isfinite()
