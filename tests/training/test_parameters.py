"""Which parameters are found and trained, also those that appear late or that only some batches use."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_kd import Distiller, errors, freeze
from pyro_kd.training import ELBOObjective, Trainer
from tests.support.killed_training import Student
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fast_sgd, gaussian, point, quiet_fit

pytestmark = pytest.mark.filterwarnings("ignore:the student draws these outside")  # dropout in train mode


def test_unregistered_modules_are_trained():
    net = nn.Linear(1, 1)

    def student():
        pyro.sample("x", dist.Normal(net(torch.ones(1)).squeeze(), 1.0))

    quiet_fit(Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"])), steps=60)
    assert net(torch.ones(1)).item() == pytest.approx(3.0, abs=1e-3)


def test_a_parameter_that_comes_later_is_trained_from_then_on():
    def student(late):
        mu = pyro.param("mu", torch.tensor(0.0))
        if late:
            mu = mu + pyro.param("late", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(mu, 1.0))

    distiller = Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"]))
    distiller.step(False)
    assert set(distiller.parameters) == {"mu"}
    distiller.step(True)
    assert pyro.param("late").item() == pytest.approx(0.27)
    assert distiller._stepper.state.tensors.keys() == {"mu", "late"}


def by_task(parameter):
    """A student with a parameter of each task's own."""

    def student(task):
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Normal(parameter(task), 1.0))

    return student


def test_parameters_that_only_some_batches_use_are_trained_on_those():
    """Each is trained on its own batches, with no stale gradients, and none is forgotten."""
    student = by_task(lambda task: pyro.param(f"p{task}", torch.tensor(0.0)))
    teacher = by_task(lambda task: 1.0)
    for optim in (fast_sgd, pyro.optim.SGD({"lr": 0.1})):
        pyro.clear_param_store()
        distiller = Distiller(student, teacher, optim, SurrogateKD(["x"]))
        seen = []
        for step in range(6):
            distiller.step(step % 2)
            seen.append((pyro.param("p0").item(), pyro.param("p1").item() if step else 0.0))
        assert [p0 for p0, _ in seen] == pytest.approx([0.5, 0.5, 0.75, 0.75, 0.875, 0.875])
        assert [p1 for _, p1 in seen] == pytest.approx([0.0, 0.5, 0.5, 0.75, 0.75, 0.875])
        assert distiller._stepper.state.tensors.keys() == {"p0", "p1"}


def test_modules_that_only_some_batches_use_are_trained_on_those():
    nets = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    before = [net.weight.item() for net in nets]
    distiller = Distiller(
        by_task(lambda task: nets[task](torch.ones(1)).squeeze()),
        by_task(lambda task: 9.0),
        fast_sgd,
        SurrogateKD(["x"]),
        log_every=1,
    )
    for step in range(4):
        distiller.step(step % 2)
    assert all(net.weight.item() != start for net, start in zip(nets, before, strict=True))


def test_a_new_parameter_is_checked_and_clipped_from_its_first_step():
    def student(late):
        mu = pyro.param("mu", torch.tensor(0.0))
        if late:
            b = pyro.param("b", torch.tensor(0.0))
            mu = mu + (b * b).sqrt()
        pyro.sample("x", dist.Normal(mu, 1.0))

    distiller = Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"]))
    distiller.step(False)
    with pytest.raises(errors.NonFiniteLossError, match="gradient for parameter 'b'"):
        distiller.step(True)
    assert pyro.param("b").item() == 0.0


def test_buffers_that_are_assigned_anew_are_kept(tmp_path):
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu = nn.Parameter(torch.tensor(0.0))
            self.register_buffer("ema", torch.tensor(0.0))
            self.register_buffer("scratch", torch.tensor(0.0), persistent=False)

        def forward(self):
            if self.training:
                self.ema = 0.5 * self.ema + 0.5
                self.scratch = torch.zeros(3)
            pyro.sample("x", dist.Normal(self.mu, 1.0))

    student = Average()
    quiet_fit(Distiller(student, point(3.0), adam, SurrogateKD(["x"])), steps=3, checkpoints=tmp_path)
    assert student.ema.item() == 0.875
    again = Average()
    with pytest.warns(UserWarning, match="nothing to train: 3 steps are done"):
        quiet_fit(Distiller(again, point(3.0), adam, SurrogateKD(["x"])), steps=3, checkpoints=tmp_path, resume=True)
    assert again.ema.item() == 0.875


def test_a_leaf_that_is_no_parameter_is_an_error():
    leaf = torch.tensor(0.0, requires_grad=True)

    def student():
        pyro.sample("x", dist.Normal(leaf + pyro.param("mu", torch.tensor(0.0)), 1.0))

    with pytest.raises(errors.NoParametersError, match=r"shape \(\) that is neither a pyro.param nor in an nn.Module"):
        Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"])).step()
    with pytest.raises(errors.NoParametersError, match="no parameter"):
        Distiller(gaussian(2.0), gaussian(3.0), fast_sgd, SurrogateKD(["x"])).step()


@pytest.mark.parametrize("optim", [fast_sgd, lambda params: torch.optim.SGD(params, lr=0.1)])
def test_an_error_about_missing_parameters_names_a_tensor_that_looks_like_one(optim):
    """The tensor is reached by the closure, as in a first attempt; the programs are not swapped."""
    loc = torch.zeros(2, requires_grad=True)

    def student():
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(errors.NoParametersError) as caught:
        Distiller(student, freeze(student), optim, SurrogateKD(["x"])).step()
    assert "the student computes with 'loc', a tensor that requires a gradient, but is neither" in str(caught.value)
    assert "loc = pyro.param('loc', torch.zeros((2,))) in the program" in str(caught.value)
    assert "exchange" not in str(caught.value)


