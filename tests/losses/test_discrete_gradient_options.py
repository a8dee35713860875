"""What may be passed as ``discrete_gradient``, what it costs, and the errors where a site does not have the gradient."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import SGD
from torch import nn

import pyro_kd
from pyro_kd import LocalKD, check, freeze
from pyro_kd.errors import UnknownTargetError, UnsupportedGradientError
from tests.support import readme
from tests.support.losses import SurrogateKD
from tests.support.package_files import ROOT

KINDS = ("implicit", "boundary", "boundary_all", "score")
UNBIASED = ("boundary", "boundary_all", "score")
LOGITS = torch.tensor([0.4, -0.2])


def program(logits, family=lambda logits: dist.Bernoulli(logits=logits), rows=5):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", family(logits).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0))


def loss_of(option, student=None, teacher=None, loss=SurrogateKD, **options):
    w = torch.tensor([0.1, 0.3], requires_grad=True)
    module = loss(["y"], discrete_gradient=option, **options)(
        (lambda: program(w)) if student is None else (lambda: student(w)), teacher or (lambda: program(LOGITS))
    )
    return module()


def test_the_page_about_them_runs_as_printed():
    page = (ROOT / "docs" / "discrete_gradients.md").read_text("utf-8")
    assert [block.output for block in readme.blocks(page)] == ["tensor(True)\n"]
    readme.run(page, name="example.py")


@pytest.mark.parametrize("kind", KINDS)
def test_svi_trains_a_parameter_that_only_a_discrete_latent_reaches(kind):
    def student():
        program(pyro.param("w", torch.zeros(2)))

    loss = SurrogateKD(["y"], latent_weight=0.0, discrete_gradient=kind)
    svi = SVI(student, lambda: program(LOGITS), SGD({"lr": 0.1}), loss)
    svi.step()
    assert (pyro.param("w") != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_before_training_knows_what_the_gradient_reaches(kind):
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self):
            program(self.w)

    def report(option):
        return check(SurrogateKD(["y"], latent_weight=0.0, discrete_gradient=option), Student(), lambda: program(LOGITS))

    assert report(kind).is_ok
    assert "depends on no parameter" in str(report("cut"))
    with pyro.poutine.block():
        refused = check(
            SurrogateKD(["y"], discrete_gradient=kind),
            lambda: program(pyro.param("w", torch.zeros(2)), lambda w: dist.Logistic(w, 1.0).mask(True)),
            lambda: program(LOGITS, lambda w: dist.Logistic(w, 1.0)),
        )
    assert refused.is_ok  # a latent with a derivative of its own has no need of another


@pytest.mark.parametrize("kind", UNBIASED)
def test_no_program_runs_again_without_gradients(kind):
    runs = []

    def student(w):
        runs.append(1)
        program(w)

    loss_of(kind, student)
    runs.clear()
    with torch.no_grad():
        loss_of(kind, student)
    assert len(runs) == 1


@pytest.mark.parametrize("kind", UNBIASED)
def test_the_buffers_of_the_student_move_as_without_it(kind):
    found = []
    for option in ("cut", kind):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(2)

        def student(w, norm=norm):
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Bernoulli(logits=w).to_event(1))
                pyro.sample("y", dist.Normal(norm(z).sum(-1), 1.0))

        for _ in range(2):
            torch.manual_seed(1)
            loss_of(option, student)
        found.append((norm.running_mean, norm.num_batches_tracked))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 2


def test_gradients_are_those_of_the_current_option():
    w = torch.tensor([0.1, 0.3], requires_grad=True)
    loss = SurrogateKD(["y"], latent_weight=1.0)
    module = loss(lambda: program(w), lambda: program(LOGITS))
    cut = torch.autograd.grad(module(), w)[0]
    loss.discrete_gradient = "implicit"
    assert not torch.allclose(torch.autograd.grad(module(), w)[0], cut)


def test_the_option_is_shown():
    assert "discrete_gradient='implicit'" in repr(SurrogateKD(["y"], discrete_gradient="implicit"))
    assert "discrete_gradient" not in repr(SurrogateKD(["y"]))


@pytest.mark.parametrize("option", ["Implicit", {"z": None}])
def test_an_unknown_gradient_is_refused_at_once(option):
    kind = option if isinstance(option, str) else None
    message = f"discrete_gradient is {kind!r}, but must be one of 'cut', 'implicit', 'boundary', 'boundary_all', 'score'"
    with pytest.raises(ValueError, match=message):
        SurrogateKD(["y"], discrete_gradient=option)


def test_an_unknown_gradient_of_a_function_names_the_site():
    with pytest.raises(ValueError, match="discrete_gradient of site 'z' is 3, but must be one of 'cut', 'implicit'"):
        loss_of(lambda name: 3)


def test_a_name_that_is_no_latent_is_refused():
    message = "discrete_gradient has an entry for 'zz', which is not a latent site: these are 'z'. Did you mean 'z'"
    with pytest.raises(UnknownTargetError, match=message):
        loss_of({"zz": "implicit"})


def test_local_distillation_has_no_use_for_it():
    message = "no gradient passes through given values: omit discrete_gradient, or use SurrogateKD"
    with pytest.raises(ValueError, match=message):
        LocalKD(["y"], discrete_gradient="implicit")
    assert LocalKD(["y"], discrete_gradient="cut").discrete_gradient == "cut"


REFUSED = {
    "implicit": (
        lambda w: dist.OneHotCategorical(logits=w),
        "site 'z': OneHotCategorical has no gradient 'implicit': OneHotCategorical has no implicit derivative: Bernoulli, BetaBinomial",
    ),
    "boundary": (
        lambda w: dist.NegativeBinomial(2.0, logits=w).to_event(1),
        "site 'z': NegativeBinomial has no gradient 'boundary': a NegativeBinomial is not drawn from one uniform number, as "
        "Bernoulli, Binomial, Poisson, Geometric are",
    ),
    "score": (
        lambda w: dist.NegativeBinomial(2.0, logits=w).to_event(1),
        "site 'z': NegativeBinomial has no gradient 'score': the law of the student's draw given the teacher's, from NegativeBinomial, "
        "is not known",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_without_the_gradient_is_named_with_a_remedy(kind):
    family, message = REFUSED[kind]

    def model(w):
        with pyro.plate("rows", 5):
            z = pyro.sample("z", family(w))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0))

    with pytest.raises(UnsupportedGradientError) as caught:
        loss_of(kind, model, lambda: model(LOGITS))
    assert message in str(caught.value)
    assert f"discrete_gradient=lambda site: 'cut' if site == 'z' else {kind!r}" in str(caught.value)


def test_a_teacher_whose_draw_reveals_all_of_the_noise_leaves_no_score():
    def model(family):
        with pyro.plate("rows", 5):
            z = pyro.sample("z", family)
            pyro.sample("y", dist.Normal(z, 1.0))

    message = "site 'z': Poisson has no gradient 'score': the law of the student's draw given the teacher's, from LogNormal, is not known"
    with pytest.raises(UnsupportedGradientError, match=message):
        loss_of("score", lambda w: model(dist.Poisson(w[0])), lambda: model(dist.LogNormal(0.0, 1.0)), latent_weight=0.0)


@pytest.mark.parametrize("kind", ["boundary", "score"])
def test_wider_latents_are_refused(kind):
    message = {
        "boundary": "the teacher draws it from uniform on (0, 1) noise of shape (5, 2) (for bernoulli), which differs from the student's",
        "score": "draws of shape (5, 3) and (5, 2) have no common law",
    }[kind]
    with pytest.raises(UnsupportedGradientError, match=re.escape(message)):
        loss_of(kind, lambda w: program(torch.cat([w, w[:1]])), latent_weight=0.0)


@pytest.mark.filterwarnings("ignore:the student draws these outside")
@pytest.mark.parametrize("kind", ["boundary", "boundary_all"])
def test_draws_between_sites_cannot_be_repeated(kind):
    dropout = nn.Dropout(0.5)
    message = (
        f"site 'z': Bernoulli has no gradient {kind!r}: it runs both programs again on changed noise, which draws outside"
    )
    with pytest.raises(UnsupportedGradientError, match=message):
        loss_of(kind, lambda w: program(dropout(w)))


@pytest.mark.parametrize("kind", UNBIASED)
def test_a_loss_that_is_no_sum_of_terms_is_refused(kind):
    class Largest(SurrogateKD):
        def combine(self, particles):
            return torch.stack([term.value for particle in particles for term in particle.terms]).max()

    message = "Largest combines particles in its own way, and the gradients 'boundary' and 'score' need a weighted sum"
    with pytest.raises(UnsupportedGradientError, match=message):
        loss_of(kind, loss=Largest)
    assert loss_of("implicit", loss=Largest).requires_grad


@pytest.mark.parametrize("kind", ["boundary", "boundary_all", "score", "implicit"])
def test_all_latents_of_one_program_may_be_fresh(kind):
    """``fresh="*"`` means the same as the names."""
    p = torch.tensor(0.3, requires_grad=True)

    def student(rows=50):
        with pyro.plate("rows", rows):
            w = pyro.sample("w", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(w, 1.0))

    def teacher(rows=50):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(0.7))
            pyro.sample("y", dist.Normal(z, 1.0))

    gradients = []
    for fresh in (["w", "z"], "*"):
        pyro.set_rng_seed(0)
        loss = SurrogateKD(["y"], fresh=fresh, discrete_gradient={"w": kind}, latent_weight=0.0)
        gradients.append(torch.autograd.grad(loss(student, teacher)(), p)[0])
    assert gradients[0] == gradients[1] != 0


@pytest.mark.parametrize("teacher_forcing", [0.0, None], ids=["the noise's own values", "left open"])
@pytest.mark.parametrize("is_captured", [False, True])
def test_an_option_that_changes_between_steps_is_the_one_that_counts(is_captured, teacher_forcing):
    """What an earlier step has found out holds for the options of that step."""

    def student():
        program(pyro.param("w", torch.tensor([0.1, 0.3])))

    def steps(loss, count):
        found = []
        for seed in range(count):
            pyro.set_rng_seed(seed)
            value = loss.loss_and_grads(student, teacher, *())
            param = pyro.get_param_store()._params["w"]
            found.append((value, param.grad.tolist()))
            param.grad = None
        return found

    teacher = freeze(lambda: program(LOGITS))
    options = {"teacher_forcing": teacher_forcing, "latent_weight": 0.1}
    changed, fresh = pyro_kd.SurrogateKD(["y"], **options), pyro_kd.SurrogateKD(["y"], discrete_gradient="score", **options)
    if is_captured:
        changed.compile(backend=None)
    before = steps(changed, 3)
    changed.discrete_gradient = "score"
    assert steps(changed, 3) == steps(fresh, 3) != before
