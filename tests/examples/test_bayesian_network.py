"""Bayesian networks: exact laws of the targets, bounds above the exact KL, merged states, and the smoke preset."""

import json
import math

import pyro
import pytest
import torch

from examples import bayesian_network as example
from models.bayesian_network import NeuralBayesianNetwork
from pyro_kd import LocalKD, freeze
from pyro_kd.metrics import Estimate, marginal_kl, marginal_log_prob
from tests.support.losses import SurrogateKD
from tests.support.networks import bif_text, joint_law, random_network

SMALL = ["--preset", "smoke", "--widths", "1", "--steps", "3", "--sample-rows", "50"]
CASES = {"same states": False, "merged states": True}


@pytest.fixture(autouse=True)
def no_parameters():
    pyro.clear_param_store()


def case_of(merge, seed=0, targets=("n5", "n4")):
    """A network, a task, with all ancestors of three states merged into two on request, and a student."""
    network = random_network(seed)
    merged = [name for name in network.ancestral(targets).names if len(network.states[name]) == 3 and name not in targets]
    options = {"targets": ",".join(targets), "merge": ",".join(merged) if merge else ""}
    case = example.task(network, example.BayesianNetworkSettings(**options))
    assert bool(case.fresh) == merge
    return network, case, NeuralBayesianNetwork(case.parents, case.sizes, 2)


@pytest.mark.parametrize("targets", [("n5", "n4"), ("n4", "n5"), ("n5", "n1", "n3")])
@pytest.mark.parametrize("seed", range(3))
def test_the_law_is_the_sum_over_all_states(seed, targets):
    network = random_network(seed)
    case = example.task(network, example.BayesianNetworkSettings(targets=",".join(targets)))
    law = example.law(case.teacher, targets)
    assert law.shape == tuple(len(network.states[name]) for name in targets)
    assert torch.allclose(law, joint_law(network, targets), rtol=1e-6)  # the teacher's tables are in float32


@pytest.mark.filterwarnings("ignore:.*pgmpy.estimators.StructureScore.*:FutureWarning")  # raised by pgmpy's own import
@pytest.mark.parametrize("merge", CASES.values(), ids=CASES)
def test_the_law_is_that_of_pgmpys_variable_elimination(merge):
    """Of the teacher, and of the student with its conditionals as tables."""
    pytest.importorskip("pgmpy")
    from pgmpy.factors.discrete import TabularCPD
    from pgmpy.inference import VariableElimination
    from pgmpy.models import DiscreteBayesianNetwork

    _, case, student = case_of(merge)
    for program in (case.teacher, student):
        sizes = program.sizes
        model = DiscreteBayesianNetwork()
        model.add_nodes_from(sizes)
        model.add_edges_from((parent, name) for name, parents in program.parents.items() for parent in parents)
        for name, table in program.double().tables().items():
            parents = program.parents[name]
            values = table.detach().reshape(-1, sizes[name]).T.numpy()
            model.add_cpds(TabularCPD(name, sizes[name], values, parents, [sizes[parent] for parent in parents]))
        found = VariableElimination(model).query(list(case.targets), show_progress=False)
        values = torch.as_tensor(found.values).permute([found.variables.index(name) for name in case.targets])
        assert torch.allclose(example.law(program, case.targets), values, rtol=1e-6)
        program.float()


@pytest.mark.parametrize("merge", CASES.values(), ids=CASES)
def test_the_kl_is_that_of_exact_likelihoods(merge):
    """Over all states of the targets, with the latents summed out of the programs; and as an estimate, within its error."""
    _, case, student = case_of(merge)
    law = example.law(case.teacher, case.targets)
    kl = example.kl_of_laws(law, example.law(student, case.targets))
    assert kl > 0
    states = torch.cartesian_prod(*map(torch.arange, law.shape))
    data = {name: states[:, index] for index, name in enumerate(case.targets)}
    log_p, log_q = (marginal_log_prob(model, data, len(states)).double() for model in (case.teacher.model, student.model))
    assert float((log_p.exp() * (log_p - log_q)).sum()) == pytest.approx(kl, rel=1e-4)
    estimate = marginal_kl(student.model, case.teacher.model, case.targets, 5000)
    assert abs(estimate.mean - kl) < 4 * estimate.standard_error


