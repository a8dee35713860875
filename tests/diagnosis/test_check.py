"""The check before training: it lists the pairs and all problems at once, and changes nothing."""

import functools
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

import pyro_kd
from pyro_kd import Distiller, LocalKD, check, freeze
from pyro_kd.diagnosis import CheckReport
from pyro_kd.errors import CheckError
from tests.support.losses import SurrogateKD
from tests.support.tutorial_programs import MODULES, NAMES

ROWS = 8


LEAF = torch.tensor(1.0, requires_grad=True)


def plain():
    pyro.sample("x", dist.Normal(0.0, 1.0))


class Decoder(nn.Module):
    def __init__(self, width, *layers):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), *layers, nn.Tanh(), nn.Linear(width, 1))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z).squeeze(-1), 0.1))


def state_of_everything(*modules):
    store = pyro.get_param_store()
    tensors = [tensor.clone() for module in modules for tensor in module.state_dict().values()]
    grads = [param.grad for module in modules for param in module.parameters()]
    modes = [part.training for module in modules for part in module.modules()]
    streams = torch.get_rng_state(), np.random.get_state()[1].copy()
    return tensors, grads, modes, streams, {name: value.clone() for name, value in store.items()}


def assert_same(before, after):
    for one, two in zip(before[0], after[0], strict=True):
        assert torch.equal(one, two)
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3][0], after[3][0])
    assert np.array_equal(before[3][1], after[3][1])
    assert before[4].keys() == after[4].keys()


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_a_good_pair_has_no_problems(loss):
    pyro.set_rng_seed(0)
    student, teacher = Decoder(4), freeze(Decoder(16))
    report = check(loss(["x"]), student, teacher, ROWS)
    assert report.is_ok
    assert report.problems == ()
    assert report.is_captured
    z, x = report.sites
    assert (z.name, z.student, z.kind, z.families, z.plates) == ("z", "z", "latent", ("Normal", "Normal"), ("rows",))
    assert (z.noise, x.noise) == (("given" if loss is LocalKD else "direct"), "given")
    assert (x.kind, x.divergence, x.analytic, x.weight) == ("target", "kl", True, 1.0)
    assert (x.batch_shape, z.event_shape) == ((ROWS,), (2,))
    terms = loss(["x"]).terms(student, teacher, ROWS)
    assert z.term == float(terms["z"].value) == 0
    assert x.term > 0
    assert report.raise_errors() is report


def test_nothing_changes():
    """Batch norm and dropout in train mode, a parameter of Pyro's store that does not exist yet, and all random streams."""
    pyro.set_rng_seed(0)
    module = Decoder(4, nn.BatchNorm1d(4), nn.Dropout(0.2))

    def student(rows):
        pyro.module("student", module)
        pyro.param("bias", lambda: torch.randn(()))
        module(rows)

    teacher = Decoder(16, nn.BatchNorm1d(16))
    before = state_of_everything(module, teacher)
    loss = SurrogateKD(["x"])
    attributes = dict(vars(loss))
    report = check(loss, student, teacher, ROWS)
    assert report.is_ok
    assert_same(before, state_of_everything(module, teacher))
    assert vars(loss) == attributes
    assert not loss._pairs._pairs


def teacher_with_much():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Gamma(1.0, 1.0))
    with pyro.plate("p", 5):
        pyro.sample("c", dist.Normal(a, 1.0))
    pyro.sample("d", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(a, 1.0))


def student_with_errors(loc):
    a = pyro.sample("a", dist.Normal(loc, 1.0).expand([2]).to_event(1))
    pyro.sample("bb", dist.Gamma(1.0, 1.0))
    with pyro.plate("p", 5):
        pyro.sample("c", dist.Beta(loc.abs() + 1, 1.0))
    pyro.sample("d", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a.sum(), -1.0))


