"""Shorter chains: what the bounds are where layers have no counterpart, the law of y, and the smoke preset."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from examples import shallow_chain
from examples._chain_laws import kl_of_laws, normal_law
from models.chains import BlockStudent, NormalChain, NormalStudent
from pyro_kd import LocalKD, freeze
from pyro_kd.metrics import Estimate
from tests.support.estimates import assert_within
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run

SCALE = 0.1


def walk(*scales):
    """A student of the random walk: each transition adds N(0, scale^2)."""
    student = NormalStudent(len(scales), learn_scale=True, identity=True)
    student.log_scale.data = torch.tensor(scales).log()
    return student


def students(layers, student_layers):
    return shallow_chain.students_of(shallow_chain.ShallowChainSettings(layers=layers, student_layers=student_layers))


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_states_that_mean_the_same_are_paired(kind):
    teacher, last = freeze(NormalChain(6).model), students(6, 2)[shallow_chain.LAST]
    assert last.options == {"site_map": {"z_1": "z_1", "z_2": "z_4"}, "fresh": ["z_2", "z_3", "z_5", "z_6"]}
    run = only_run(last.loss(kind, 1.0), last.new().model, teacher, 3)
    assert [pair.name for pair in run.pairs] == ["z_1", "z_4", "y"]
    assert run.pairs[1].is_given is (kind is LocalKD)
    assert_close(run.student.nodes["z_2"]["value"], run.pairs[1].student_value)


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_noise_between_the_states_is_shared_and_not_compared(kind):
    teacher, every = freeze(NormalChain(6).model), students(6, 2)[shallow_chain.ALL]
    (particle,) = every.loss(kind, 0.5).particles(every.new().model, teacher, 3)
    weights = {term.name: term.weight for term in particle.terms if term.weight}
    assert weights == {"z_1": 0.5, "z_4": 0.5, "y": 1.0}
    for pair in particle.run.pairs:
        if pair.name in ("z_2", "z_3", "z_5", "z_6"):
            assert_close(pair.student_value, (pair.value - pair.p.loc) / pair.p.scale)


def test_transitions_that_do_not_divide_are_an_error():
    for short in (4, 10):
        with pytest.raises(ValueError, match=f"the student's {short} transitions must be a divisor of the teacher's 10"):
            students(10, short)


@pytest.mark.parametrize(
    ("scales", "surrogate", "local"),
    [
        # A scale of 2 s for four transitions with s: by hand, a normal mean with variance 19 s^2 apart, and five steps of log 2.
        ([2 * SCALE] * 5, math.log(2) + (1 + 19) / 8 - 0.5, 5 * math.log(2)),
        # The minimum of the surrogate loss: states with the shared noise alone, and a last step with all the rest.
        ([SCALE] * 4 + [4 * SCALE], math.log(4) + (1 + 15) / 32 - 0.5, None),
    ],
    ids=["four in one", "least surrogate loss"],
)
def test_two_students_with_the_exact_law_have_bounds_above_0(scales, surrogate, local):
    """A random walk of 20 steps into 5. What the noise of fresh layers decides stays in the bounds."""
    teacher, student = NormalChain(20, power=1.0, scale=SCALE), walk(*scales)
    assert kl_of_laws(
        *(shallow_chain.law_of(chain, points=1001, reach=5.0) for chain in (teacher, student))
    ) == pytest.approx(0, abs=1e-8)
    program, last = freeze(teacher.model), students(20, 5)[shallow_chain.LAST]
    for loss, truth in ((last.loss(SurrogateKD, 0.0), surrogate), (last.loss(LocalKD, 1.0), local)):
        if truth is not None:
            values = [loss.loss(student.model, program, 4000) / 4000 for _ in range(10)]
            assert_within(Estimate.of(torch.tensor(values)), truth)


def test_the_density_of_a_short_chain_is_that_of_its_law():
    torch.manual_seed(0)
    student = NormalStudent(3, scale=0.2, learn_scale=True)
    law = normal_law(student, points=1201, reach=3.0)
    grid = torch.linspace(-3.0, 3.0, 1201)
    found = shallow_chain.log_density(student, grid).detach().exp()
    assert_close(found.double(), law / (6 / 1200), rtol=1e-3, atol=1e-5)


def test_the_law_is_that_of_transition_matrices():
    torch.manual_seed(0)
    for chain in (NormalChain(4), NormalStudent(3, scale=0.2)):
        expected = normal_law(chain, points=501, reach=5.0)
        found = shallow_chain.law_of(chain, points=5001, reach=5.0)
        assert_close(found[::10] * 10, expected, rtol=1e-2, atol=1e-7)


def test_the_law_with_noise_inputs_is_that_of_samples():
    """Counts in intervals of the states, within 5 standard errors."""
    torch.manual_seed(0)
    student, rows = BlockStudent(2, 3), 100_000
    law = shallow_chain.law_of(student, points=4001, reach=5.0)
    assert float(law.sum()) == pytest.approx(1)
    with torch.no_grad():
        y = student.model(rows).double()
    index = ((y + 5) / (10 / 4000)).round().long().clamp(0, 4000) // 100
    found, expected = torch.bincount(index, minlength=41).double() / rows, torch.stack([p.sum() for p in law.split(100)])
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt() + 2 / rows).all()


def test_the_smoke_preset_runs(tmp_path, capsys):
    results = shallow_chain.main(["--preset", "smoke", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert len(results["runs"][0]["models"]) == 11
    for name, figures in results["runs"][0]["models"].items():
        assert name in printed
        assert set(figures) == set(shallow_chain.MEASURES)
        assert all(math.isfinite(value) for value in figures.values())
        assert min(figures.values()) > 0
