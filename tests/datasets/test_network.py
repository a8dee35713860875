"""A discrete Bayesian network checks its tables, and its part above some nodes has their law."""

import pytest
import torch

from pyro_kd.datasets import DiscreteNetwork
from tests.support.networks import joint_law, random_network


def test_nodes_leaves_and_free_numbers():
    network = DiscreteNetwork(
        {"a": ("x", "y"), "b": ("x", "y", "z"), "c": ("x", "y")},
        {"a": (), "b": ("a",), "c": ("a", "b")},
        {"a": torch.full((2,), 1 / 2), "b": torch.full((2, 3), 1 / 3), "c": torch.full((2, 3, 2), 1 / 2)},
    )
    assert network.names == ("a", "b", "c")
    assert network.leaves == ("c",)
    assert network.num_parameters == 1 + 2 * 2 + 6


@pytest.mark.parametrize("seed", range(5))
def test_the_part_above_some_nodes_has_their_law(seed):
    network = random_network(seed, nodes=7)
    targets = ["n5", "n2"]
    part = network.ancestral(targets)
    assert set(targets) <= set(part.names)
    assert set(part.leaves) <= set(targets)
    assert torch.allclose(joint_law(part, targets), joint_law(network, targets), rtol=1e-12)


def test_an_unknown_node_is_named():
    with pytest.raises(ValueError, match=r"there is no node 'n22'. Did you mean 'n2'\? The network has 'n0', 'n1', 'n2'"):
        random_network(nodes=3).ancestral(["n22"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"states": {"b": ("x", "y"), "a": ("x", "y")}},
            "the same nodes in the same order, not 'b', 'a'; 'a', 'b'; 'a', 'b'",
        ),
        ({"parents": {"a": ("b",), "b": ()}}, "'b' is a parent of 'a', and must come before it"),
        ({"parents": {"a": (), "b": ()}}, r"of 'b' must hold numbers of shape \(2,\), .* of 'b', .* shape \(2, 2\)"),
        ({"b": torch.ones(2, 2, dtype=torch.int64)}, "and is torch.int64"),
        ({"b": torch.tensor([[0.5, 0.5], [0.5, 0.6]])}, "of 'b' must be at least 0 and add up to 1"),
        ({"b": torch.tensor([[0.5, 0.5], [1.5, -0.5]])}, "of 'b' must be at least 0"),
        ({"b": torch.tensor([[0.5, 0.5], [float("nan"), 0.5]])}, "of 'b' must be at least 0"),
    ],
)
def test_invalid_networks_are_refused(change, message):
    right = {
        "states": {"a": ("x", "y"), "b": ("x", "y")},
        "parents": {"a": (), "b": ("a",)},
        "tables": {"a": torch.tensor([0.3, 0.7]), "b": torch.tensor([[0.5, 0.5], [0.1, 0.9]])},
    }
    DiscreteNetwork(**right)
    change = {"tables": right["tables"] | change} if "b" in change else change
    with pytest.raises(ValueError, match=message):
        DiscreteNetwork(**right | change)
