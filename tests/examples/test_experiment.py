"""The frame of the experiments: options, cached teachers, finished seeds, training, names, and how figures are written."""

import importlib
import json
import os
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import examples
from examples import helmholtz
from examples._experiment import TOO_SHORT, Experiment, Place, Settings, fingerprint, run
from examples._methods import explain
from examples._tables import Table, cell, estimates, over_seeds
from examples._training import batches_of, distil, learn
from pyro_kd import freeze
from pyro_kd.metrics import Estimate
from pyro_kd.training import DistillationObjective, Trainer
from tests.support.losses import SurrogateKD

EXAMPLES = {path.stem for path in Path(examples.__file__).parent.glob("[!_]*.py")}


@dataclass(frozen=True)
class ToySettings(Settings):
    steps: int = 3
    widths: tuple[int, ...] = (1, 2)
    careful: bool = True


def toy(calls):
    def run_seed(seed, settings, place):
        calls.append((seed, settings))
        return {"models": {"a": {"x": float(seed), "drawn": torch.rand(()).item()}}}

    def tables(runs):
        return {"t": Table("A title", ["x", "drawn"], estimates(runs, ["x", "drawn"]), "a: a model.")}

    return Experiment("toy", "doc", {"smoke": ToySettings(steps=1), "cpu": ToySettings()}, run_seed, tables)


def test_options_change_the_settings_of_a_preset(tmp_path):
    calls = []
    place = ["--out", str(tmp_path)]
    run(toy(calls), [*place, "--preset", "smoke"])
    place = ["--out", str(tmp_path / "other")]
    run(toy(calls), [*place, "--steps", "7", "--widths", "4", "5", "6", "--no-careful", "--seed", "5", "--seeds", "2"])
    assert calls[0] == (0, ToySettings(steps=1))
    assert calls[1:] == [(seed, ToySettings(steps=7, widths=(4, 5, 6), careful=False)) for seed in (5, 6)]
    with pytest.raises(SystemExit):
        run(toy(calls), [*place, "--unknown", "1"])


def test_seeds_run_separately_are_put_together_with_reuse(tmp_path, capsys):
    calls = []
    for seed in ("1", "0"):
        run(toy(calls), ["--out", str(tmp_path), "--seed", seed, "--seeds", "1"])
    results = run(toy(calls), ["--out", str(tmp_path), "--seeds", "3", "--reuse"])
    assert [seed for seed, _ in calls] == [1, 0, 2]
    assert [found["seed"] for found in results["runs"]] == [0, 1, 2]
    assert results["tables"]["t"]["cells"][1][:2] == ["a", "1.00 ± 0.58"]
    assert "1.00 ± 0.58" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    run(toy(calls), ["--out", str(tmp_path), "--seeds", "1"])
    assert [seed for seed, _ in calls] == [1, 0, 2, 0]  # run again without --reuse
    with pytest.raises(SystemExit, match=r"seed-0.json is from a run with a different steps: choose a different folder"):
        run(toy(calls), ["--out", str(tmp_path), "--seeds", "1", "--steps", "9"])
    assert len(calls) == 4


def test_ctrl_c_keeps_nothing_half_trained(tmp_path):
    """The loop ends cleanly at the first Ctrl-C; the experiment must not keep the half-trained module as a teacher."""

    def run_seed(seed, settings, place):
        net = torch.nn.Linear(1, 1)

        def student(rows):
            pyro.module("net", net)
            if trainer.num_steps == 3:
                os.kill(os.getpid(), signal.SIGINT)
            with pyro.plate("rows", rows):
                pyro.sample("x", dist.Normal(net(torch.ones(rows, 1)).squeeze(-1), 1.0))

        trainer = Trainer(
            DistillationObjective(SurrogateKD(["x"]), student, teacher), lambda params: torch.optim.SGD(params, lr=0.1)
        )
        place.trained(net, {"seed": seed}, lambda: trainer.fit(5, steps=1000, progress=False))
        return {"models": {}}

    def teacher(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(3.0, 1.0))

    experiment = Experiment("toy", "doc", {"cpu": Settings()}, run_seed, lambda runs: {})
    with pytest.raises(KeyboardInterrupt):
        run(experiment, ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert not list(tmp_path.rglob("*.pt"))
    assert not list(tmp_path.rglob("*.json"))


def test_a_seed_gives_the_same_numbers_alone_and_after_earlier_seeds(tmp_path):
    alone = run(toy([]), ["--out", str(tmp_path / "a"), "--seed", "1", "--seeds", "1"])
    after = run(toy([]), ["--out", str(tmp_path / "b"), "--seeds", "2"])
    assert alone["runs"][0]["models"] == after["runs"][1]["models"]


def test_a_teacher_is_trained_once(tmp_path, capsys):
    place, trained = Place(tmp_path / "out", tmp_path / "cache"), []

    def train(module, value):
        def fit():
            trained.append(value)
            torch.nn.init.constant_(module.weight, value)

        return fit

    first, second, other = (torch.nn.Linear(2, 2) for _ in range(3))
    place.trained(first, {"seed": 0}, train(first, 3.0))
    place.trained(second, {"seed": 0}, train(second, 4.0))
    place.trained(other, {"seed": 1}, train(other, 5.0))
    wide = torch.nn.Linear(3, 2)
    place.trained(wide, {"seed": 0}, train(wide, 6.0))
    assert trained == [3.0, 5.0, 6.0]
    assert second.weight[0, 0] == 3.0
    assert capsys.readouterr().out.count("trained before") == 1


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (123.456, 1.2, "123.5 ± 1.2"),
        (0.0123456, 0.00021, "0.01235 ± 0.00021"),
        (5.0, 0.0, "5.0 ± 0.0"),
        (54.0, float("nan"), "54"),
        (0.5123, float("nan"), "0.51"),
        (float("nan"), float("nan"), "-"),
        (1234.5, 170.0, "1234 ± 170"),
        (4.4e12, 1.5e11, "4.4e+12 ± 1.5e+11"),
    ],
)
def test_figures_are_written_to_two_digits_of_their_error(mean, error, text):
    assert cell(Estimate(mean, error, 3)) == text


