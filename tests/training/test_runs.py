"""What a training run is a run of: checkpoints of a different run are refused."""

import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, LocalKD, divergences, errors, freeze
from pyro_kd.training import Checkpoints, DistillationObjective, ELBOObjective, Replay, Trainer, linear
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, fit, gaussian, mean, sgd


class Decoder(nn.Module):
    temperature = 1.0

    def __init__(self, slope=1.0, rate=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.dropout = nn.Dropout(rate)

    def mean_of(self, z):
        return self.dropout(self.slope * z)

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.mean_of(z), 1.0))


class Shifted(Decoder):
    def mean_of(self, z):
        return self.dropout(self.slope * z) + 1.0


class Warm(Decoder):
    temperature = 2.0


class Scaled(SurrogateKD):
    """A loss with an option of its own."""

    def __init__(self, *args, factor=1.0, **options):
        super().__init__(*args, **options)
        self._factor = factor


def stored(value):
    """A teacher that keeps its parameter in Pyro's store."""

    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(pyro.param("teacher's slope", torch.tensor(value)) * z, 1.0))

    return teacher


def frozen_with_store(value):
    pyro.clear_param_store()
    model = stored(value)
    model(1)
    return freeze(model)


def closed_over(table):
    def teacher(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(table["slope"] * z, 1.0))

    return teacher


GLOBAL = torch.tensor(1.0)


def by_global(rows):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(GLOBAL * z, 1.0))


def minus(p, q, value):
    return divergences.kl(p, q, value) - 0.0


def plus(p, q, value):
    return divergences.kl(p, q, value) + 0.0


def settings(**changes):
    """What a run is made of: a fit of a decoder, with these changes."""
    return {"teacher": freeze(Decoder()), "loss": SurrogateKD(["x"])} | changes


def with_options(**options):
    return settings(options=options)


ROWS = torch.arange(8.0)


