"""What a trainer's options must not change: which steps are logged, how it is evaluated, and what callbacks do in between."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, LocalKD, SurrogateKD, bound_report, freeze
from pyro_kd.training import (
    Callback,
    Checkpoints,
    DistillationObjective,
    ELBOObjective,
    Trainer,
    Validation,
    continual_objectives,
    switch,
)


class Coins(nn.Module):
    """z -> y, with a discrete latent."""

    def __init__(self, logit, shift):
        super().__init__()
        self.logit, self.shift = nn.Parameter(torch.tensor(logit)), nn.Parameter(torch.tensor(shift))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(logits=self.logit.expand(rows)))
            pyro.sample("y", dist.Normal(2 * z + self.shift, 1.0))


def sgd(params, lr=0.05):
    return torch.optim.SGD(params, lr=lr)


@pytest.mark.parametrize("gradient", ["score", "boundary", "boundary_all"])
@pytest.mark.parametrize("options", [{}, {"num_particles": 2}, {"reuse": 2}])
def test_a_logged_step_has_the_gradients_through_discrete_latents(gradient, options):
    found = []
    for log_every in (1, 3, 50):
        student = Coins(-0.5, 0.1)
        loss = SurrogateKD(["y"], discrete_gradient=gradient, teacher_forcing=0.0, **options)
        distiller = Distiller(student, freeze(Coins(1.0, 0.0)), sgd, loss, weight=1 / 200, log_every=log_every)
        distiller.fit(200, steps=12, seed=0, progress=False)
        found.append(student.logit.item())
    assert found[0] > -0.49
    assert found == pytest.approx([found[0]] * 3, abs=1e-5 if options.get("reuse") is None else 0.05)


def test_a_student_that_learns_by_score_alone_can_begin():
    student = Coins(-0.5, 0.0)
    student.shift.requires_grad_(False)
    loss = SurrogateKD(["y"], discrete_gradient="score", teacher_forcing=0.0)
    Distiller(student, freeze(Coins(1.0, 0.0)), sgd, loss, weight=1 / 200).fit(200, steps=3, seed=0, progress=False)
    assert student.logit.item() > -0.5


def normal(loc, rows):
    with pyro.plate("rows", rows):
        pyro.sample("x", dist.Normal(loc, 1.0))


def teacher(rows):
    normal(3.0, rows)


def student(rows):
    normal(pyro.param("loc", torch.tensor(0.0)), rows)


class Projecting(Callback):
    """Puts a new tensor into the store after the fifth step."""

    def __init__(self):
        self.seen = []

    def on_step(self, trainer, row):
        store = pyro.get_param_store()
        if row["step"] == 5:
            store["loc"] = store["loc"].detach().clamp(max=10.0)
        self.seen.append(store["loc"].item())


def test_a_parameter_that_a_callback_replaces_is_trained_from_the_next_step_on():
    found = []
    for log_every in (1, 50):
        pyro.clear_param_store()
        callback = Projecting()
        distiller = Distiller(student, teacher, sgd, LocalKD(["x"]), weight=0.1, log_every=log_every)
        distiller.fit(10, steps=20, seed=0, progress=False, callbacks=[callback])
        found.append(callback.seen)
    assert found[0] == found[1]
    assert found[0] == sorted(set(found[0]))  # it moves in every step


def test_a_parameter_that_is_unfrozen_and_frozen_is_trained_in_between():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0), requires_grad=False)

        def forward(self, rows):
            normal(self.a + self.b, rows)

    module, values = Shifted(), []

    class Unfreezing(Callback):
        def on_step(self, trainer, row):
            values.append(module.b.item())
            if row["step"] in (3, 6):
                module.b.requires_grad_(row["step"] == 3)

    distiller = Distiller(module, teacher, sgd, LocalKD(["x"]), weight=0.1)
    distiller.fit(10, steps=9, seed=0, progress=False, callbacks=[Unfreezing()])
    assert values[:3] == [0.0] * 3
    assert values[2] < values[3] < values[4] < values[5] < 1.0
    assert values[5:] == [values[5]] * 4


def test_a_validation_has_the_weights_of_the_last_step():
    pyro.clear_param_store()
    distiller = Distiller(student, teacher, sgd, LocalKD(["x"]), weight=lambda step: ([0.1] * 30)[step])
    history = distiller.fit(10, steps=30, seed=0, validation=Validation([10], every=10), progress=False)
    losses = [loss for loss in history["validation/loss"] if loss == loss]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


def test_a_data_loader_is_evaluated_alike_and_leaves_the_random_stream():
    data = TensorDataset(torch.linspace(0, 1, 20))
    program = lambda x: normal(pyro.param("loc", torch.tensor(0.0)) + x, len(x))  # noqa: E731
    distiller = Distiller(program, lambda x: normal(x + 1, len(x)), sgd, SurrogateKD(["x"]))
    for shuffle in (False, True):
        torch.manual_seed(5)
        before, loader = torch.get_rng_state(), DataLoader(data, 7, shuffle=shuffle)
        found = [distiller.evaluate(batches=loader, seed=0).loss.mean for _ in range(3)]
        assert found == [found[0]] * 3
        assert torch.equal(before, torch.get_rng_state())


def test_adagrad_writes_checkpoints_where_it_begins_anew(tmp_path):
    pyro.clear_param_store()
    make = lambda params: torch.optim.Adagrad(params, lr=0.1)  # noqa: E731
    distiller = Distiller(student, teacher, make, SurrogateKD(["x"]), weight=0.1)
    distiller.fit(10, steps=8, seed=0, progress=False, checkpoints=Checkpoints(tmp_path, every=2))
    assert distiller.num_steps == 8


def test_a_pyro_optimiser_resumes_where_it_begins_anew(tmp_path):
    def train(folder, **options):
        pyro.clear_param_store()
        loss = SurrogateKD(["x"])
        distiller = Distiller(student, teacher, pyro.optim.Adam({"lr": 0.1}), loss, weight=0.1)
        distiller.fit(
            10, steps=12, seed=0, progress=False, checkpoints=Checkpoints(tmp_path / folder, every=3), resume=True, **options
        )
        return pyro.param("loc").item()

    class Crash(Callback):
        def on_step(self, trainer, row):
            if row["step"] == 5:
                raise MemoryError

    with pytest.raises(MemoryError):
        train("broken", callbacks=[Crash()])
    assert train("broken") == train("whole")


def test_a_continual_objective_switches_where_its_weight_does():
    objective = DistillationObjective(LocalKD(["x"]), student, teacher, weight=switch(1.0, 0.5, 10))
    parts = continual_objectives(objective, DistillationObjective(LocalKD(["x"]), student, teacher), new_share=0.5)
    assert [parts["new"].begins_anew_at(step) for step in (9, 10, 11)] == [False, True, False]


def test_an_enumerating_elbo_is_evaluated():
    def model(x):
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)) + k, 1.0), obs=x)

    pyro.clear_param_store()
    x, elbo = torch.linspace(-1, 1, 20), pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    trainer = Trainer(ELBOObjective(elbo, model, lambda x: None), lambda params: sgd(params, 1e-3))
    trainer.fit(x, steps=2, progress=False)
    assert trainer.evaluate(x).loss.mean == pytest.approx(elbo.loss(model, lambda x: None, x))


def test_bounds_are_those_of_the_student_as_it_is_evaluated():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), 0.3))

    network, x = Dropping(), torch.randn(32, 2) * 3 + 2
    frozen = freeze(network)
    report = bound_report(network, frozen, ["y"], x, sample_numbers=(), classifier_rows=500)
    assert report.surrogate.mean == 0
    assert network.training
    assert network.net[0].num_batches_tracked == 0


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_above_0(clip_norm):
    with pytest.raises(ValueError, match="clip_norm must be above 0"):
        Distiller(student, teacher, sgd, LocalKD(["x"]), clip_norm=clip_norm)


def test_an_evaluation_has_a_sample():
    distiller = Distiller(student, teacher, sgd, LocalKD(["x"]))
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        distiller.evaluate(10, num_samples=0)


class Shift(nn.Module):
    """x, with a network that autocast runs in bfloat16."""

    def __init__(self, width=4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z).squeeze(-1), 0.5))


def test_an_objective_serves_two_trainers():
    ends = []
    torch.manual_seed(0)
    objective = DistillationObjective(SurrogateKD(["x"]), Shift(), freeze(Shift()), weight=1e-3)
    for steps in (8, 40):
        trainer = Trainer(objective, sgd)
        trainer.fit(16, steps=steps, progress=False)
        ends.append(next(iter(trainer.objectives.values())).local_steps)
    assert ends == [2, 10]
    assert objective.local_steps is None


def test_the_precision_holds_before_the_first_step():
    torch.manual_seed(0)
    student, teacher = Shift(), freeze(Shift(8))

    def still(params):
        return torch.optim.SGD(params, lr=0.0)

    loss = SurrogateKD(["x"], teacher_forcing=0.0)
    distiller = Distiller(student, teacher, still, loss, precision="bf16-mixed")
    before = distiller.evaluate(64).loss.mean
    distiller.step(64)
    assert distiller.evaluate(64).loss.mean == before
    assert Distiller(student, teacher, still, loss).evaluate(64).loss.mean != before


def test_an_objective_without_weight_is_not_evaluated():
    def broken(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(float("nan"), 1.0))

    student = Shift()
    part = DistillationObjective(SurrogateKD(["x"], teacher_forcing=0.0), student, freeze(Shift()))
    off = DistillationObjective(LocalKD(["x"]), student, broken, weight=0.0)
    found = Trainer({"on": part, "off": off}, sgd).evaluate(16)
    assert found.loss.mean == Trainer({"on": part}, sgd).evaluate(16).loss.mean


@pytest.mark.parametrize("batches", [{"rows": 16}, "16"])
def test_a_single_batch_is_no_list_of_batches(batches):
    distiller = Distiller(Shift(), freeze(Shift()), sgd, SurrogateKD(["x"]))
    with pytest.raises(TypeError, match="validation is "):
        Validation(batches)
    with pytest.raises(TypeError, match="batches is "):
        distiller.fit(batches=batches, steps=1, progress=False)
    with pytest.raises(TypeError, match="batches is "):
        distiller.evaluate(batches=batches)


def test_a_new_pool_begins_where_the_teacher_has_changed():
    torch.manual_seed(0)
    student, teacher = Shift(), Shift()
    loss = SurrogateKD(["x"], reuse=4)(student, teacher)
    pyro.set_rng_seed(0)
    first = [loss(16).item() for _ in range(20)]
    assert len(set(first)) < 20  # a draw serves several steps
    with torch.no_grad():
        teacher.net[2].bias += 10.0
    assert loss(16).item() > 100 * max(first)


def test_a_frozen_program_that_is_set_to_train_mode_keeps_its_buffers():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            with pyro.plate("rows", len(x)):
                return pyro.sample("y", dist.Normal(self.norm(x), 1.0).to_event(1))

    frozen, x = freeze(Normed()), torch.randn(8, 2) + 3
    frozen(x)
    frozen.program.train()
    frozen(x)
    assert torch.equal(frozen.program.norm.running_mean, torch.zeros(2))


def test_a_pyro_optimiser_that_has_not_stepped_again_keeps_its_state(tmp_path):
    def make():
        return Trainer(DistillationObjective(LocalKD(["x"]), student, teacher), pyro.optim.Adam({"lr": 0.05}))

    def teacher(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(3.0, 1.0))

    def student(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    def newest(folder):
        return max(folder.glob("step*"))

    first, second = tmp_path / "first", tmp_path / "second"
    make().fit(16, total_steps=5, seed=0, progress=False, checkpoints=first)
    with pytest.warns(UserWarning, match="nothing to train"):  # the same is written once more
        make().fit(16, total_steps=5, progress=False, resume=newest(first), checkpoints=second)
    undisturbed, again = [], []
    for folder, found in ((first, undisturbed), (second, again)):
        make().fit(16, total_steps=8, progress=False, resume=newest(folder))
        found.append(pyro.param("loc").item())
    assert again == undisturbed


class Penalised(SurrogateKD):
    """A loss with a penalty of its own."""

    def differentiable_loss(self, student, teacher, *args, **kwargs):
        return super().differentiable_loss(student, teacher, *args, **kwargs) + 100.0 * student.net[2].bias.square().sum()


@pytest.mark.parametrize("options", [{}, {"reuse": 2}])
def test_a_loss_with_a_value_of_its_own_has_it_in_every_step(options):
    found = []
    for log_every in (1, 50):
        torch.manual_seed(0)
        student = Shift()
        distiller = Distiller(student, freeze(Shift(8)), sgd, Penalised(["x"], **options), weight=1e-3, log_every=log_every)
        distiller.fit(16, steps=6, seed=0, progress=False)
        found.append(student.net[2].bias.item())
        assert distiller.evaluate(16).loss.mean > 0.09 * student.net[2].bias.item() ** 2
    assert found[0] == found[1]