def test_finding_parameters_changes_nothing():
    student = Student(3)
    x = torch.randn(8, 2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    state = torch.get_rng_state()
    distiller = Distiller(student, freeze(Student(4)), adam, SurrogateKD(["y"]))
    pyro.clear_param_store()
    state = torch.get_rng_state()
    distiller._stepper._trained.find_new(((x,), {}))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student.training
    assert "scale" in distiller.parameters
    assert any("running_mean" in name for name in distiller._stepper.state.tensors)


class Tied(PyroModule):
    """x ~ N(2 w, 1), where both layers have the one weight w. Pyro's store has it under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = PyroModule[nn.Linear](1, 1, bias=False), PyroModule[nn.Linear](1, 1, bias=False)
        nn.init.constant_(self.first.weight, 0.5)
        self.second.weight = self.first.weight

    def forward(self):
        one = torch.ones(1)
        pyro.sample("x", dist.Normal(self.first(one) + self.second(one), 1.0).to_event(1))


def four():
    pyro.sample("x", dist.Normal(torch.full((1,), 4.0), 1.0).to_event(1))


@pytest.mark.parametrize("optim", [lambda params: torch.optim.SGD(params, lr=0.01), pyro.optim.SGD({"lr": 0.01})])
def test_a_parameter_with_two_names_is_trained_once(optim):
    """The loss is (4 - 2 w)^2 / 2, with the gradient -6 at w = 0.5."""
    student = Tied()
    distiller = Distiller(student, four, optim, SurrogateKD(["x"]))
    quiet_fit(distiller, steps=1)
    assert student.first.weight.item() == pytest.approx(0.56)
    assert student.second.weight is student.first.weight
    assert len(distiller.parameters) == 1


def test_options_for_one_of_the_names_of_a_parameter_are_warned_of():
    """The options for the first name, that of ``distiller.parameters``, had no effect, as in SVI."""
    rates = {"first.weight": 0.01, "second.weight": 0.02}
    student = Tied()
    with pytest.warns(UserWarning, match=r"'first.weight' is 'second.weight' too, .*'lr': 0.02}, and not {'lr': 0.01}"):
        quiet_fit(
            Distiller(student, four, pyro.optim.SGD(lambda name: {"lr": rates[name]}), SurrogateKD(["x"])),
            steps=1,
        )
    assert student.first.weight.item() == pytest.approx(0.62)


@pytest.mark.parametrize("rates", [{"first.weight": 0.01, "second.weight": 0.01}, {"second.weight": 0.01}])
def test_equal_options_for_both_names_of_a_parameter(rates):
    student = Tied()
    quiet_fit(Distiller(student, four, pyro.optim.SGD(lambda name: {"lr": rates[name]}), SurrogateKD(["x"])), steps=1)
    assert student.first.weight.item() == pytest.approx(0.56)


def test_the_norm_counts_a_parameter_with_two_names_once():
    student = Tied()
    quiet_fit(
        Distiller(student, four, lambda params: torch.optim.SGD(params, lr=1.0), SurrogateKD(["x"]), clip_norm=1.0), steps=1
    )
    assert student.first.weight.item() == pytest.approx(1.5)


def test_a_parameter_with_two_names_is_resumed_and_saved(tmp_path):
    def distiller(student):
        pyro.clear_param_store()
        return Distiller(student, four, lambda params: torch.optim.Adam(params, lr=0.01), SurrogateKD(["x"]))

    whole, half, resumed = Tied(), Tied(), Tied()
    quiet_fit(distiller(whole), steps=6)
    quiet_fit(distiller(half), steps=3, checkpoints=tmp_path / "run")
    later = distiller(resumed)
    quiet_fit(later, steps=6, checkpoints=tmp_path / "run", resume=True)
    assert torch.equal(resumed.first.weight, whole.first.weight)
    later.save_student(tmp_path / "student.safetensors")
    assert resumed.second.weight is resumed.first.weight


def test_a_guide_whose_tensors_have_two_names_is_trained_once():
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    handed_over = []

    def optim(params):
        handed_over.extend(params)
        return torch.optim.SGD(params, lr=1e-3)

    quiet_fit(Trainer(ELBOObjective(Trace_ELBO(), model, AutoIAFNormal(model)), optim), steps=1)
    assert len(handed_over) == len(set(handed_over)) > 1


def made(name="mu"):
    """A student made anew."""

    def student():
        pyro.sample("x", dist.Normal(pyro.param(name, torch.tensor(0.0)), 1.0))

    return student


def distilled(student):
    distiller = Distiller(student, point(3.0), fast_sgd, SurrogateKD(["x"]))
    distiller.step()
    return distiller


def test_a_parameter_that_a_different_trainer_trains_for_another_program_is_warned_of():
    """The second student began where the first one had ended, and changed it, without a word."""
    first = distilled(made())
    with pytest.warns(UserWarning, match="a different trainer trains 'mu', too: .* Give the parameters different names"):
        second = distilled(made())
    assert first.parameters["mu"] is second.parameters["mu"]


def test_programs_that_have_more_than_a_name_in_common_may_share_parameters():
    """One student in two trainers, a handler or a function around it, and other names; with a cleared store the same names, too."""
    student = made()
    kept = [
        distilled(student),
        distilled(student),
        distilled(pyro.poutine.scale(student, 1.0)),
        distilled(lambda: student()),
    ]
    kept.append(distilled(made("nu")))
    pyro.clear_param_store()
    kept.append(distilled(made()))
    assert len(kept) == 6
