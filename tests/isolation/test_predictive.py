"""Pyro's posterior predictive as the teacher: each run is one draw from the posterior, and one from the model given it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.infer.predictive import WeighedPredictive
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_kd import Distiller, check, freeze
from pyro_kd.errors import InvalidProgramError, UnpairedSiteError
from tests.support.losses import SurrogateKD

X = torch.linspace(-1, 1, 20)


def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.3), obs=y)


def latent_model(x):
    """With a latent of each row, of which the posterior says nothing."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(slope * x, 1.0))
        pyro.sample("y", dist.Normal(z, 0.3))


class Bayesian(PyroModule):
    """A Bayesian linear layer, whose weights are sites."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 1)
        self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.net.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.net(x[:, None]).squeeze(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.slope * x, self.log_scale.exp()))


def samples(n=40, mean=2.0):
    return {"slope": mean + 0.1 * torch.randn(n)}


def guide(x, y=None):
    pyro.sample("slope", dist.Normal(2.0, 0.1))


def autoguide(kind):
    """Of the posterior at 2, or close to it."""
    made = kind(model)
    made(X, torch.zeros(len(X)))
    for name, param in made.named_parameters():
        param.data.fill_(-2.3 if "scale" in name else 2.0)
    return made


TEACHERS = {
    "samples": lambda: Predictive(model, samples()),
    "parallel": lambda: Predictive(model, samples(), parallel=True),
    "return_sites": lambda: Predictive(model, samples(), return_sites=["y"]),
    "all sites returned": lambda: Predictive(model, samples(), return_sites=["y", "slope", "_RETURN"]),
    "guide": lambda: Predictive(model, guide=guide, num_samples=3),
    "guide, parallel": lambda: Predictive(model, guide=guide, num_samples=3, parallel=True),
    "AutoNormal": lambda: Predictive(model, guide=autoguide(AutoNormal), num_samples=3),
    "AutoDiagonalNormal": lambda: Predictive(model, guide=autoguide(AutoDiagonalNormal), num_samples=3),
    "AutoDelta": lambda: Predictive(model, guide=autoguide(AutoDelta), num_samples=3),
    "samples of a Predictive": lambda: Predictive(
        model, {"slope": Predictive(lambda: guide(X), {}, num_samples=40)()["slope"]}
    ),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_run_is_one_draw_of_the_posterior_and_the_model_given_it(kind):
    teacher = freeze(TEACHERS[kind]())
    pyro.clear_param_store()
    slopes = []
    for _ in range(200):
        trace = poutine.trace(teacher).get_trace(X)
        sites = [name for name, site in trace.nodes.items() if site["type"] == "sample"]
        assert sites == ["rows", "y"]
        slopes.append(trace.nodes["y"]["fn"].mean[-1])
    drawn = torch.stack(slopes)
    assert abs(drawn.mean() - 2.0) < 5 * 0.1 / 40**0.5
    assert drawn.std() < 0.2
    if "Delta" not in kind:
        assert len(drawn.unique()) > 10


def test_draws_are_joint_rows_of_the_samples_and_equally_likely():
    given = {"slope": torch.tensor([1.0, 2.0, 3.0]), "other": torch.tensor([10.0, 20.0, 30.0])}

    def two():
        pyro.sample(
            "y", dist.Delta(pyro.sample("slope", dist.Normal(0.0, 1.0)) + pyro.sample("other", dist.Normal(0.0, 1.0)))
        )

    teacher = freeze(Predictive(two, given))
    values = torch.stack([poutine.trace(teacher).get_trace().nodes["y"]["value"] for _ in range(600)])
    numbers, counts = values.unique(return_counts=True)
    assert numbers.tolist() == [11.0, 22.0, 33.0]
    assert (counts - 200).abs().max() < 5 * (600 * 1 / 3 * 2 / 3) ** 0.5  # five standard deviations


@pytest.mark.parametrize("loop", ["plain", "compiled", "Distiller"])
def test_a_student_learns_the_posterior_predictive(loop):
    student, teacher = Student(), freeze(Predictive(model, samples()))
    if loop == "Distiller":
        distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.05), SurrogateKD(["y"]))
        distiller.fit(X, steps=200, progress=False)
    else:
        loss, optim = SurrogateKD(["y"])(student, teacher), torch.optim.Adam(student.parameters(), lr=0.05)
        if loop == "compiled":
            loss.compile(backend=None)
        values = set()
        for _ in range(200):
            optim.zero_grad()
            value = loss(X)
            value.backward()
            optim.step()
            values.add(value.item())
        assert len(values) > 100
    assert abs(student.slope.item() - 2.0) < 0.1
    assert student.log_scale.exp().item() == pytest.approx(0.3, abs=0.03)


def test_latents_that_the_posterior_lacks_are_sites():
    teacher = freeze(Predictive(latent_model, samples()))
    assert [name for name in poutine.trace(teacher).get_trace(X).nodes if name in ("slope", "z", "y")] == ["z", "y"]

    def student(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(2.0 * x, 1.0))
            pyro.sample("y", dist.Normal(pyro.param("scale", torch.tensor(1.0)) * z, 0.3))

    assert SurrogateKD(["y"])(student, teacher)(X).item() < 20


def test_a_student_with_the_posteriors_latent_is_refused():
    with pytest.raises(UnpairedSiteError, match="'slope'.*fresh"):
        SurrogateKD(["y"])(lambda x: model(x), freeze(Predictive(model, samples())))(X)


def test_a_bayesian_network():
    net = Bayesian()
    given = {"net.weight": 2.0 + 0.1 * torch.randn(30, 1, 1), "net.bias": 0.1 * torch.randn(30, 1)}
    student = Student()
    loss, optim = (
        SurrogateKD(["y"])(student, freeze(Predictive(net, given))),
        torch.optim.Adam(student.parameters(), lr=0.05),
    )
    for _ in range(150):
        optim.zero_grad()
        loss(X).backward()
        optim.step()
    assert abs(student.slope.item() - 2.0) < 0.15


@pytest.mark.parametrize("kind", TEACHERS)
def test_its_posterior_is_listed_without_a_warning(kind):
    """Warnings are errors here: no student shares the posterior's draws, and none is expected to."""
    report = check(SurrogateKD(["y"]), Student(), freeze(TEACHERS[kind]()), X, try_capture=False)
    assert report.problems == ()
    assert {draw.sharing for draw in report.between} <= {"not drawn by the student"}
    assert all(draw.op.endswith(" (a row of the posterior)") for draw in report.between)
    assert bool(report.between) is ("Delta" not in kind)
    SurrogateKD(["y"])(Student(), freeze(TEACHERS[kind]()))(X)


