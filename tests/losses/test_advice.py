"""The remedy in an error names options that the loss at hand takes, in one way everywhere, and it works."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import DrawsKD, LocalKD, MarginalKD, MultiSampleKD, OnPolicyKD, SurrogateKD, bound_report, check, freeze
from pyro_kd.errors import NonFiniteLossError, NoParametersError, PyroKDError, SupportMismatchError, UnpairedSiteError
from pyro_kd.losses import DistillationLoss, run_pair
from pyro_kd.losses.advising import advice_of
from pyro_kd.metrics import marginal_kl, marginal_log_prob

FAMILIES = {
    "normal": lambda loc, width: dist.Normal(torch.zeros(width) + loc, 1.0).to_event(1),
    "gamma": lambda loc, width: dist.Gamma((torch.zeros(width) + loc).exp(), 1.0).to_event(1),
    "bits": lambda loc, width: dist.Bernoulli(logits=torch.zeros(width) + loc).to_event(1),
    "category": lambda loc, width: dist.Categorical(logits=torch.zeros(width) + loc),
}


def program(family, width):
    loc = torch.tensor(0.3, requires_grad=True)

    def model():
        with pyro.plate("rows", 4):
            z = pyro.sample("z", FAMILIES[family](loc, width))
            pyro.sample("x", dist.Normal((z if family == "category" else z.sum(-1)) * loc, 1.0))

    return model


PAIRS = {
    "narrower": (("normal", 2), ("normal", 3)),
    "fewer bits": (("bits", 2), ("bits", 3)),
    "fewer categories": (("category", 2), ("category", 3)),
    "discrete": (("bits", 2), ("normal", 2)),
    "continuous": (("normal", 2), ("bits", 2)),
    "smaller support": (("gamma", 2), ("normal", 2)),
}
LOSSES = {
    "default": (SurrogateKD, {}),
    "latent terms": (SurrogateKD, {"latent_weight": 0.25}),
    "the paper's": (SurrogateKD, {"latent_weight": 0.1, "teacher_forcing": 0.0}),
    "forced": (SurrogateKD, {"teacher_forcing": 1.0, "given_weight": 2.0}),
    "by site": (SurrogateKD, {"latent_weight": {"z": 0.1}, "teacher_forcing": 0.0}),
    "on policy": (OnPolicyKD, {"latent_weight": 0.1}),
    "local": (LocalKD, {}),
    "samples": (MultiSampleKD, {"latent_weight": 0.1, "num_samples": 2}),
    "draws": (DrawsKD, {"latent_weight": 0.1}),
}


def remedies(text):
    """The options that a message advises, as code."""
    return re.findall(r"by ((?:latent_weight|given_weight)=.*?), which", text) + re.findall(r"by (fresh=\[.*?\])", text)


def attempt(make, options, student, teacher):
    make(["x"], **options).loss(student, freeze(teacher))


def refusal(make, options, student, teacher):
    try:
        attempt(make, options, student, teacher)
    except SupportMismatchError as error:
        return str(error)
    return None


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_remedy_for_a_latent_over_different_values_works_and_is_that_of_the_check(name, pair):
    make, options = LOSSES[name]
    student, teacher = (program(*each) for each in PAIRS[pair])
    report = check(make(["x"], **options), student, freeze(teacher), try_capture=False)
    refused = refusal(make, options, student, teacher)
    if refused is not None:
        assert [problem.text for problem in report.errors] == [refused]
    for problem in report.errors:  # of the first steps of a fit, if the loss itself has none
        advised = remedies(problem.text)
        assert len(advised) == (1 if name == "by site" else 2), problem.text
        for way in advised:
            further = eval(f"dict({way})")
            assert check(make(["x"], **options | further), student, freeze(teacher), try_capture=False).is_ok, way
            attempt(make, options | further, student, teacher)


def test_some_pairs_are_refused_by_each_loss():
    for make, options in LOSSES.values():
        student, teacher = (program(*each) for each in PAIRS["discrete"])
        assert not check(make(["x"], **options), student, freeze(teacher), try_capture=False).is_ok


def test_a_weight_that_is_no_number_is_named_with_the_site():
    student, teacher = program("bits", 2), program("bits", 3)
    with pytest.raises(SupportMismatchError, match="by latent_weight of 0 at 'z', which keeps its noise shared"):
        attempt(LocalKD, {"latent_weight": lambda site: 0.5}, student, teacher)


def test_without_a_loss_there_are_no_weights_to_advise():
    with pytest.raises(SupportMismatchError) as caught:
        run_pair(program("bits", 2), program("bits", 3), targets=["x"], given_sites=lambda sites, _: sites)
    assert "; or leave the latent out: by fresh=['z'], so that" in str(caught.value)


def test_the_control_variate_of_a_marginal_loss_is_what_is_left_out():
    student, teacher = program("bits", 2), program("bits", 3)
    with pytest.raises(SupportMismatchError, match="; or leave out control_variate") as caught:
        attempt(MarginalKD, {"control_variate": True}, student, teacher)
    assert "fresh" not in str(caught.value)
    attempt(MarginalKD, {}, student, teacher)


@pytest.mark.parametrize("make", [SurrogateKD, LocalKD, OnPolicyKD, DrawsKD, MarginalKD])
def test_a_target_over_different_values_is_not_told_what_helps_a_latent(make):
    def teacher():
        pyro.sample("x", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))

    def student():
        pyro.sample("x", dist.Bernoulli(torch.full((2,), 0.5, requires_grad=True)).to_event(1))

    loss = make(["x"])
    with pytest.raises(PyroKDError) as caught:
        loss.loss(student, teacher)
    for text in (str(caught.value), *(problem.text for problem in check(loss, student, teacher).errors)):
        assert not re.search(r"fresh|weight|latent", text), text


@pytest.mark.parametrize("make", [SurrogateKD, LocalKD, DrawsKD, MarginalKD])
def test_a_target_that_the_student_lacks_is_not_told_to_be_fresh(make):
    def teacher():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    def student(name):
        def model():
            pyro.sample("x", dist.Normal(torch.tensor(0.0, requires_grad=True), 1.0))
            if name:
                pyro.sample(name, dist.Normal(0.0, 1.0))

        return model

    for name in ("", "y_hat", "w"):
        with pytest.raises(UnpairedSiteError) as caught:
            make(["x", "y"]).loss(student(name), teacher)
        text = str(caught.value)
        assert "fresh=" not in text, text
        assert "A target must be in both programs: if the student lacks 'y', add pyro.sample('y', ...)" in text


def test_latents_that_were_taken_for_each_other_may_be_fresh():
    def model(name):
        def sampled():
            z = pyro.sample(name, dist.Normal(torch.tensor(0.0, requires_grad=True), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

        return sampled

    with pytest.raises(UnpairedSiteError, match=r"if they are different variables: (fresh=\['code', 'z'\])\)") as caught:
        SurrogateKD(["x"]).loss(model("code"), model("z"))
    way = re.search(r"variables: (fresh=.*?)\)", str(caught.value))[1]
    SurrogateKD(["x"], **eval(f"dict({way})")).loss(model("code"), model("z"))


def test_a_loss_that_is_not_finite_advises_by_the_kind_of_site():
    def model(scale, infinite):
        def sampled():
            z = pyro.sample(
                "z", dist.Normal(torch.tensor(float("inf") if infinite == "z" else 0.0), 1.0, validate_args=False)
            )
            pyro.sample("x", dist.Normal(torch.nan_to_num(0 * z) + scale, 1.0 if infinite == "z" else 1e-30))

        return sampled

    scale = torch.tensor(1e10, requires_grad=True)
    with pytest.raises(NonFiniteLossError, match="make these latents targets too") as caught:
        SurrogateKD(["x"], teacher_forcing=0.0).loss(model(scale, "x"), model(0.0, "x"))
    assert "leave the latent out" not in str(caught.value)
    with pytest.raises(
        NonFiniteLossError, match=r"; or leave the latent out: by latent_weight=.*else 1\.0, which"
    ) as caught:
        LocalKD(["x"]).loss(model(scale, "z"), model(0.0, "none"))
    assert "targets too" not in str(caught.value)


def test_a_loss_without_latent_terms_is_not_told_to_weigh_them():
    def model():
        pyro.sample("x", dist.Bernoulli(0.5))

    for make, has in ((SurrogateKD, True), (MarginalKD, False)):
        with pytest.raises(NoParametersError) as caught:
            make(["x"])(model, model)()
        assert ("latent_weight" in str(caught.value)) == has


def test_targets_are_named_to_the_loss_at_hand():
    with pytest.raises(PyroKDError, match=r"LocalKD\(targets=\[\.\.\.\]\)"):
        LocalKD(["xx"]).loss(program("normal", 2), program("normal", 2))
    with pytest.raises(PyroKDError, match=r"bound_report\(targets=\[\.\.\.\]\)"):
        bound_report(program("normal", 2), program("normal", 2), ["xx"])


def test_reports_and_metrics_advise_what_they_take():
    """A line of a report says why it is empty and what helps: no loss can be used in place of the report."""
    student, teacher = program("normal", 2), program("normal", 3)
    reasons = bound_report(student, teacher, ["x"], num_samples=2, sample_numbers=(), classifier_rows=8).reasons
    assert reasons["exact"] == (
        "latent site 'z' is Normal, whose values cannot be enumerated. Use a discrete latent with a finite support, or go by the "
        "other lines of the report."
    )
    assert "by fresh=['z'], so that each program draws its own noise" in reasons["local"]
    assert "weight" not in reasons["local"]
    bound_report(student, teacher, ["x"], num_samples=2, sample_numbers=(), classifier_rows=8, fresh=["z"])
    with pytest.raises(PyroKDError, match="support, or use bound_report, which encloses the KL without exact marginals"):
        marginal_kl(student, teacher, ["x"])
    with pytest.raises(PyroKDError, match="support, or pass values of latents in data"):
        marginal_log_prob(student, {"x": torch.zeros(4)})
    with pytest.raises(PyroKDError, match="support, or use MultiSampleKD, which draws the latents"):
        MarginalKD(["x"]).loss(student, teacher)


def test_the_options_of_a_loss_are_those_that_it_can_be_made_with():
    for make in (SurrogateKD, LocalKD, OnPolicyKD, DrawsKD, MultiSampleKD, MarginalKD):
        found = advice_of(make(["x"])).options
        values = {name: getattr(make(["x"]), name) for name in found if hasattr(make(["x"]), name)}
        make(**values)
        for name in set(advice_of(SurrogateKD(["x"])).options) - found - {"control_variate"}:
            with pytest.raises((TypeError, ValueError)):
                make(["x"], **{name: "boundary" if name == "discrete_gradient" else "data"})


def test_a_loss_of_the_users_own_has_the_options_of_its_constructor():
    class Mine(DistillationLoss):
        def __init__(self, targets):
            super().__init__(targets, latent_weight=0.5)

        def given_sites(self, teacher, targets):
            return list(teacher)

    assert advice_of(Mine(["x"])).options == {"targets"}
    with pytest.raises(SupportMismatchError, match="the same values at this site. See"):
        Mine(["x"]).loss(program("bits", 2), program("bits", 3))
