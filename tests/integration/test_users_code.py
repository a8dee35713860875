"""Functions and subclasses of the user's that forget something: the error names them, the site and the form that is called."""

import copy
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_kd import (
    Distiller,
    MultiSampleKD,
    OnPolicyKD,
    SurrogateKD,
    check,
    posterior_predictive,
    register_sampler,
    site_report,
)
from pyro_kd.divergences import Divergence, kl
from pyro_kd.errors import InvalidProgramError
from pyro_kd.losses import DistillationLoss
from pyro_kd.training import Callback, DistillationObjective, Trainer, best_start
from pyro_kd.utils.user_code import called


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))

    def forward(self):
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z * self.loc, 1.0))


def teacher():
    with pyro.plate("rows", 4):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0))


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def distiller(loss, optim=sgd, **options):
    return Distiller(Student(), teacher, optim, loss, **options)


class Forgetful(DistillationLoss):
    def __init__(self, targets):
        self.mine = targets

    def given_sites(self, teacher, targets):
        return targets


class ForgetfulSurrogate(SurrogateKD):
    def __init__(self):
        self.latent_weight = 0.5


@pytest.mark.parametrize(
    "use",
    [
        lambda loss: loss.loss(Student(), teacher),
        lambda loss: loss(Student(), teacher)(),
        lambda loss: loss.terms(Student(), teacher),
        lambda loss: loss.compile(),
        lambda loss: check(loss, Student(), teacher),
        lambda loss: site_report(loss, Student(), teacher),
        lambda loss: SVI(Student(), teacher, pyro.optim.Adam({}), loss).step(),
        lambda loss: distiller(loss).fit(steps=1, progress=False),
        lambda loss: copy.copy(loss).loss(Student(), teacher),
        repr,
    ],
)
@pytest.mark.parametrize("make", [lambda: Forgetful(["x"]), ForgetfulSurrogate], ids=["base", "surrogate"])
def test_a_loss_that_does_not_call_the_constructor_of_its_base_class_is_named(make, use):
    loss = make()
    with pytest.raises(InvalidProgramError) as caught:
        use(loss)
    assert str(caught.value).startswith(f"{type(loss).__name__}.__init__ does not call the constructor of its base class")
    assert "Begin it with super().__init__(targets, ...)." in str(caught.value)


def test_a_divergence_that_does_not_call_the_constructor_of_its_base_class_is_named():
    class Mine(Divergence):
        def __init__(self):
            pass

        def __call__(self, p, q, value):
            return kl(p, q, value)

    with pytest.raises(
        InvalidProgramError, match=r"Mine.__init__ does not call .* with super\(\).__init__\(function, ...\)"
    ):
        SurrogateKD(["x"], divergence=Mine()).loss(Student(), teacher)


def test_other_missing_attributes_are_those_of_python():
    for whole in (SurrogateKD(["x"]), kl):
        assert not hasattr(whole, "nothing")
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            whole.nothing  # noqa: B018
        assert repr(pickle.loads(pickle.dumps(whole))) == repr(copy.deepcopy(whole)) == repr(copy.copy(whole)) == repr(whole)


class Combining(SurrogateKD):
    def combine(self):
        return torch.tensor(0.0)


class Giving(SurrogateKD):
    def given_sites(self, teacher):
        return []


