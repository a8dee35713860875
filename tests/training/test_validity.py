"""What a fit ends with, writes or logs is valid: parameters within their constraints, distributions too, a student that learns."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_kd import Distiller, LocalKD, errors, freeze
from pyro_kd.training import Callback, Checkpoints, DistillationObjective, ELBOObjective, Trainer, Validation
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fit, gaussian, mean, names, scale, sgd


def narrow(rows=1):
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(0.0, 0.05))


def far(params):
    """A step that takes the scale from 0.5 far below 0, where the KL is finite again."""
    return torch.optim.SGD(params, lr=0.05)


def distil(steps, folder=None, student=scale, teacher=narrow, optim=far, compiled=False, **settings):
    return fit(
        folder, steps, student=student, teacher=teacher, optim=optim,
        options={"log_every": 1000, "compile": {"backend": None} if compiled else False}, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
def test_the_last_step_is_validated(compiled):
    """The update of the last step is what no later step looks at."""
    with pytest.raises(errors.InvalidParameterError, match=r"after step 1: .*scale.*GreaterThan.*training_programs.py:\d+"):
        distil(1, compiled=compiled)
    assert pyro.param("scale").item() < 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
def test_no_checkpoint_is_written_of_what_is_not_valid(tmp_path, compiled):
    class Break(Callback):
        """Something goes wrong that no step sees."""

        def on_step(self, trainer, row):
            if trainer.num_steps == 3:
                pyro.get_param_store()._params["scale"].data.fill_(-0.05)

    slow = lambda params: torch.optim.SGD(params, lr=1e-6)  # noqa: E731
    expected = "step-00000002" if compiled else "step 4: .*parameters are those of step 3.*step-00000002"
    with pytest.raises(errors.InvalidParameterError, match=expected):
        distil(5, tmp_path, optim=slow, compiled=compiled, callbacks=[Break()])
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("compiled", [False, {"backend": None}], ids=["eager", "captured"])
def test_logged_steps_are_validated(compiled):
    """A captured loss validates its first step, its capture, and its 50th, 100th and 200th call."""

    def model():
        seen.append(pyro.poutine.util.is_validation_enabled())
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    seen = []
    trainer = Trainer(ELBOObjective(TraceMeanField_ELBO(), model, guide), sgd, log_every=4, compile=compiled)
    for step in range(220):
        before = len(seen)
        trainer.step()
        if step == 0 or (step % 4 == 0 and not compiled) or (step in (50, 100, 200) and compiled):
            assert seen[before:]
            assert seen[-1]
        elif compiled and step > 1:
            assert len(seen) == before, "captured steps do not run the model"


def test_an_invalid_parameter_names_site_and_remedy_in_every_call():
    value = nn.Parameter(torch.tensor(0.5))

    def student(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), value))

    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.05))

    for kind in (SurrogateKD, LocalKD):
        loss = kind(["x"])(student, teacher)
        for count in (1, 2, 3, 7):
            value.data = torch.tensor(0.5)
            for _ in range(count):
                loss(4)
            value.data = torch.tensor(-0.5)
            with pytest.raises((errors.InvalidParameterError, ValueError), match="scale"):
                loss(4)
    with pytest.raises(errors.InvalidParameterError, match="'scale' of the Normal at site 'x'.*softplus"):
        loss(4)


@pytest.mark.filterwarnings("ignore:the student draws these outside:UserWarning")  # its dropout
def test_checking_validity_changes_nothing(tmp_path):
    """Neither random streams nor buffers nor modes."""

    def student(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))

        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(net(z).squeeze(-1), 1.0))

        return model, net

    teacher = freeze(student(0)[0])
    results = []
    for every in (1, 1000):
        model, net = student(1)
        distiller = Distiller(model, teacher, adam, SurrogateKD(["x"]))
        distiller.fit(8, steps=6, seed=3, checkpoints=Checkpoints(tmp_path / str(every), every=every), progress=False)
        assert all(module.training for module in net.modules())
        results.append(
            (
                {name: value.tolist() for name, value in net.state_dict().items()},
                distiller.history.losses,
                torch.rand(1).item(),
            )
        )
    assert results[0] == results[1]


# What is saved.


def test_a_saved_student_is_valid(tmp_path):
    distiller = fit(steps=1)
    store = pyro.get_param_store()
    store._params["mu"].data.fill_(math.nan)
    with pytest.raises(errors.InvalidParameterError, match="after step 1: parameter 'mu' is NaN or infinite"):
        distiller.save_student(tmp_path / "student.pt")
    store._params["mu"].data.fill_(1e30)
    with pytest.raises(errors.NonFiniteLossError, match="after step 1: the kl term of target site 'x' is infinite"):
        distiller.save_student(tmp_path / "student.pt")
    distiller = fit(steps=1, student=scale, teacher=gaussian(0.0))
    pyro.get_param_store()._params["scale"].data.fill_(-2.0)
    with pytest.raises(errors.InvalidParameterError, match="Expected parameter scale.*constraint=constraints.positive"):
        distiller.save_student(tmp_path / "student.pt")
    assert list(tmp_path.iterdir()) == []


def constrained(rows=1):
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)))


class Constrained(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, rows=1):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(0.0, self.scale))


def test_a_parameter_at_the_boundary_of_its_constraint_is_not_saved(tmp_path):
    """A positive scale whose logarithm is so small that it is 0."""
    for student, name in ((constrained, "scale"), (Constrained(), "scale")):
        distiller = fit(steps=1, student=student, teacher=gaussian(0.0))
        next(iter(distiller.parameters.values())).data.fill_(-200.0)
        with pytest.raises(errors.InvalidParameterError, match=f"{name}' has reached the boundary of its constraint.*0.0"):
            distiller.save_student(tmp_path / "student.pt")


def test_the_restored_best_student_is_validated():
    """A validation by the user's own function may call anything the best."""
    losses = iter([0.0, 1.0])

    class Break(Callback):
        def on_step(self, trainer, row):
            if trainer.num_steps == 2:  # after the second step, before its validation counts
                trainer._stepper.progress.best[1]["scale"].fill_(-1.0)

    with pytest.raises(errors.InvalidParameterError, match="scale"):
        fit(
            steps=2, student=scale, teacher=gaussian(0.0), optim=sgd, validation=Validation(lambda: next(losses), every=1),
            callbacks=[Break()],
        )  # fmt: skip