def test_further_draws_of_its_model_between_sites_are_reported():
    def noisy(x):
        pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(torch.randn(len(x)), 0.3))

    with pytest.warns(UserWarning, match="the student does not: randn at .*test_predictive.py"):
        SurrogateKD(["y"])(Student(), freeze(Predictive(noisy, samples())))(X)


def test_without_a_posterior_it_is_the_model():
    teacher = freeze(Predictive(model, num_samples=5))
    assert "slope" in poutine.trace(teacher).get_trace(X).nodes


def test_a_frozen_predictive_keeps_its_samples_and_moves_with_its_teacher():
    given = samples()
    teacher = freeze(Predictive(model, given))
    given["slope"].fill_(-100.0)
    assert poutine.trace(teacher).get_trace(X).nodes["y"]["fn"].mean[-1] > 0
    teacher.to(torch.float64)
    assert poutine.trace(teacher).get_trace(X.double()).nodes["y"]["value"].dtype == torch.float64


REFUSED = {
    "not frozen": lambda: SurrogateKD(["y"])(Student(), Predictive(model, samples())),
    "as student": lambda: SurrogateKD(["y"])(Predictive(model, samples()), freeze(model)),
    "its method": lambda: freeze(Predictive(model, samples()).forward),
    "under a handler": lambda: freeze(poutine.scale(Predictive(model, samples()), scale=1.0)),
    "weighed": lambda: freeze(WeighedPredictive(model, guide=guide, num_samples=3)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_predictive_that_is_refused_gets_advice(case):
    with pytest.raises(InvalidProgramError, match=r"freeze.? ?\(?Predictive\(model, samples\)"):
        REFUSED[case]()
