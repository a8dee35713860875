"""Targets that keep the data (Eq. 2): both programs continue from the data's history, and their distributions are compared."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_kd import LocalKD, check, freeze, site_report, to_inference_data
from pyro_kd.divergences import cross_entropy, jensen_shannon, kl, wasserstein2
from pyro_kd.errors import ObservedValueError, UnknownTargetError, UnsupportedDivergenceError
from pyro_kd.metrics import Estimate
from tests.support.captured import outcome
from tests.support.estimates import assert_within
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run

ROWS = torch.linspace(-1.0, 2.0, 6).reshape(2, 3)
TARGETS = ["y0", "y1", "y2"]


def sequence(weight, latent=False, family=dist.Normal):
    """y_0 -> y_1 -> y_2 over two rows, with a latent z_t before each y_t if wanted; ``data`` has shape (rows, 3)."""

    def model(data=None):
        num = 2 if data is None else len(data)
        before = torch.zeros(num)
        with pyro.plate("rows", num):
            for t in range(3):
                loc = weight * before
                if latent:
                    loc = loc + pyro.sample(f"z{t}", dist.Normal(weight * before, 1.0))
                before = pyro.sample(f"y{t}", family(loc, 0.5), obs=None if data is None else data[:, t])
        return before

    return model


def on_data(targets=TARGETS, kind=SurrogateKD, **options):
    return kind(targets, target_values="data", **options)


def test_each_conditional_is_compared_given_the_datas_history():
    """KL(N(a y, s^2) || N(b y, s^2)) = (a - b)^2 y^2 / (2 s^2), with y the data before; no draw is needed."""
    terms = on_data().terms(sequence(0.3), sequence(0.8), ROWS)
    history = torch.cat([torch.zeros(2, 1), ROWS[:, :2]], 1)
    expected = (0.5 * history).square().sum(0) / (2 * 0.5**2)
    assert_close(torch.stack([term.value for term in terms.values()]), expected)
    assert all(term.analytic for term in terms.values())
    for _ in range(3):
        assert on_data().loss(sequence(0.3), sequence(0.8), ROWS) == pytest.approx(float(expected.sum()))


def test_word_level_distillation_is_torchs_kl_on_the_datas_prefixes():
    words = torch.randint(5, (4, 7))

    def language_model(table):
        def model(words):
            with pyro.plate("rows", len(words)):
                before = torch.zeros(len(words), dtype=torch.long)
                for t in range(words.shape[1]):
                    before = pyro.sample(f"w{t}", dist.Categorical(logits=table[before]), obs=words[:, t])

        return model

    p, q = torch.randn(5, 5), torch.randn(5, 5)
    before = torch.cat([torch.zeros(4, 1, dtype=torch.long), words[:, :-1]], 1)
    inputs, target = q[before].log_softmax(-1), p[before].log_softmax(-1)
    expected = torch.nn.functional.kl_div(inputs, target, reduction="sum", log_target=True)
    found = SurrogateKD(target_values="data").loss(language_model(q), language_model(p), words)
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_both_programs_keep_the_data_and_latents_are_drawn(kind):
    run = only_run(on_data(kind=kind), sequence(0.3, latent=True), sequence(0.8, latent=True), ROWS)
    for t in range(3):
        latent, target = run.pairs[2 * t : 2 * t + 2]
        assert (latent.name, target.name) == (f"z{t}", f"y{t}")
        assert target.is_data
        assert not latent.is_data
        assert_close(target.value, ROWS[:, t])
        assert_close(target.student_value, ROWS[:, t])
        history = ROWS[:, t - 1] if t else torch.zeros(2)
        assert_close(latent.p.loc, 0.8 * history)
        assert_close(latent.q.loc, 0.3 * history)
        assert latent.is_given is (kind is LocalKD)


def test_a_student_that_observes_nothing_is_given_the_data():
    teacher = sequence(0.8)
    loss = on_data()
    expected = loss.loss(sequence(0.3), teacher, ROWS)
    assert loss.loss(lambda data: sequence(0.3)(), teacher, ROWS) == pytest.approx(expected)


def far(loc, scale):
    """A location far from that of the other family tests."""
    return dist.StudentT(5.0, loc, scale)


@pytest.mark.parametrize("divergence", [kl, jensen_shannon, cross_entropy])
def test_an_estimate_takes_a_draw_of_the_teacher_and_not_the_data(divergence):
    """StudentT against Normal has no closed form: against quadrature, with data that are no draws of the teacher."""
    data = torch.full((1000, 3), 40.0)
    loss = on_data(divergence=divergence)
    student, teacher = sequence(0.9, family=dist.Normal), sequence(0.9, family=far)
    terms = [loss.terms(student, teacher, data)["y1"].value / 1000 for _ in range(20)]
    x = torch.linspace(-100.0, 100.0, 400_001, dtype=torch.float64)
    log_p = dist.StudentT(5.0, 0.0, 0.5).log_prob(x)
    log_q = dist.Normal(0.0, 0.5).log_prob(x)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    truth = {
        kl: p * (log_p - log_q),
        cross_entropy: -p * log_q,
        jensen_shannon: 0.5 * p * (log_p - log_m) + 0.5 * q * (log_q - log_m).nan_to_num(),
    }[divergence]
    assert_within(Estimate.of(torch.stack(terms).double()), float(torch.trapezoid(truth, x)))


def test_the_gradient_is_that_of_the_conditionals_on_the_data():
    weight = torch.tensor(0.3, requires_grad=True)
    on_data()(sequence(weight), freeze(sequence(torch.tensor(0.8))))(ROWS).backward()
    history = torch.cat([torch.zeros(2, 1), ROWS[:, :2]], 1)
    assert_close(weight.grad, ((0.3 - 0.8) * history.square()).sum() / 0.5**2)


def test_missing_data_under_a_mask_stay_out():
    seen = torch.tensor([True, False])
    data = torch.tensor([1.5, float("nan")])

    def program(weight):
        def model(data):
            with pyro.plate("rows", 2), poutine.mask(mask=seen):
                y = pyro.sample("y", dist.Normal(weight, 1.0), obs=data)
                pyro.sample("x", dist.Normal(weight * y.nan_to_num(), 1.0), obs=data)

        return model

    terms = on_data(["y", "x"]).terms(program(2.0), program(1.0), data)
    assert_close(terms["y"].value, torch.tensor(0.5))
    assert_close(terms["x"].value, torch.tensor(1.5**2 / 2))


def test_what_follows_masked_data_is_given_the_data():
    data = torch.tensor([1.0, 3.0])

    def program(weight):
        def model(data):
            with pyro.plate("rows", 2):
                with poutine.mask(mask=torch.tensor([True, False])):
                    y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=data)
                pyro.sample("x", dist.Normal(weight * y, 1.0), obs=data)

        return model

    terms = on_data(["y", "x"]).terms(program(2.0), program(1.0), data)
    assert_close(terms["x"].value, data.square().sum() / 2)


def test_point_masses_keep_their_distance():
    def program(loc):
        def model(data):
            with pyro.plate("rows", 2):
                pyro.sample("y", dist.Delta(loc.expand(2)), obs=data)

        return model

    loss = on_data(["y"], divergence=wasserstein2)
    assert loss.loss(program(torch.tensor(2.0)), program(torch.tensor(0.5)), ROWS[:, 0]) == pytest.approx(2 * 1.5**2)


@pytest.mark.parametrize("options", [{"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}])
def test_particles_average_over_the_latents(options):
    loss = on_data(latent_weight=0.0, **options)
    run = loss.particles(sequence(0.3, latent=True), sequence(0.8, latent=True), ROWS)[0].run
    target = run.pairs[-1]
    assert_close(target.value, ROWS[:, 2])
    plain, data = on_data(latent_weight=0.0), ROWS.repeat(100, 1)
    found, expected = (
        Estimate.of(torch.tensor([each.loss(sequence(0.3, True), sequence(0.8, True), data) for _ in range(20)]))
        for each in (loss, plain)
    )
    error = (found.standard_error**2 + expected.standard_error**2) ** 0.5
    assert abs(found.mean - expected.mean) < 5 * error


@pytest.mark.parametrize("family", [dist.Normal, far])
def test_a_compiled_loss_equals_an_eager_one(one_thread, family):
    weight = torch.nn.Parameter(torch.tensor(0.3))
    student, teacher = sequence(weight, latent=True), freeze(sequence(torch.tensor(0.8), latent=True, family=family))
    eager, captured = on_data()(student, teacher), on_data()(student, teacher)
    captured.compile(backend=None)
    for rows in (ROWS, 2 * ROWS):
        assert_close(outcome(captured, rows), outcome(eager, rows))


def test_reports_show_the_terms_on_the_data():
    student, teacher, loss = sequence(torch.nn.Parameter(torch.tensor(0.3))), sequence(torch.tensor(0.8)), on_data()
    expected = {name: float(term.value.detach()) for name, term in loss.terms(student, teacher, ROWS).items()}
    report = check(loss, student, teacher, ROWS)
    assert report.is_ok
    assert {site.name: site.term for site in report.sites} == pytest.approx(expected)
    rows = {row.name: row.term.mean for row in site_report(loss, student, teacher, ROWS, num_samples=2).sites}
    assert rows == pytest.approx(expected)


def test_inference_data_have_the_teachers_draws_and_the_terms_on_the_data():
    student, teacher, loss = sequence(0.3), sequence(0.8), on_data()
    found = to_inference_data(loss, student, teacher, ROWS, num_samples=4)
    expected = loss.terms(student, teacher, ROWS)
    for name in TARGETS:
        assert float(found.teacher["prior_predictive"][name].std()) > 0
        terms = torch.as_tensor(found.student["sample_stats"][name].values)
        assert_close(terms, expected[name].value.expand_as(terms).to(terms))


def test_targets_without_data_are_an_error():
    with pytest.raises(ObservedValueError, match=r"target_values='data'.*teacher draws 'y0', 'y1', 'y2'.*obs=data"):
        on_data().loss(sequence(0.3), sequence(0.8))
    with pytest.raises(ObservedValueError, match=r"needs data at every target, but the teacher observes no site"):
        on_data(None).loss(sequence(0.3), sequence(0.8))
    with pytest.raises(UnknownTargetError, match="target 'y3' is not a sample site of the teacher"):
        on_data(["y3"]).loss(sequence(0.3), sequence(0.8), ROWS)
    report = check(on_data(), sequence(torch.tensor(0.3, requires_grad=True)), sequence(0.8))
    assert "target_values='data' needs data" in report.errors[0].text


def test_data_that_differ_between_the_programs_are_an_error():
    with pytest.raises(ObservedValueError, match="'y0'.*differs between teacher and student"):
        on_data().loss(lambda data: sequence(0.3)(data + 1), sequence(0.8), ROWS)


def test_an_estimate_without_a_sampler_is_an_error():
    class Unsampled(dist.StudentT):
        def rsample(self, sample_shape=()):
            raise NotImplementedError

    def program(fn):
        def model(data):
            with pyro.plate("rows", 2):
                pyro.sample("y", fn.expand([2]), obs=data)

        return model

    with pytest.raises(UnsupportedDivergenceError, match="site 'y'.*draw of the teacher's StudentT|Unsampled"):
        on_data(["y"]).loss(program(dist.Normal(torch.tensor(0.0), 1.0)), program(Unsampled(5.0)), ROWS[:, 0])


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match="target_values must be 'teacher' or 'data', not 'student'"):
        SurrogateKD(["y"], target_values="student")