# A student that learns nothing.


def detached(rows=1):
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)).detach(), 1.0))


def unused(rows=1):
    pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def by_input(rows, shift):
    pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(shift, 1.0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("log_every", [1, 50])
def test_a_student_that_learns_nothing_is_an_error(log_every, compiled):
    options = {"log_every": log_every, "compile": {"backend": None} if compiled else False}
    for student in (detached, unused):
        pyro.clear_param_store()
        with pytest.raises(errors.NoParametersError, match="depends on no parameter"):
            fit(steps=2, student=student, options=options)
    pyro.clear_param_store()
    shift = torch.tensor(1.0, requires_grad=True)
    distiller = Distiller(by_input, lambda rows, shift: gaussian(3.0)(rows), adam, SurrogateKD(["x"]), **options)
    with pytest.raises(errors.NoParametersError):
        distiller.fit(3, shift, steps=2, progress=False)


def test_a_student_that_stops_learning_is_an_error():
    """From a step on that is not logged."""

    def student(is_detached):
        mu = pyro.param("mu", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(mu.detach() if is_detached else mu, 1.0))

    distiller = Distiller(student, lambda is_detached: pyro.sample("x", dist.Normal(3.0, 1.0)), adam, SurrogateKD(["x"]))
    distiller.step(False)
    with pytest.raises(errors.NoParametersError):
        distiller.step(True)


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceGraph_ELBO])
def test_an_elbo_that_learns_nothing_is_an_error(kind):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)).detach(), 1.0))

    trainer = Trainer(
        {
            "student": DistillationObjective(SurrogateKD(["x"]), mean, gaussian(3.0)),
            "elbo": ELBOObjective(kind(), model, guide),
        },
        sgd,
    )
    with pytest.raises(errors.NoParametersError, match=f"(objective 'elbo'|{kind.__name__}) depends on no parameter"):
        trainer.step()
