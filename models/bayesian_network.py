"""Discrete Bayesian networks: a teacher with one table per node, a student with one small network per node.

    p(x) = prod_i p(x_i | parents of x_i)

Both are programs over the same nodes, and differ in :meth:`NetworkProgram.conditional` alone. A student may also have fewer states
at a node. :func:`with_merged_states` then makes the teacher draw the merged state first, so that the programs share a site.

Source: Pearl, Probabilistic Reasoning in Intelligent Systems, 1988.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

__all__ = [
    "BayesianNetwork",
    "NetworkProgram",
    "NeuralBayesianNetwork",
    "merged_name",
    "merged_parents",
    "with_merged_states",
]


class NetworkProgram(nn.Module):
    """A discrete Bayesian network as a Pyro program, :meth:`model`.

    Sites, all Categorical scalars in the plate ``rows``: one per node, in the order and under the names of ``parents``.

    Args:
        parents: names of the parents of each node, by the node's name; parents come before their children.
        sizes: number of states of each node.

    Raises:
        ValueError: a parent does not come before its child.
    """

    def __init__(self, parents: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.parents = {name: tuple(found) for name, found in parents.items()}
        self.sizes = {name: sizes[name] for name in self.parents}
        order = list(self.parents)
        for name, found in self.parents.items():
            for parent in found:
                if parent not in order[: order.index(name)]:
                    raise ValueError(f"{parent!r} is a parent of {name!r}, and must come before it in parents")

    @abstractmethod
    def conditional(self, name: str, given: Sequence[Tensor]) -> dist.Categorical:
        """Distribution of a node given the states of its parents.

        Args:
            name: the node.
            given: states of its parents, int64, of shapes that broadcast. The batch shape is theirs.
        """

    def model(self, num_rows: int, **observed: Tensor) -> dict[str, Tensor]:
        """Generate rows, or score states of some nodes, int64 of shape (num_rows,). Returns the states of all nodes by name."""
        pyro.module("network", self)
        values: dict[str, Tensor] = {}
        with pyro.plate("rows", num_rows):
            for name, parents in self.parents.items():
                law = self.conditional(name, [values[parent] for parent in parents])
                values[name] = pyro.sample(name, law, obs=observed.get(name))
        return values

    def tables(self) -> dict[str, Tensor]:
        """The conditional probabilities of each node by name, of shape (states of the first parent, ..., states of the node)."""
        device = next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)
        found = {}
        for name, parents in self.parents.items():
            states = [torch.arange(self.sizes[parent], device=device) for parent in parents]
            found[name] = self.conditional(name, torch.meshgrid(*states, indexing="ij") if states else ()).probs
        return found


class BayesianNetwork(NetworkProgram):
    """A network of fixed tables. It has no parameters.

    Args:
        parents: as for :class:`NetworkProgram`.
        tables: probabilities of each node by name, of shape (states of the first parent, ..., states of the node); kept in torch's
            default data type, on the module's device.
    """

    def __init__(self, parents: Mapping[str, Sequence[str]], tables: Mapping[str, Tensor]) -> None:
        super().__init__(parents, {name: tables[name].shape[-1] for name in parents})
        self.index = {name: index for index, name in enumerate(parents)}
        for name, index in self.index.items():  # a node's name may have characters that a buffer's may not
            self.register_buffer(f"table_{index}", tables[name].to(torch.get_default_dtype()))

    def conditional(self, name: str, given: Sequence[Tensor]) -> dist.Categorical:
        table = self.get_buffer(f"table_{self.index[name]}")
        return dist.Categorical(probs=table[tuple(given)] if given else table)


class NeuralBayesianNetwork(NetworkProgram):
    """A network whose conditionals are perceptrons: the parents as one-hot vectors, one hidden layer, the logits of the node.

    A node without parents has its logits as parameters.

    Args:
        parents, sizes: as for :class:`NetworkProgram`.
        width: hidden units of each perceptron.
    """

    def __init__(self, parents: Mapping[str, Sequence[str]], sizes: Mapping[str, int], width: int = 4) -> None:
        super().__init__(parents, sizes)
        self.index = {name: index for index, name in enumerate(parents)}
        self.perceptrons = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Linear(sum(sizes[parent] for parent in parents[name]), width),
                    nn.SiLU(),
                    nn.Linear(width, sizes[name]),
                )
                if parents[name]
                else _Logits(sizes[name])
                for name in parents
            ]
        )

    def conditional(self, name: str, given: Sequence[Tensor]) -> dist.Categorical:
        perceptron = self.perceptrons[self.index[name]]
        if not given:
            return dist.Categorical(logits=perceptron())
        like = perceptron[0].weight
        parents = zip(self.parents[name], torch.broadcast_tensors(*given), strict=True)
        inputs = torch.cat([torch.eye(self.sizes[parent]).to(like)[value] for parent, value in parents], -1)
        return dist.Categorical(logits=perceptron(inputs))


class _Logits(nn.Module):
    """The logits of a node without parents, shape (size,)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        return self.logits


