"""Bayesian networks: their sites, laws and tables, and the network whose states are merged."""

import pytest
import torch
from pyro import poutine

from models.bayesian_network import (
    BayesianNetwork,
    NeuralBayesianNetwork,
    merged_name,
    merged_parents,
    with_merged_states,
)
from pyro_kd.datasets import DiscreteNetwork
from pyro_kd.metrics import marginal_log_prob
from tests.support.networks import joint_law, random_network


def sizes(network):
    return {name: len(states) for name, states in network.states.items()}


def tabulated(program):
    """The network of a program's tables."""
    states = {name: tuple(map(str, range(size))) for name, size in program.sizes.items()}
    tables = {name: table.detach().double() for name, table in program.double().tables().items()}
    return DiscreteNetwork(states, program.parents, tables)


PROGRAMS = {
    "tables": lambda network: BayesianNetwork(network.parents, network.tables),
    "perceptrons": lambda network: NeuralBayesianNetwork(network.parents, sizes(network), width=3),
}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_sites_have_the_documented_shapes(make):
    network = random_network()
    trace = poutine.trace(make(network).model).get_trace(7)
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "rows"]
    assert sites == list(network.names)
    for name in sites:
        value = trace.nodes[name]["value"]
        assert value.shape == (7,)
        assert torch.equal(value, trace.nodes["_RETURN"]["value"][name])
        assert trace.nodes[name]["fn"].param_shape == (7, len(network.states[name]))
    given = poutine.trace(make(network).model).get_trace(7, n2=torch.ones(7, dtype=torch.int64))
    assert [name for name in sites if given.nodes[name]["is_observed"]] == ["n2"]


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_the_tables_are_the_law_of_the_program(make):
    """The sum of the product of tables over all states, against the sum over the latents of the program's density."""
    program = make(random_network(1))
    law = joint_law(tabulated(program), ["n5", "n2"])
    rows = torch.cartesian_prod(*map(torch.arange, law.shape))
    found = marginal_log_prob(program.model, {"n5": rows[:, 0], "n2": rows[:, 1]}, len(rows))
    assert torch.allclose(found.exp(), law.flatten(), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 2])
def test_the_tables_of_the_teacher_are_those_given(seed):
    network = random_network(seed)
    found = BayesianNetwork(network.parents, network.tables).tables()
    for name, table in network.tables.items():
        assert torch.allclose(found[name].double(), table, rtol=1e-6)
        assert found[name].dtype == torch.float32


def test_a_perceptron_sees_the_states_of_its_parents():
    """The table of a node against its perceptron on one-hot vectors."""
    network = random_network(3)
    program = NeuralBayesianNetwork(network.parents, sizes(network), width=5)
    (name, parents) = next((name, parents) for name, parents in network.parents.items() if len(parents) == 2)
    first, second = (torch.eye(len(network.states[parent])) for parent in parents)
    net = program.perceptrons[network.names.index(name)]
    for i in range(len(first)):
        for j in range(len(second)):
            expected = net(torch.cat([first[i], second[j]])).softmax(-1)
            assert torch.allclose(program.tables()[name][i, j], expected, rtol=1e-5)


def test_parameters():
    program = NeuralBayesianNetwork({"a": (), "b": ("a",), "c": ("a", "b")}, {"a": 2, "b": 3, "c": 4}, width=5)
    expected = 2 + (2 * 5 + 5 + 5 * 3 + 3) + (5 * 5 + 5 + 5 * 4 + 4)
    assert sum(p.numel() for p in program.parameters()) == expected
    assert not list(BayesianNetwork({"a": ()}, {"a": torch.ones(1)}).parameters())


def test_names_of_nodes_may_have_any_characters():
    tables = {"a.b": torch.tensor([0.5, 0.5]), "c d": torch.tensor([[0.5, 0.5], [0.1, 0.9]])}
    parents = {"a.b": (), "c d": ("a.b",)}
    for program in (BayesianNetwork(parents, tables), NeuralBayesianNetwork(parents, dict.fromkeys(parents, 2))):
        assert set(program.model(3)) == set(parents)


def test_a_parent_after_its_child_is_refused():
    with pytest.raises(ValueError, match="'b' is a parent of 'a', and must come before it"):
        NeuralBayesianNetwork({"a": ("b",), "b": ()}, {"a": 2, "b": 2})


# Merged states


@pytest.mark.parametrize("name", ["n0", "n2", "n3"])
def test_the_merged_node_changes_no_other_law(name):
    network = random_network(4)
    size = len(network.states[name])
    groups = torch.arange(size) // 2
    parents, tables = with_merged_states(network.parents, network.tables, name, groups)
    states = {node: network.states.get(node, tuple(map(str, range(tables[node].shape[-1])))) for node in parents}
    larger = DiscreteNetwork(states, parents, tables)
    assert torch.allclose(joint_law(larger, network.names), joint_law(network, network.names), rtol=1e-12)
    both = joint_law(larger, [name, merged_name(name)])
    assert all(both[state, group] == 0 for state in range(size) for group in range(both.shape[1]) if group != groups[state])


def test_a_group_without_probability_has_a_law_all_the_same():
    parents, tables = with_merged_states({"a": ()}, {"a": torch.tensor([1.0, 0.0, 0.0])}, "a", torch.tensor([0, 1, 1]))
    assert parents == {"a_merged": (), "a": ("a_merged",)}
    assert tables["a_merged"].tolist() == [1.0, 0.0]
    assert tables["a"].tolist() == [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]


def test_parents_of_merged_nodes():
    parents = {"a": (), "b": ("a",), "c": ("a", "b")}
    assert merged_parents(parents, ["b"]) == {"a": (), "b_merged": ("a",), "c": ("a", "b_merged")}


@pytest.mark.parametrize(("name", "groups"), [("b", [0, 1]), ("a", [0, 1])])
def test_groups_that_do_not_fit_are_refused(name, groups):
    with pytest.raises(ValueError, match=rf"one group for each state of a node, and '{name}' has none of shape \(2,\)"):
        with_merged_states({"a": ()}, {"a": torch.ones(3) / 3}, name, torch.tensor(groups))


def test_a_name_that_is_taken_is_refused():
    once = with_merged_states({"a": ()}, {"a": torch.ones(3) / 3}, "a", torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="there is a node 'a_merged' already"):
        with_merged_states(*once, "a", torch.tensor([0, 1, 1]))


def test_groups_with_a_gap_are_refused():
    parents, tables = {"a": ()}, {"a": torch.tensor([0.2, 0.3, 0.5])}
    with pytest.raises(ValueError, match="without a gap"):
        with_merged_states(parents, tables, "a", torch.tensor([0, 2, 2]))