CHANGES = {
    "teacher's parameter": (settings, lambda: settings(teacher=freeze(Decoder(-1.0))), "slope: was float32 of shape"),
    "teacher's module": (settings, lambda: settings(teacher=freeze(Decoder(rate=0.5))), "dropout.p: was 0.0, is 0.5"),
    "teacher's method": (settings, lambda: settings(teacher=freeze(Shifted())), "Shifted"),
    "teacher's class attribute": (settings, lambda: settings(teacher=freeze(Warm())), "temperature|Warm"),
    "teacher not frozen": (
        lambda: settings(teacher=Decoder()),
        lambda: settings(teacher=Decoder(2.0)),
        "slope: was float32 of shape",
    ),
    "teacher in Pyro's store": (
        lambda: settings(teacher=frozen_with_store(1.0)),
        lambda: settings(teacher=frozen_with_store(2.0)),
        r"teacher's pyro.param \"teacher's slope\"",
    ),
    "closure": (
        lambda: settings(teacher=closed_over({"slope": 1.0})),
        lambda: settings(teacher=closed_over({"slope": 2.0})),
        r"table\['slope'\]: was 1.0, is 2.0",
    ),
    "handler": (
        lambda: settings(teacher=poutine.condition(freeze(Decoder()), {"z": torch.tensor(1.0)})),
        lambda: settings(teacher=poutine.condition(freeze(Decoder()), {"z": torch.tensor(2.0)})),
        r"data\['z'\]: was float32",
    ),
    "partial": (
        lambda: settings(teacher=partial(freeze(Decoder()))),
        lambda: settings(teacher=partial(freeze(Decoder(3.0)))),
        "slope",
    ),
    "loss": (settings, lambda: settings(loss=LocalKD(["x"])), "loss: was .*SurrogateKD, is .*LocalKD"),
    "targets": (settings, lambda: settings(loss=SurrogateKD(["x", "z"])), r"targets: was \['x'\], is \['x', 'z'\]"),
    "latent weight": (
        settings,
        lambda: settings(loss=SurrogateKD(["x"], latent_weight=0.5)),
        "latent_weight: was 0.1, is 0.5",
    ),
    "latent weight by function": (
        lambda: settings(loss=SurrogateKD(["x"], latent_weight=lambda site: 0.1)),
        lambda: settings(loss=SurrogateKD(["x"], latent_weight=lambda site: 0.2)),
        "latent_weight: its code has changed",
    ),
    "divergence": (
        settings,
        lambda: settings(loss=SurrogateKD(["x"], divergence=divergences.reverse_kl)),
        "divergence: was .*kl, is .*reverse_kl",
    ),
    "code of a divergence": (
        lambda: settings(loss=SurrogateKD(["x"], latent_divergence=minus)),
        lambda: settings(loss=SurrogateKD(["x"], latent_divergence=plus)),
        "latent_divergence: was .*minus, is .*plus",
    ),
    "particles": (settings, lambda: settings(loss=SurrogateKD(["x"], num_particles=2)), "num_particles: was 1, is 2"),
    "reduction": (settings, lambda: settings(loss=SurrogateKD(["x"], latent_reduction="mean")), "latent_reduction"),
    "latent form": (settings, lambda: settings(loss=SurrogateKD(["x"], latent_form="value")), "latent_form"),
    "fresh": (settings, lambda: settings(loss=SurrogateKD(["x"], fresh=["z"])), "fresh"),
    "private option": (
        lambda: settings(loss=Scaled(["x"])),
        lambda: settings(loss=Scaled(["x"], factor=2.0)),
        "_factor: was 1.0, is 2.0",
    ),
    "weight": (settings, lambda: with_options(weight=2.0), "weight: was 1.0, is 2.0"),
    "schedule": (
        lambda: with_options(latent_weight=linear(0.0, 1.0, 10)),
        lambda: with_options(latent_weight=linear(0.0, 1.0, 20)),
        "steps: was 10, is 20",
    ),
    "arguments": (settings, lambda: with_options(arguments=lambda rows: (rows + 1,)), "arguments: was None"),
    "accumulate": (settings, lambda: with_options(accumulate=2), "accumulate: was 1, is 2"),
    "clipping": (settings, lambda: with_options(clip_norm=1.0), "clip_norm: was None, is 1.0"),
    "learning rate": (
        settings,
        lambda: settings(optim=lambda params: torch.optim.Adam(params, lr=0.1)),
        "optimiser: lr: was 0.05, is 0.1",
    ),
    "number of rows": (settings, lambda: settings(rows=11), "arguments: was rows=10, is rows=11"),
    "data length": (
        lambda: settings(teacher=gaussian(1.0), batches=[3] * 5),
        lambda: settings(teacher=gaussian(1.0), batches=[3] * 6),
        "batches: was 5, is 6",
    ),
    "data in a closure": (
        lambda: settings(teacher=gaussian(ROWS[:2]), batches=[2] * 4),
        lambda: settings(teacher=gaussian(ROWS[1:3]), batches=[2] * 4),
        "loc: was float32",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_a_different_run_is_refused(tmp_path, change):
    one, two, message = CHANGES[change]
    student = {} if "data" in change else {"student": Decoder(0.0)}
    first = fit(tmp_path, 2, **student, **one())
    with pytest.raises(
        errors.RunMismatchError, match=f"belongs to a different run. What differs: .*({message}).*allow_changes=True"
    ) as error:
        fit(tmp_path, 4, resume=True, **student, **two())
    assert len(str(error.value)) < 2000
    student = {} if "data" in change else {"student": Decoder(0.0)}
    assert fit(tmp_path, 4, resume=True, **student, **one()).num_steps == 4
    student = {} if "data" in change else {"student": Decoder(0.0)}
    assert fit(tmp_path, 6, resume=True, allow_changes=True, **student, **two()).num_steps == 6
    assert first.num_steps == 2


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    fit(tmp_path, 2, **settings(student=Decoder(0.0)))
    student = Decoder(0.25)
    state = torch.get_rng_state()
    with pytest.raises(errors.RunMismatchError):
        fit(tmp_path, 4, resume=True, **settings(student=student, loss=LocalKD(["x"])))
    assert student.slope.item() == 0.25
    assert torch.equal(torch.get_rng_state(), state)


def test_a_changed_global_of_a_teacher_is_a_different_run(tmp_path, monkeypatch):
    fit(tmp_path, 2, student=Decoder(0.0), teacher=by_global)
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", torch.tensor(2.0))
    with pytest.raises(errors.RunMismatchError, match="GLOBAL: was float32"):
        fit(tmp_path, 4, resume=True, student=Decoder(0.0), teacher=by_global)


def registering(slope):
    """A teacher that registers its module when it first runs."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, slope)

    def model(rows):
        pyro.module("teacher", net)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net.weight.squeeze() * z, 1.0))

    return freeze(model)


def test_a_frozen_program_that_registers_a_module_in_its_first_run_is_the_same_in_a_second_fit(tmp_path):
    teacher = registering(1.0)
    fit(tmp_path, 2, student=Decoder(0.0), teacher=teacher)
    assert fit(tmp_path, 4, resume=True, student=Decoder(0.0), teacher=teacher).num_steps == 4
    assert fit(tmp_path, 6, resume=True, student=Decoder(0.0), teacher=registering(1.0)).num_steps == 6, "a new process"
    with pytest.raises(errors.RunMismatchError, match="weight: was float32"):
        fit(tmp_path, 8, resume=True, student=Decoder(0.0), teacher=registering(2.0))


def test_what_a_module_loads_from_the_store_in_its_first_run_is_the_same_in_a_second_fit(tmp_path):
    """The frozen program's store has trained values, which the module takes over when it first runs."""
    pyro.clear_param_store()
    pyro.module("teacher", nn.Linear(1, 1, bias=False))
    teacher = registering(1.0)
    fit(tmp_path, 2, student=Decoder(0.0), teacher=teacher)
    assert fit(tmp_path, 4, resume=True, student=Decoder(0.0), teacher=teacher).num_steps == 4


def test_a_different_run_is_refused_by_its_path_too(tmp_path):
    fit(tmp_path, 2, **settings(student=Decoder(0.0)))
    with pytest.raises(errors.RunMismatchError, match="slope"):
        fit(None, 4, resume=tmp_path / "step-00000002", **settings(student=Decoder(0.0), teacher=freeze(Decoder(2.0))))


def test_a_changed_replay_or_weight_is_a_different_run(tmp_path):
    def train(slope, steps, weight=0.5):
        pyro.clear_param_store()
        old = Decoder(slope)
        objectives = {
            "new": ELBOObjective(Trace_ELBO(), elbo_model, lambda rows: None, weight=weight),
            "old": DistillationObjective(
                SurrogateKD(["x"]), Decoder(0.0), freeze(old), arguments=Replay(old, ["x"], lambda x, rows: (rows,))
            ),
        }
        Trainer(objectives, sgd).fit(3, steps=steps, checkpoints=tmp_path, resume=True, progress=False)

    def elbo_model(rows):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))

    train(1.0, 2)
    train(1.0, 4)
    with pytest.raises(errors.RunMismatchError, match="old: teacher.*slope.*|old: arguments.*slope"):
        train(2.0, 6)
    with pytest.raises(errors.RunMismatchError, match="new: weight: was 0.5, is 0.75"):
        train(1.0, 6, weight=0.75)