def with_merged_states(
    parents: Mapping[str, Sequence[str]], tables: Mapping[str, Tensor], name: str, groups: Tensor
) -> tuple[dict[str, tuple[str, ...]], dict[str, Tensor]]:
    r"""The same network with one more node, which tells the group that the state of a node belongs to.

    The node ``name`` with states x is drawn in two steps, its group g first: :math:`p(g | Pa) = \sum_{x \in g} p(x | Pa)`, and then
    :math:`p(x | g, Pa) = p(x | Pa) / p(g | Pa)` within g. The law of all other nodes is unchanged. A student that has g alone
    shares the site g with this network, and the node x is one that only the teacher has.

    Args:
        parents, tables: as for :class:`BayesianNetwork`.
        name: the node.
        groups: the group of each of its states, int64 from 0, shape (states,).

    Returns:
        Parents and tables, with the node :func:`merged_name` before ``name``.

    Raises:
        ValueError: there is no such node, there is not one group for each of its states, or the new node's name is taken.
    """
    if merged_name(name) in parents:
        raise ValueError(f"there is a node {merged_name(name)!r} already: rename it, or merge states of other nodes")
    if name not in parents or groups.shape != tables[name].shape[-1:]:
        raise ValueError(
            f"groups must hold one group for each state of a node, and {name!r} has none of shape {tuple(groups.shape)}"
        )
    if groups.min() < 0 or len(groups.unique()) != int(groups.max()) + 1:
        raise ValueError(f"groups must be numbered 0, 1, 2, ... without a gap, and are {groups.tolist()}")
    member = one_hot(groups).T.to(tables[name].dtype)  # (groups, states)
    table = tables[name].unsqueeze(-2) * member
    total = table.sum(-1, keepdim=True)
    even = member / member.sum(-1, keepdim=True)  # any law serves a group without probability
    within = torch.where(total > 0, table / total, even)
    new_parents: dict[str, tuple[str, ...]] = {}
    new_tables: dict[str, Tensor] = {}
    for node, found in parents.items():
        if node == name:
            new_parents[merged_name(name)], new_tables[merged_name(name)] = tuple(found), total.squeeze(-1)
            new_parents[name], new_tables[name] = (*found, merged_name(name)), within
        else:
            new_parents[node], new_tables[node] = tuple(found), tables[node]
    return new_parents, new_tables


def merged_parents(parents: Mapping[str, Sequence[str]], merged: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The parents of each node in a network that has :func:`merged_name` in place of each node in ``merged``."""

    def new(name: str) -> str:
        return merged_name(name) if name in merged else name

    return {new(name): tuple(new(parent) for parent in found) for name, found in parents.items()}


def merged_name(name: str) -> str:
    """The name of the node that tells the group of a node's state."""
    return f"{name}_merged"
