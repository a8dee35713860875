"""Parameters that a program makes after its first run are trained as the others are, and come back from a checkpoint."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler

from pyro_kd import Distiller, LocalKD, SurrogateKD, freeze
from pyro_kd.errors import OptimiserMismatchError
from pyro_kd.training import Callback, Checkpoints, ELBOObjective, Trainer, Validation

SCHEDULERS = {
    "none": None,
    "LambdaLR": lambda optim: lr_scheduler.LambdaLR(optim, lambda step: 0.9**step),
    "ExponentialLR": lambda optim: lr_scheduler.ExponentialLR(optim, 0.9),
    "OneCycleLR": lambda optim: lr_scheduler.OneCycleLR(optim, 0.1, total_steps=30, cycle_momentum=False),
    "SequentialLR": lambda optim: lr_scheduler.SequentialLR(
        optim, [lr_scheduler.ConstantLR(optim), lr_scheduler.ExponentialLR(optim, 0.9)], [4]
    ),
}


def teacher(rows):
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(3.0, 1.0))


class Late(Callback):
    """A student whose second parameter is made after five steps; its name comes before that of the first."""

    def __init__(self):
        self.is_late = False

    def on_step(self, trainer, row):
        self.is_late = trainer.num_steps >= 5

    def student(self, rows):
        loc = pyro.param("b", torch.tensor(0.0))
        if self.is_late:
            loc = loc + pyro.param("a", torch.tensor(0.0)) / 2
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(loc, 1.0))


def values():
    return {name: value.item() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("optim", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_late_parameter_is_trained_at_the_scheduled_rate_and_resumed(scheduler, optim, tmp_path):
    late = Late()

    def make():
        return Distiller(
            late.student,
            teacher,
            lambda params: optim(params, lr=0.05),
            LocalKD(["x"]),
            weight=0.1,
            scheduler=SCHEDULERS[scheduler],
        )

    distiller = make()
    distiller.fit(10, steps=10, seed=0, progress=False, callbacks=[late], checkpoints=Checkpoints(tmp_path))
    assert values()["a"] > 0.01
    rates = {group["lr"] for group in distiller._stepper.optimiser._optim.param_groups}
    assert len(rates) == 1
    distiller.fit(10, total_steps=15, progress=False)
    undisturbed = values()

    store = pyro.get_param_store()
    for name in list(store):
        del store[name]
    make().fit(10, total_steps=15, progress=False, checkpoints=Checkpoints(tmp_path, every=100), resume=True)
    assert values() == undisturbed


def test_the_best_student_has_a_later_parameter_as_it_was_made():
    late = Late()
    losses = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    distiller = Distiller(late.student, teacher, lambda params: torch.optim.SGD(params, lr=0.05), LocalKD(["x"]), weight=0.1)
    distiller.fit(10, steps=10, progress=False, callbacks=[late], validation=Validation(lambda: next(losses), every=2))
    assert values()["a"] == 0.0


def groups_of(params):
    return torch.optim.SGD([{"params": params}, {"params": [nn.Parameter(torch.zeros(()))], "lr": 0.3}], lr=0.05)


def test_several_groups_and_a_scheduler_have_no_rate_for_a_late_parameter():
    late = Late()
    distiller = Distiller(late.student, teacher, groups_of, LocalKD(["x"]), scheduler=SCHEDULERS["LambdaLR"])
    with pytest.raises(OptimiserMismatchError, match=r"'a' during training.*2 groups.*Run the student once"):
        distiller.fit(10, steps=10, progress=False, callbacks=[late])
    assert distiller.num_steps == 5


def test_several_groups_alone_take_a_late_parameter_at_the_default_rate():
    late = Late()
    distiller = Distiller(late.student, teacher, groups_of, LocalKD(["x"]), weight=0.1)
    history = distiller.fit(10, steps=10, progress=False, callbacks=[late])
    assert values()["a"] > 0.01
    assert "lr" not in history  # there are two


def branching(starts):
    """x on one of two paths, each with a parameter of its own, which a run makes only where it takes the path."""

    def program():
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.9, 0.1])))
        loc = pyro.param(f"loc_{int(k)}", torch.tensor(starts[int(k)]))
        pyro.sample("x", dist.Normal(loc, 1.0))

    return program


def two_locations():
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.9, 0.1])))
    pyro.sample("x", dist.Normal(torch.tensor([3.0, -3.0])[k], 1.0))


@pytest.mark.parametrize("log_every", [1, 50, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_parameter_on_a_path_that_draws_decide_is_trained(seed, log_every, tmp_path):
    loss = SurrogateKD(["k", "x"])
    distiller = Distiller(
        branching([0.0, 0.0]), two_locations, lambda params: torch.optim.SGD(params, lr=0.1), loss, log_every=log_every
    )
    distiller.fit(steps=300, seed=seed, progress=False)
    assert values() == pytest.approx({"loc_0": 3.0, "loc_1": -3.0}, abs=0.4)
    assert distiller.parameters.keys() == {"loc_0", "loc_1"}
    distiller.save_student(tmp_path / "student.safetensors")
    assert load_file(tmp_path / "student.safetensors").keys() == {"loc_0", "loc_1"}


def test_parameters_of_subsampled_rows_are_trained():
    data = torch.arange(8.0)

    def model():
        for row in pyro.plate("rows", 8, subsample_size=2):
            loc = pyro.param(f"loc_{row}", torch.tensor(-1.0))
            pyro.sample(f"x_{row}", dist.Normal(loc, 1.0), obs=data[row])

    def guide():
        pass

    objective = ELBOObjective(Trace_ELBO(), model, guide)
    Trainer(objective, lambda params: torch.optim.SGD(params, lr=0.1)).fit(steps=100, seed=0, progress=False)
    assert [values()[f"loc_{row}"] for row in range(8)] == pytest.approx(data.tolist(), abs=0.2)


def experts():
    """Rows of y by one of two networks in a closure, of which a draw decides."""
    networks = [nn.Linear(1, 1) for _ in range(2)]

    def program(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.8, 0.2])))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(networks[int(k)](x).squeeze(-1), 0.5))

    return networks, program


def test_a_network_that_a_later_step_calls_first_is_trained():
    torch.manual_seed(0)
    (own, student), (others, teacher) = experts(), experts()
    loss = SurrogateKD(["k", "y"])
    distiller = Distiller(student, freeze(teacher), lambda params: torch.optim.Adam(params, lr=0.05), loss, log_every=1000)
    distiller.fit(torch.linspace(-1, 1, 16)[:, None], steps=400, seed=0, progress=False)
    for mine, theirs in zip(own, others, strict=True):
        assert mine.weight.item() == pytest.approx(theirs.weight.item(), abs=0.1)


def test_a_layer_that_a_callback_replaces_is_trained_from_the_next_step_on():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    seen = []

    class Replace(Callback):
        def on_step(self, trainer, row):
            if trainer.num_steps == 5:
                net[2] = nn.Linear(2, 1)
            seen.append(net[2].weight.detach().clone())

    def student(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(net(torch.ones(rows, 1)).squeeze(-1), 1.0))

    distiller = Distiller(student, teacher, lambda params: torch.optim.SGD(params, lr=0.01), LocalKD(["x"]), weight=0.1)
    distiller.fit(10, steps=7, progress=False, callbacks=[Replace()])
    assert not torch.equal(seen[4], seen[5])
    assert not torch.equal(seen[5], seen[6])


def test_the_gradient_of_another_model_stays_as_it_was():
    other = pyro.param("other", torch.tensor(1.0)).unconstrained()
    other.grad = torch.tensor(5.0)
    late = Late()
    distiller = Distiller(late.student, teacher, lambda params: torch.optim.SGD(params, lr=0.05), LocalKD(["x"]), weight=0.1)
    distiller.fit(10, steps=10, progress=False, callbacks=[late])
    assert other.grad.item() == 5.0
    assert distiller.parameters.keys() == {"b", "a"}