def test_what_training_changes_is_no_difference(tmp_path):
    """The student's own tensors, reached through a schedule or a closure; the attributes that a loss learns; guesses of Pyro."""
    loss = SurrogateKD(["x"], num_particles=2, vectorize_particles=True)
    for steps in (2, 4, 6):
        student = Decoder(0.0)
        distiller = Distiller(
            student,
            freeze(Decoder()),
            adam,
            loss,
            arguments=lambda rows, student=student: (rows + 0 * int(student.slope > 9),),
        )
        distiller.fit(5, steps=steps, checkpoints=Checkpoints(tmp_path, every=1), resume=True, progress=False)
        distiller.fit(5, steps=1, checkpoints=tmp_path / f"more-{steps}", progress=False)
    assert distiller.num_steps == 7
    assert fit(tmp_path / "eager", 2).num_steps == 2
    compiled = SurrogateKD(["x"]).compile(backend=None)
    assert fit(tmp_path / "eager", 4, loss=compiled, resume=True).num_steps == 4, "how it is computed is no difference"


def test_a_data_loader_is_described_by_its_length(tmp_path):
    def train(rows, steps):
        pyro.clear_param_store()
        loader = DataLoader(TensorDataset(torch.zeros(rows)), batch_size=4)
        distiller = Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"]), arguments=lambda x: (len(x),))
        distiller.fit(batches=loader, steps=steps, checkpoints=tmp_path, resume=True, progress=False)

    train(8, 2)
    train(8, 4)
    with pytest.raises(errors.RunMismatchError, match="rows: was 8, is 7"):
        train(7, 6)