def test_all_problems_are_found_at_once():
    student = functools.partial(student_with_errors, torch.tensor(1.0, requires_grad=True))
    report = check(SurrogateKD(["x", "y"]), student, teacher_with_much)
    assert not report.is_ok
    texts = "\n".join(problem.text for problem in report.errors)
    for part in (
        "target 'y' is not a sample site",
        "site 'a' (Normal",  # a different width
        "site 'c' (Beta",  # different noise
        "site 'd'",  # a different kind of values
        "parameter scale",  # violates its constraint
        "'b' is in the teacher only",
        "'bb'",
    ):
        assert part in texts, (part, texts)
    assert "Trace Shapes" not in texts
    assert {site.name for site in report.sites} >= {"a", "c", "d", "x"}
    with pytest.raises(CheckError, match=r"(?s)\d errors would stop the training:\n1\. .*\n2\. "):
        report.raise_errors()
    with pytest.raises(CheckError):
        check(SurrogateKD(["x", "y"]), student, teacher_with_much, raise_errors=True)


def test_the_loss_raises_the_first_error():
    """An error of the check is an error of the loss."""
    student = functools.partial(student_with_errors, torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ValueError, match="."):
        SurrogateKD(["x"]).loss(student, teacher_with_much)


def test_draws_between_sites_and_unreached_parameters_are_listed():
    pyro.set_rng_seed(0)

    class Student(Decoder):
        def __init__(self):
            super().__init__(4, nn.Dropout(0.5))
            self.idle = nn.Linear(3, 3)

    report = check(SurrogateKD(["x"]), Student(), freeze(Decoder(16)), ROWS)
    assert report.is_ok
    assert report.unreached == ("idle.weight", "idle.bias")
    (draw,) = report.between
    assert (draw.op, draw.after, draw.sharing) == ("bernoulli_", "z", "drawn anew")
    (problem,) = report.problems
    assert "the student draws these outside of its sample sites" in problem.text
    assert "idle.weight" in str(report)


def test_a_student_that_cannot_learn_is_an_error():
    report = check(SurrogateKD(["x"]), freeze(Decoder(4)), Decoder(16), ROWS)
    assert not report.is_ok
    assert "no parameter of the student" in report.errors[0].text
    assert "swap them" in report.errors[0].text


def test_a_site_that_cannot_be_compared_is_one_problem():
    """The parameters of its term are not listed as unreached in addition."""

    def point():
        pyro.sample("x", dist.Delta(torch.tensor(2.0)))

    loc = torch.tensor(1.0, requires_grad=True)
    report = check(SurrogateKD(["x"]), lambda: pyro.sample("x", dist.Normal(loc, 1.0)), point)
    (problem,) = report.problems
    assert "cross_entropy" in problem.text
    assert report.unreached == ()


def test_a_shared_parameter_is_an_error():
    module = Decoder(4)
    report = check(SurrogateKD(["x"]), module, module, ROWS)
    (problem,) = report.errors
    assert "belongs to both teacher and student" in problem.text


def test_different_modes_that_change_the_loss_give_a_warning():
    class Process(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self):
            pyro.sample("x", dist.Normal(0.0, self.scale if self.training else 0.1 * self.scale))

    report = check(SurrogateKD(["x"]), Process(), freeze(Process()))
    assert report.is_ok
    assert any("train mode" in problem.text for problem in report.problems)
    assert check(SurrogateKD(["x"]), Process(), freeze(Process(), keep_modes=True)).problems == ()


class Bounded(dist.Normal):
    """A law that claims all real numbers, and has none below -1."""

    def log_prob(self, value):
        return super().log_prob(value).masked_fill(value < -1, -torch.inf)


def in_local_steps(kind):
    """Two programs with a problem that only a given latent has."""
    shift = torch.tensor(0.5, requires_grad=True)
    family = Bounded if kind == "an infinite KL" else dist.Normal

    def student(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", family(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 9.0 - z if kind == "a scale below 0" else 1.0))

    def teacher(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0 if kind == "an infinite KL" else 9.0, 1.0)), 1.0))

    return student, teacher, 50


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("an infinite KL", "given site 'z' is infinite"),
        ("a scale below 0", "Expected parameter scale .* but found invalid values\\. This"),
    ],
)
def test_a_problem_of_the_first_quarter_of_a_fit_is_an_error(kind, text):
    pair = in_local_steps(kind)
    report = check(pyro_kd.SurrogateKD(["x"]), *pair)
    (problem,) = report.errors
    assert re.search(text, problem.text)
    assert "in the first quarter of the steps of a Distiller" in problem.text
    never = pyro_kd.SurrogateKD(["x"], given_weight=lambda site: 0.0 if site == "z" else 1.0)
    for loss in (pyro_kd.SurrogateKD(["x"], teacher_forcing=0.0), never):
        assert check(loss, *pair).is_ok, "each remedy helps"