@pytest.mark.parametrize("merge", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_both_bounds_are_above_the_exact_kl(seed, merge):
    _, case, student = case_of(merge, seed, ["n5"])
    teacher, rows = freeze(case.teacher.model), 500
    kl = example.kl_of_laws(example.law(case.teacher, case.targets), example.law(student, case.targets))
    for loss in (SurrogateKD(case.targets, latent_weight=0.0, fresh=case.fresh), LocalKD(case.targets, fresh=case.fresh)):
        bound = Estimate.of(torch.tensor([loss.loss(student.model, teacher, rows) / rows for _ in range(20)]))
        assert bound.mean > kl - 4 * bound.standard_error


def test_merged_states_are_neighbours_and_change_no_target():
    network, case, _ = case_of(True)
    assert case.fresh == ("n0", "n1", "n2")
    assert case.sizes == {"n0_merged": 2, "n1_merged": 2, "n2_merged": 2, "n4": 3, "n5": 2}
    assert case.parents["n2_merged"] == ("n1_merged", "n0_merged")
    assert torch.allclose(example.law(case.teacher, case.targets), joint_law(network, case.targets), rtol=1e-6)
    both = example.law(case.teacher, ["n0", "n0_merged"])
    assert (both > 0).int().tolist() == [[1, 0], [1, 0], [0, 1]]


def test_distillation_brings_the_kl_down():
    network = random_network()
    settings = example.BayesianNetworkSettings(steps=150, rows=128, learning_rate=0.05)
    case = example.task(network, settings)
    student = NeuralBayesianNetwork(case.parents, case.sizes, 4)
    exact = example.law(case.teacher, case.targets)
    before = example.kl_of_laws(exact, example.law(student, case.targets))
    loss = example.methods(case, settings)["local"]()
    example.distil(
        student.model, freeze(case.teacher.model), loss, 128, weight=1 / 128, steps=150, settings=settings, label=""
    )
    assert example.kl_of_laws(exact, example.law(student, case.targets)) < 0.1 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "n5"}, "--merge n5: it must be an ancestor of the targets n5, and no target"),
        ({"merge": "other"}, "--merge other: it must be an ancestor"),
        ({"merge": "n4"}, "--merge n4: it must be an ancestor"),
        ({"merge": "n0", "merged_states": 4}, "--merged-states 4: n0 has 3 states"),
        ({"merge": "n0", "merged_states": 0}, "--merged-states 0: n0 has 3 states"),
    ],
)
def test_nodes_that_cannot_be_merged_are_refused(options, message):
    with pytest.raises(SystemExit, match=message):
        example.task(random_network(0), example.BayesianNetworkSettings(targets="n5", **options))


def test_a_law_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(example, "LARGEST", 3)
    _, case, student = case_of(False)
    with pytest.raises(
        SystemExit, match=r"the law of 2 targets needs a table of \de\+\d\d entries: name fewer with --targets"
    ):
        example.law(student, case.targets)


def check(results, out, capsys):
    printed = capsys.readouterr().out
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "bayesian_network.png").read_bytes().startswith(b"\x89PNG")
    (seed,) = results["runs"]
    for method, figures in seed["models"].items():
        assert method in printed
        assert set(figures) == {f"{key} 1" for key in example.MEASURES}
        assert all(math.isfinite(value) for value in figures.values())
        assert figures["kl 1"] > 0


@pytest.mark.parametrize("merge", CASES.values(), ids=CASES)
def test_the_smoke_preset_runs(merge, tmp_path, capsys, monkeypatch):
    """On a network that needs no file."""
    monkeypatch.setattr(example, "journey", random_network)
    out, where = tmp_path / "out", ["--targets", "n5, n4", "--merge", "n0,n2" if merge else ""]
    check(example.main([*SMALL, *where, "--out", str(out), "--cache", str(tmp_path / "cache")]), out, capsys)


def test_the_smoke_preset_runs_on_files(tmp_path, capsys):
    pytest.importorskip("pgmpy")
    (tmp_path / "network.bif").write_text(bif_text(random_network()))
    where = ["--data", str(tmp_path / "network.bif"), "--targets", "n5"]
    out = tmp_path / "out"
    check(example.main([*SMALL, *where, "--out", str(out), "--cache", str(tmp_path / "cache")]), out, capsys)