def test_the_mean_and_standard_error_over_seeds():
    found = over_seeds([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.standard_error == pytest.approx((7 / 3) ** 0.5)


def test_a_fingerprint_tells_contents_and_shapes_apart():
    x = torch.arange(6.0)
    assert fingerprint(x) == fingerprint(x.clone())
    assert len({fingerprint(x), fingerprint(x.reshape(2, 3)), fingerprint(x + 1), fingerprint(x, x)}) == 4


@pytest.mark.parametrize(("preset", "is_short"), [("smoke", True), ("cpu", False)])
def test_only_the_smoke_preset_says_that_it_is_too_short(preset, is_short, tmp_path, capsys):
    run(toy([]), ["--preset", preset, "--out", str(tmp_path)])
    assert (TOO_SHORT in capsys.readouterr().out) == is_short


def test_the_note_of_a_table_is_printed_and_kept(tmp_path, capsys):
    results = run(toy([]), ["--out", str(tmp_path)])
    assert "a: a model." in capsys.readouterr().out
    assert results["tables"]["t"]["note"] == "a: a model."


def test_the_names_in_a_table_are_explained():
    names = ["teacher", "local, KL, weight 1", "local, KL, weight 2", "surrogate (ours), weight 1"]
    found = explain(names, {"weight": "a number"})
    assert [part.split(":")[0] for part in found.split("; ")] == ["teacher", "local", "surrogate (ours)", "weight"]
    assert explain(["other"]) == ""


def program_of(net):
    def program(rows):
        pyro.module("net", net)
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(net(torch.ones(rows, 1)).squeeze(-1), 1.0))

    return program


@pytest.mark.parametrize("cosine", [True, False])
def test_training_uses_the_settings_and_leaves_no_parameter_behind(cosine, monkeypatch):
    made = []

    class Adam(torch.optim.Adam):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("torch.optim.Adam", Adam)
    settings = Settings(learning_rate=0.25, weight_decay=0.5, cosine=cosine)
    nets = [torch.nn.Linear(1, 1) for _ in range(2)]
    teacher = freeze(program_of(torch.nn.Linear(1, 1)))
    pyro.param("left", torch.zeros(()))
    options = {"steps": 4, "settings": settings, "label": "test"}
    objective = DistillationObjective(SurrogateKD(["x"]), program_of(nets[0]), teacher, arguments=lambda x: (len(x),))
    trainers = [
        learn(objective, batches=batches_of(3, torch.zeros(7)), **options),
        distil(program_of(nets[1]), teacher, SurrogateKD(["x"]), 3, weight=1 / 3, **options),
    ]
    assert not list(pyro.get_param_store())
    for net, trainer, optim in zip(nets, trainers, made, strict=True):
        (group,) = optim.param_groups
        assert set(group["params"]) == set(net.parameters())
        assert group["initial_lr" if cosine else "lr"] == 0.25
        assert group["lr"] == (0.0 if cosine else 0.25)
        assert group["weight_decay"] == 0.5
        assert trainer.num_steps == 4


def test_the_last_incomplete_batch_is_dropped():
    assert [len(rows) for (rows,) in batches_of(3, torch.arange(7.0))] == [3, 3]


@pytest.mark.parametrize(
    ("option", "number", "least"),
    [
        ("--seeds", "0", 1), ("--seed", "-1", 0), ("--steps", "0", 1), ("--rows", "-3", 1), ("--starts", "0", 1),
        ("--samples", "0", 1), ("--teacher-width", "-1", 1),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_with_the_option(option, number, least, capsys):
    with pytest.raises(SystemExit):
        helmholtz.main(["--preset", "smoke", f"{option}={number}"])
    assert f"argument {option}: must be at least {least}, not {number}" in capsys.readouterr().err


def test_each_of_several_numbers_is_checked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(toy([]), ["--out", str(tmp_path), "--widths", "2", "0"])
    assert "argument --widths: must be at least 1, not 0" in capsys.readouterr().err


def test_what_can_be_left_out_may_be_zero(tmp_path):
    calls = []
    run(replace(toy(calls), may_be_zero=("steps",)), ["--out", str(tmp_path), "--seeds", "1", "--steps", "0"])
    assert calls == [(0, ToySettings(steps=0))]


@pytest.mark.parametrize("name", sorted(EXAMPLES - {"results"}))
def test_the_presets_of_every_example_keep_to_its_command_line(name):
    """A setting that may be 0 is named by its experiment."""
    experiment = importlib.import_module(f"examples.{name}").EXPERIMENT
    for preset in experiment.presets.values():
        for key, value in asdict(preset).items():
            numbers = value if isinstance(value, tuple) else [value]
            assert key in experiment.may_be_zero or all(type(number) is not int or number >= 1 for number in numbers), key
        assert {*experiment.may_be_zero} <= asdict(preset).keys()