LOSSES = {
    "two arguments": (
        lambda: SurrogateKD(["x"], divergence=lambda p, q: 0),
        "site 'x': the divergence is called as d(p, q, value)",
    ),
    "four arguments": (
        lambda: SurrogateKD(["x"], latent_weight=0.1, latent_divergence=lambda p, q, value, more: 0),
        "site 'z': the divergence is called as d(p, q, value)",
    ),
    "wrapped": (
        lambda: SurrogateKD(["x"], divergence=Divergence(lambda p: 0)),
        "site 'x': the divergence is called as d(p, q, value)",
    ),
    "weight": (lambda: SurrogateKD(["x"], latent_weight=lambda: 1), "site 'z': latent_weight is called as f(site_name)"),
    "given": (lambda: SurrogateKD(["x"], given_weight=lambda a, b: 1), "site 'z': given_weight is called as f(site_name)"),
    "forcing": (
        lambda: SurrogateKD(["x"], teacher_forcing=lambda: 1),
        "site 'z': teacher_forcing is called as f(site_name)",
    ),
    "fraction": (
        lambda: OnPolicyKD(["x"], student_fraction=lambda: 1),
        "site 'x': student_fraction is called as f(site_name)",
    ),
    "form": (
        lambda: SurrogateKD(["x"], latent_weight=0.1, latent_form=lambda: "value"),
        "site 'z': latent_form is called as f(site_name)",
    ),
    "targets": (lambda: SurrogateKD(lambda: True), "site 'z': targets is called as f(site)"),
    "combine": (lambda: Combining(["x"]), "Combining.combine is called as combine(particles)"),
    "given_sites": (lambda: Giving(["x"]), "Giving.given_sites is called as given_sites(teacher, targets)"),
    "proposal": (
        lambda: MultiSampleKD(["x"], num_samples=2, proposal=lambda: None),
        "the proposal is called as f(values, *args, **kwargs)",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_function_of_the_wrong_number_of_arguments_is_named_with_its_site(name):
    make, text = LOSSES[name]
    with pytest.raises(InvalidProgramError, match=re.escape(text) + r", and \S*\(.*\) does not take that: ") as caught:
        make().loss(Student(), teacher)
    report = check(make(), Student(), teacher, try_capture=False)
    assert any(caught.value.message.rstrip(".") in problem.text for problem in report.errors)


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            lambda: distiller(SurrogateKD(["x"]), latent_weight=lambda: 1),
            "the schedule of latent_weight is called as f(step)",
        ),
        (
            lambda: distiller(SurrogateKD(["x"]), teacher_forcing=lambda: 1),
            "the schedule of teacher_forcing is called as f(step)",
        ),
        (lambda: distiller(SurrogateKD(["x"]), lambda: 1), "optim is called as f(parameters)"),
        (lambda: distiller(SurrogateKD(["x"]), scheduler=lambda: 1), "scheduler is called as f(optimiser)"),
        (
            lambda: Trainer(DistillationObjective(SurrogateKD(["x"]), Student(), teacher, weight=lambda: 1), sgd),
            "the objective's weight is called as f(step)",
        ),
        (
            lambda: Trainer(DistillationObjective(SurrogateKD(["x"]), Student(), teacher, arguments=lambda x: ()), sgd),
            "DistillationObjective(arguments=...) is called as f(*args, **kwargs) with the arguments of a step",
        ),
    ],
)
def test_a_function_of_a_fit_is_named(train, text):
    with pytest.raises(InvalidProgramError, match=re.escape(text) + ", and .* does not take that: "):
        train().fit(steps=1, progress=False)


def test_further_functions_are_named():
    class Silent(Callback):
        def on_step(self, trainer):
            pass

    with pytest.raises(
        InvalidProgramError, match=r"a callback is called as on_step\(trainer, row\), and Silent.on_step\(trainer\)"
    ):
        distiller(SurrogateKD(["x"])).fit(steps=1, progress=False, callbacks=[Silent()])
    with pytest.raises(InvalidProgramError, match=r"judge is called as f\(trainer\)"):
        best_start(lambda: distiller(SurrogateKD(["x"])), starts=1, steps=1, judge=lambda: 0.0)

    def model(weight, rows):
        pyro.sample("x", dist.Normal(weight, 1.0).expand([rows]).to_event(1))

    predictive = posterior_predictive(
        lambda rows: model(pyro.sample("w", dist.Normal(0.0, 1.0)), rows), {"w": torch.zeros(3)}, rows=lambda: 3
    )
    with pytest.raises(InvalidProgramError, match=r"rows is called as f\(\*args, \*\*kwargs\) with the program's arguments"):
        predictive(3)

    class Own(dist.Normal):
        pass

    def drawing():
        pyro.sample("x", dist.Normal(pyro.sample("z", Own(0.0, 1.0)), 1.0))

    register_sampler(Own)(lambda fn: fn.loc)
    with pytest.raises(InvalidProgramError, match=r"the registered sampler of Own is called as f\(fn, sample_shape\)"):
        SurrogateKD(["x"]).loss(drawing, drawing)


def test_options_that_are_no_names_are_refused():
    with pytest.raises(TypeError, match="site_map must be a mapping from the student's names to the teacher's"):
        SurrogateKD(["x"], site_map=lambda site: site)
    with pytest.raises(TypeError, match="fresh must be names of sites"):
        SurrogateKD(["x"], fresh=3)


def test_errors_inside_of_a_function_are_its_own():
    def mine(p, q, value):
        return len(3)

    with pytest.raises(TypeError, match="has no len") as caught:
        SurrogateKD(["x"], divergence=mine).loss(Student(), teacher)
    assert not isinstance(caught.value, InvalidProgramError)
    with pytest.raises(TypeError, match="not iterable"):  # without a signature
        called(max, "the function", "f(x)", 3)
    assert called(int, "the function", "f(x)", "3") == 3
