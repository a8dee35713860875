"""A run is resumed as itself: the fingerprint of teacher, loss and data; one run a folder at a time."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, LocalKD, SurrogateKD, divergences, errors, freeze
from pyro_kd.training import Callback, Objective, Replay, Trainer, linear
from pyro_kd.training.fingerprint import Fingerprint, differences
from tests.support.training_programs import adam, fit, gaussian, mean, names, sgd


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
        "latent_weight: its code was another",
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
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    one, two, message = CHANGES[change]
    student = {} if "data" in change else {"student": Decoder(0.0)}
    first = fit(tmp_path, 2, **student, **one())
    with pytest.raises(
        errors.RunMismatchError, match=f"another run. What differs: .*({message}).*allow_changes=True"
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


def test_globals_of_a_teacher(tmp_path, monkeypatch):
    fit(tmp_path, 2, student=Decoder(0.0), teacher=by_global)
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", torch.tensor(2.0))
    with pytest.raises(errors.RunMismatchError, match="GLOBAL: was float32"):
        fit(tmp_path, 4, resume=True, student=Decoder(0.0), teacher=by_global)


def test_another_run_is_refused_by_its_path_too(tmp_path):
    fit(tmp_path, 2, **settings(student=Decoder(0.0)))
    with pytest.raises(errors.RunMismatchError, match="slope"):
        fit(None, 4, resume=tmp_path / "step-00000002", **settings(student=Decoder(0.0), teacher=freeze(Decoder(2.0))))


def test_a_trainer_with_replay(tmp_path):
    def train(slope, steps, weight=0.5):
        pyro.clear_param_store()
        old = Decoder(slope)
        objectives = {
            "new": Objective(Trace_ELBO(), elbo_model, lambda rows: None, weight=weight),
            "old": Objective(
                SurrogateKD(["x"]), Decoder(0.0), freeze(old), arguments=Replay(old, ["x"], lambda x, rows: (rows,))
            ),
        }
        Trainer(objectives, sgd).fit(3, steps=steps, checkpoint=tmp_path, resume=True, progress=False)

    def elbo_model(rows):
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0), obs=torch.tensor(1.0))

    train(1.0, 2)
    train(1.0, 4)
    with pytest.raises(errors.RunMismatchError, match="old: teacher.*slope.*|old: arguments.*slope"):
        train(2.0, 6)
    with pytest.raises(errors.RunMismatchError, match="new: weight: was 0.5, is 0.75"):
        train(1.0, 6, weight=0.75)


def test_what_changes_as_a_run_goes_on_is_no_difference(tmp_path):
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
        distiller.fit(5, steps=steps, checkpoint=tmp_path, checkpoint_every=1, resume=True, progress=False)
        distiller.fit(5, steps=1, checkpoint=tmp_path / f"more-{steps}", progress=False)
    assert distiller.num_steps == 7
    assert fit(tmp_path / "eager", 2).num_steps == 2
    compiled = SurrogateKD(["x"]).compile(backend=None)
    assert fit(tmp_path / "eager", 4, loss=compiled, resume=True).num_steps == 4, "how it is computed is no difference"


def test_a_data_loader_by_its_length(tmp_path):
    def train(rows, steps):
        pyro.clear_param_store()
        loader = DataLoader(TensorDataset(torch.zeros(rows)), batch_size=4)
        distiller = Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"]), arguments=lambda x: (len(x),))
        distiller.fit(batches=loader, steps=steps, checkpoint=tmp_path, resume=True, progress=False)

    train(8, 2)
    train(8, 4)
    with pytest.raises(errors.RunMismatchError, match="rows: was 8, is 7"):
        train(7, 6)


DESCRIBE = """
import json, functools, sys
sys.path[:0] = {path!r}
from tests.training.test_runs import objects_to_describe
from pyro_kd.training.fingerprint import Fingerprint
fingerprint = Fingerprint()
for name, value in objects_to_describe().items():
    fingerprint.add(name, value)
print(json.dumps(fingerprint.found))
"""


def objects_to_describe():
    """Things whose repr differs from process to process, or whose order does."""
    names = {"alpha", "beta", "gamma", "delta"}
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.ones_(net[0].weight), nn.init.zeros_(net[0].bias)
    return {
        "set": names,
        "function": lambda site: site in {"alpha", "beta", "gamma", "delta"},
        "closure": lambda site: site in names,
        "object": object(),
        "generator": torch.Generator(),
        "module": net,
        "scripted": torch.jit.script(nn.Linear(1, 1, bias=False).requires_grad_(False).to_empty(device="meta")),
        "array": np.arange(5),
        "many": list(range(5000)),
        "tensors": [torch.arange(3) + i for i in range(100)],
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "distribution": dist.Categorical(torch.ones(3)),
    }


def test_a_fingerprint_is_the_same_in_every_process():
    found = []
    for seed in ("1", "2"):
        code = DESCRIBE.format(path=[os.getcwd()])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        found.append(json.loads(done.stdout))
    assert differences(*found) == []
    assert " at 0x" not in json.dumps(found[0])
    assert len(found[0]) < 200


def test_what_was_looked_at_before_is_no_difference():
    """Lazily computed attributes of distributions."""
    one, two = (dist.Categorical(torch.ones(3)) for _ in range(2))
    two.logits.sum()
    found = []
    for value in (one, two):
        fingerprint = Fingerprint()
        fingerprint.add("law", value)
        found.append(fingerprint.found)
    assert differences(*found) == []


def test_code_is_compared_within_one_version_of_python():
    then = {"python": "3.11", "f()": "#1", "x": "1"}
    assert differences(then, then | {"f()": "#2"}) == ["f: its code was another"]
    assert differences(then, {"python": "3.12", "f()": "#2", "x": "1"}) == []
    assert differences(then, {"python": "3.12", "f()": "#2", "x": "2"}) == ["x: was 1, is 2"]


# One run a folder.


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    class Second(Callback):
        def on_step(self, trainer, row):
            for resume in (False, True):
                with pytest.raises(errors.FolderInUseError, match="another training run writes.*Nothing was trained"):
                    Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"])).fit(
                        10, steps=2, checkpoint=tmp_path, resume=resume, progress=False
                    )

    assert fit(tmp_path, 4, callbacks=[Second()]).num_steps == 4
    assert fit(tmp_path, 6, resume=True).num_steps == 6


HOLDER = """
import sys, time, os
from pathlib import Path
from pyro_kd.training.lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2] == "fork":
        if os.fork() == 0:
            print("held", flush=True)
            time.sleep(60)
    else:
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process as POSIX does")
@pytest.mark.parametrize("how", ["plain", "fork"])
def test_another_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path, how):
    """Also where a child of the dead one lives on, as the workers of a DataLoader do for a while."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path), how]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(errors.FolderInUseError):
            fit(tmp_path)
        assert names(tmp_path) == []
        holder.kill()
        holder.wait()
        assert fit(tmp_path).num_steps == 4
    finally:
        with suppress(ProcessLookupError):  # nobody is left of it
            os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"):
        assert fit(tmp_path).num_steps == 4