def test_the_report_tells_why_a_loss_cannot_be_captured():
    class Branching(Decoder):
        def forward(self, rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                if z.sum() > 0:
                    z = -z
                pyro.sample("x", dist.Normal(self.net(z).squeeze(-1), 0.1))

    report = check(SurrogateKD(["x"]), Branching(4), freeze(Branching(16)), ROWS)
    assert report.is_captured is False
    assert "test_check.py" in str(report)
    assert check(SurrogateKD(["x"]), Branching(4), freeze(Branching(16)), ROWS, try_capture=False).is_captured is None


def test_masks_scales_names_and_fresh_sites_are_shown():
    loc = torch.tensor(1.0, requires_grad=True)

    def teacher():
        with pyro.plate("rows", 100, subsample_size=10):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=torch.arange(10) > 4):
                pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("top", dist.Normal(0.0, 1.0))

    def student():
        with pyro.plate("rows", 100, subsample_size=10):
            z = pyro.sample("w", dist.Laplace(loc, 1.0))
            with pyro.poutine.mask(mask=torch.arange(10) > 4):
                pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("own", dist.Normal(0.0, 1.0))

    loss = SurrogateKD(["x"], site_map={"w": "z"}, fresh=["top", "own"])
    report = check(loss, student, teacher)
    rows = {site.name: site for site in report.sites}
    assert report.is_ok
    assert rows["z"].student == "w"
    assert rows["z"].families == ("Normal", "Laplace")
    assert rows["z"].noise == "converted"
    assert rows["z"].counts == "10 times"
    assert rows["x"].counts == "10 times, masked"
    assert (rows["own"].kind, rows["top"].kind) == ("fresh", "fresh teacher's")


def test_a_fresh_site_that_does_not_exist_gives_a_warning():
    report = check(SurrogateKD(["x"], fresh=["Z"]), Decoder(4), freeze(Decoder(16)), ROWS, try_capture=False)
    assert report.is_ok
    assert [problem.text for problem in report.problems] == [
        "fresh lists 'Z', but neither program has such a site in this run."
    ]


def test_the_report_is_shown_as_a_table():
    report = check(SurrogateKD(["x"]), Decoder(4), freeze(Decoder(16)), ROWS, try_capture=False)
    assert str(report) == repr(report)
    assert "no errors" in str(report)
    assert report._repr_html_().startswith("<table>")
    assert "in the student" not in str(report), "a column that is empty is left out"
    renamed = check(
        SurrogateKD(["x"], site_map={"y": "x"}), lambda: pyro.sample("y", dist.Normal(LEAF, 1.0)), plain, try_capture=False
    )
    assert str(renamed).split("\n")[0].split()[:4] == ["site", "in", "the", "student"]
    assert "in the student" in renamed._repr_html_()
    assert str(CheckReport()) == "no errors"


def test_training_is_the_same_after_a_check():
    def losses(checks):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        student, teacher = Decoder(4, nn.BatchNorm1d(4)), freeze(Decoder(16))
        loss = SurrogateKD(["x"])
        if checks:
            check(loss, student, teacher, ROWS)
        distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.01), loss)
        return [distiller.step(ROWS) for _ in range(3)]

    assert losses(True) == losses(False)


def test_svi_trains_after_a_check():
    def model(loc):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(loc)), 1.0))

    teacher = freeze(functools.partial(model, 0.0))
    student = functools.partial(model, 1.0)
    loss = SurrogateKD(["x"])
    assert check(loss, student, teacher).is_ok
    assert not dict(pyro.get_param_store().items())
    svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.1}), loss=loss)
    assert svi.step() == pytest.approx(0.5)


def test_an_argument_that_is_not_a_distillation_loss_is_an_error():
    with pytest.raises(TypeError, match="distillation loss"):
        check(pyro.infer.Trace_ELBO(), Decoder(4), freeze(Decoder(4)), ROWS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_programs_that_distil_have_no_errors(module):
    program = module.program()
    report = check(SurrogateKD(**program.options), program.student, program.teacher, *program.args, try_capture=False)
    assert report.is_ok, str(report)
    terms = SurrogateKD(**program.options).terms(program.student, program.teacher, *program.args)
    assert {site.name for site in report.sites if site.term is not None} == set(terms)
