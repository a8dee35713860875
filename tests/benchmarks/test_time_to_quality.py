"""Time to quality: when a curve reaches a quality, what the clock counts, and short runs of every application."""

import json
import logging
import statistics
import time

import pytest
import torch

from examples._experiment import Place
from examples.results import fill
from tests.benchmarks.time_to_quality.__main__ import main
from tests.benchmarks.time_to_quality.clock import Clock
from tests.benchmarks.time_to_quality.curves import final_quality, time_to
from tests.benchmarks.time_to_quality.isolation import alone
from tests.benchmarks.time_to_quality.problems import PROBLEMS
from tests.benchmarks.time_to_quality.report import NAME, by_variant, ratios, table, to_page
from tests.benchmarks.time_to_quality.training import checkpoints_of, compile_all, train
from tests.benchmarks.time_to_quality.variants import LOOP, Variant, variants
from tests.support.package_files import ROOT


@pytest.fixture
def one_thread():
    """A run in this process takes one thread: afterwards there are as many as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_between_checkpoints_the_curve_is_a_straight_line():
    assert time_to([0.0, 10.0, 20.0], [8.0, 4.0, 0.0], 5.0) == 7.5
    assert time_to([0.0, 10.0, 20.0], [8.0, 4.0, 0.0], 4.0) == 10.0
    assert time_to([3.0, 10.0], [1.0, 0.5], 1.0) == 3.0  # good from the start


def test_a_quality_that_is_never_reached_has_no_time():
    assert time_to([0.0, 1.0, 2.0], [3.0, 2.0, 1.5], 1.4) is None
    assert time_to([0.0, 1.0], [float("nan")] * 2, 1.0) is None


def test_one_lucky_checkpoint_is_not_enough():
    values = [9.0, 1.0, 8.0, 7.0, 2.0, 1.0, 1.0]
    assert time_to(list(range(7)), values, 2.0) == 4.0
    assert time_to([0, 1, 2], [9.0, 8.0, 1.0], 2.0) == pytest.approx(1 + 6 / 7)  # at the end nothing comes after it
    assert time_to([0, 1, 2, 3], [9.0, 1.0, 8.0, 1.0], 1.0) == 1.0  # one unlucky checkpoint is no harm


def test_a_time_from_a_noisy_curve_is_near_that_of_the_curve():
    """A slope of 1, so that noise is worth as much in time; and never earlier than the first checkpoint that is good by luck."""
    seconds = [float(t) for t in range(101)]
    noise, found, by_luck = 2.0, [], []
    for seed in range(200):
        errors = noise * torch.randn(101, generator=torch.Generator().manual_seed(seed))
        values = [100.0 - t + float(error) for t, error in zip(seconds, errors, strict=True)]
        found.append(time_to(seconds, values, 40.0))
        by_luck.append(next(t for t, value in zip(seconds, values, strict=True) if value <= 40.0))
    assert abs(statistics.mean(found) - 60.0) < noise
    assert all(time > lucky - 1 for time, lucky in zip(found, by_luck, strict=True))
    assert any(time > lucky for time, lucky in zip(found, by_luck, strict=True))


def test_the_final_quality_is_the_median_of_the_last_checkpoints():
    assert final_quality([9.0, 3.0, 1.0, 2.0]) == 2.0
    assert final_quality([4.0]) == 4.0


def run_of(seed, variant, wall, cpu, values):
    return {
        "model": "toy",
        "seed": seed,
        "variant": variant.to_json(),
        "sizes": "small",
        "measures": {"kl": "KL"},
        "steps": list(range(len(wall))),
        "wall": wall,
        "cpu": cpu,
        "values": {"kl": values},
    }


def test_ratios_are_of_the_loop_of_the_same_seed():
    fast = Variant("library", "local first", reuse=8)
    runs = [
        run_of(0, LOOP, [0, 5, 10, 15, 20], [0, 4, 8, 12, 16], [5, 4, 1, 1, 1]),
        run_of(0, fast, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 1, 0.5, 0.5, 0.5]),
        run_of(1, LOOP, [0, 5, 10, 15, 20], [0, 4, 8, 12, 16], [5, 1, 0.1, 0.1, 0.1]),
        run_of(1, fast, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 1, 0.5, 0.5, 0.5]),
    ]
    loops = {run["seed"]: run for run in runs if run["variant"]["who"] == "loop"}
    assert ratios(by_variant(runs)[fast], loops, "kl", "wall") == [1 / 20, None]
    assert ratios(by_variant(runs)[fast], loops, "kl", "cpu") == [1 / 16, None]
    assert ratios(by_variant(runs)[fast], loops, "kl", "steps") == [1 / 4, None]
    assert ratios(by_variant(runs)[LOOP], loops, "kl", "wall") == [0.5, 0.5]
    cells = {row[0]: row[1:] for row in table(runs).cells}
    assert cells["library, local first, m = 8"][2] == "0.062 (1 of 2)"
    never = [runs[0], run_of(0, fast, [0, 1, 2], [0, 1, 2], [5, 4, 3])]
    assert {row[0]: row[1:] for row in table(never).cells}["library, local first, m = 8"][2] == "never"


def test_the_clock_stops_and_counts_the_processor():
    clock = Clock()
    with clock.paused():
        time.sleep(0.05)
        sum(i * i for i in range(200_000))
    wall, cpu = clock.seconds()
    assert 0 <= wall < 0.04
    assert 0 <= cpu < 0.04
    begin = time.process_time()
    while time.process_time() < begin + 0.02:
        pass
    later = clock.seconds()
    assert later[1] - cpu >= 0.02
    assert later[0] - wall >= 0.019


def test_checkpoints_end_with_the_last_step_and_are_closer_in_the_beginning():
    for steps in (1, 2, 15, 400, 1000):
        found = checkpoints_of(steps)
        assert found[0] == 1
        assert found[-1] == steps
        assert found == sorted(set(found))
    assert len(checkpoints_of(1000)) < 30


def test_every_combination_of_options_has_a_name_of_its_own():
    made = variants(["local first", "paper"], [1.0, 0.25], [1, 8], ["off", "on", "background", "cached"], ["own", "teacher"])
    assert len({variant.name for variant in made}) == len({variant.key for variant in made}) == len(made) == 68
    assert made[0] == LOOP


def test_a_run_is_a_function_of_its_seed(tmp_path):
    """Two runs of one seed are equal, however often the random streams were used for measuring."""
    settings = PROBLEMS["chain"].PRESETS["smoke"]
    problem = PROBLEMS["chain"].build(0, settings, Place(tmp_path, tmp_path))
    for variant in (LOOP, Variant("library", "local first", reuse=2)):
        often = train(problem, variant, 0)
        again = train(problem, variant, 0)
        assert often["values"] == again["values"]
        assert often["steps"] == [0, *checkpoints_of(settings.steps)]


def test_the_library_with_the_papers_loss_goes_the_loops_way(tmp_path):
    """Same start, and the same descent: one step differs from the other in its noise alone."""
    settings = PROBLEMS["chain"].PRESETS["smoke"]
    problem = PROBLEMS["chain"].build(0, settings, Place(tmp_path, tmp_path))
    starts = [torch.nn.utils.parameters_to_vector(problem.trained(problem.student())) for _ in range(2)]
    assert torch.equal(*starts)
    loop = train(problem, LOOP, 0)["values"]["kl"]
    library = train(problem, Variant("library", "paper"), 0)["values"]["kl"]
    assert library[0] == loop[0]
    assert abs(library[-1] - loop[-1]) < abs(loop[-1] - loop[0]) / 10


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[] if name in ("chain", "helmholtz") else [pytest.mark.slow]) for name in PROBLEMS]
)
def test_a_short_run(model, tmp_path, one_thread):
    arguments = ["--preset", "smoke", "--models", model, "--seeds", "1", "--reuse", "1", "2", "--compile", "off"]
    arguments += ["--out", str(tmp_path / NAME), "--cache", str(tmp_path / "cache")]
    results = main(arguments, isolated=False)
    cells = results["tables"][model]["cells"]
    assert cells[1][0] == "loop"
    assert len(cells) == 4
    assert (tmp_path / NAME / f"{model}.png").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / NAME).glob(f"{model}-*.json")}
    assert len(written) == 3
    main(arguments, isolated=False)  # nothing is run again
    assert {path: path.stat().st_mtime_ns for path in written} == written
    page = tmp_path / "page.md"
    page.write_text(f"Prose.\n<!-- table {NAME} {model} -->\n<!-- end -->\n")
    to_page(tmp_path / NAME, page)
    assert "| loop |" in page.read_text()
    assert (tmp_path / "page" / f"{NAME}-{model}.png").exists()


@pytest.mark.parametrize("model", ["helmholtz", pytest.param("vrnn", marks=pytest.mark.slow)])
def test_a_start_from_the_teachers_weights_is_nearer_and_its_steps_count(model, tmp_path, one_thread):
    settings = PROBLEMS[model].PRESETS["smoke"]
    problem = PROBLEMS[model].build(0, settings, Place(tmp_path, tmp_path))
    first = next(iter(problem.measures))
    runs = {
        (who, start): train(problem, Variant(who, problem_objective(model, who), start=start), 0)
        for who in ("loop", "library")
        for start in ("own", "teacher")
    }
    spent = runs["library", "teacher"]["steps"][0]
    assert spent == (4 * max(settings.steps // 50, 1) if model == "helmholtz" else 0)
    for (_, start), run in runs.items():
        assert run["steps"][0] == (spent if start == "teacher" else 0)
        assert run["steps"][-1] == settings.steps
        assert run["cpu"] == sorted(run["cpu"])
    started = {key: run["values"][first][0] for key, run in runs.items()}
    assert started["loop", "own"] == started["library", "own"]
    assert started["loop", "teacher"] == started["library", "teacher"] != started["loop", "own"]


def problem_objective(model, who):
    return "paper" if who == "loop" else PROBLEMS[model].OBJECTIVES[0]


def test_a_teacher_without_weights_gives_no_start(tmp_path):
    problem = PROBLEMS["chain"].build(0, PROBLEMS["chain"].PRESETS["smoke"], Place(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="the teacher has no weights to start from"):
        train(problem, Variant("library", "local first", start="teacher"), 0)


@pytest.mark.slow
def test_a_run_that_was_compiled_before_compiles_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    problem = PROBLEMS["chain"].build(0, PROBLEMS["chain"].PRESETS["smoke"], Place(tmp_path, tmp_path))
    variant = Variant("library", "local first", reuse=2, capture="cached")
    compile_all(problem, variant)
    assert (
        sum("in the background" in record.getMessage() for record in caplog.records) == 3
    )  # draws of the teacher, local steps, and the rest
    caplog.clear()
    train(problem, variant, 0)
    said = [record.getMessage() for record in caplog.records]
    assert sum("compiled, from the cache" in message for message in said) == 3
    assert not any("in the background" in message for message in said)


def threads_and_cache():
    import os

    return os.environ["OMP_NUM_THREADS"], os.path.isdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def test_a_run_alone_has_one_thread_and_an_empty_cache(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    import os

    assert alone(threads_and_cache) == ("1", True)
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_the_page_is_what_the_runs_say():
    page = ROOT / "docs" / "performance.md"
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in page.with_suffix("").glob("*.json")}
    assert NAME in found
    text = page.read_text(encoding="utf-8")
    assert fill(text, found) == text, (
        "python -m tests.benchmarks.time_to_quality --page docs/performance.md has not written it"
    )
