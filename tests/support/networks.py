"""Small Bayesian networks for tests: random ones, one as BIF text, and the joint law of nodes as a plain product of tables."""

import itertools
import random

import torch

from pyro_kd.datasets import DiscreteNetwork

__all__ = ["bif_text", "joint_law", "random_network"]


def random_network(seed=0, nodes=6, most_states=3, most_parents=2):
    """Nodes n0, n1, ... with states s0, s1, ..., and up to two parents each; all but n0 and n1 have at least one."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    states, parents, tables = {}, {}, {}
    for index in range(nodes):
        name = f"n{index}"
        parents[name] = tuple(chance.sample(list(states), min(chance.randint(index > 1, most_parents), index)))
        states[name] = tuple(f"s{state}" for state in range(chance.randint(2, most_states)))
        shape = [len(states[node]) for node in (*parents[name], name)]
        tables[name] = torch.rand(shape, generator=generator, dtype=torch.float64).pow(3).add(0.01)
        tables[name] /= tables[name].sum(-1, keepdim=True)
    return DiscreteNetwork(states, parents, tables)


def bif_text(network, as_tables=False, seed=0):
    """The network as BIF text, with blocks and rows in random order, or with tables that the child runs slowest through."""
    chance = random.Random(seed)
    blocks = []
    for name, parents in network.parents.items():
        table, states = network.tables[name], network.states
        blocks.append(f"variable {name} {{\n  type discrete [ {len(states[name])} ] {{ {', '.join(states[name])} }};\n}}\n")
        if as_tables or not parents:
            rows = ["  table " + ", ".join(map(repr, table.movedim(-1, 0).flatten().tolist())) + ";\n"]
        else:
            rows = [
                f"  ({', '.join(given)}) {', '.join(map(repr, row.tolist()))};\n"
                for given, row in zip(
                    itertools.product(*(states[parent] for parent in parents)),
                    table.flatten(0, -2),
                    strict=True,
                )
            ]
        chance.shuffle(rows)
        condition = f" | {', '.join(parents)}" * bool(parents)
        blocks.append(f"probability ( {name}{condition} ) {{\n{''.join(rows)}}}\n")
    chance.shuffle(blocks)
    return "".join(["network test {\n}\n", *blocks])


def joint_law(network, targets):
    """Probabilities of the joint states of the targets, one dimension a target: the sum of the product over all states of all nodes."""
    names = network.names
    total = torch.ones(())
    for name, parents in network.parents.items():
        own = [names.index(node) for node in (*parents, name)]
        table = network.tables[name].permute(sorted(range(len(own)), key=own.__getitem__))
        shape = [len(network.states[node]) if node in (*parents, name) else 1 for node in names]
        total = total * table.reshape(shape)
    summed = [names.index(name) for name in names if name not in targets]
    total = total.sum(summed) if summed else total
    kept = [name for name in names if name in targets]
    return total.permute([kept.index(name) for name in targets])
