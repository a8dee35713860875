"""Bayesian networks in the BIF format, as pgmpy and the bnlearn repository have them, and the small one that comes with the package.

pgmpy parses the text. It takes what it does not understand for absent, and what is absent for zero. So what it found is compared here
with what the text states.
"""

import gzip
import math
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_kd.datasets.files import Source, reading
from pyro_kd.datasets.network import DiscreteNetwork
from pyro_kd.errors import CorruptDataError, listing

__all__ = ["bif", "journey"]

SOURCE = Source(
    name="your network",
    page="wherever it is (many are at https://www.bnlearn.com/bnrepository, and in pgmpy's package, pgmpy/utils/example_models)",
    fetch="the .bif file",
    layout="    PATH, which is the .bif or .bif.gz file itself: anywhere",
)
_ROUNDING = 0.01 + 1e-9  # the most by which rounded probabilities in a file may fail to add up to 1, as in pgmpy


def bif(path: str | Path) -> DiscreteNetwork:
    """Load a discrete Bayesian network from a BIF file, compressed or not.

    Probabilities that add up to 1 but for rounding, by 0.01 at most, are divided by their sum. A default row of a table is not read.
    To make a program of the network: ``BayesianNetwork(network.parents, network.tables)`` of models/bayesian_network.py.

    Args:
        path: the .bif or .bif.gz file.

    Returns:
        The network, with float64 tables. A node and its states have the names that the file gives them.

    Raises:
        MissingDataError: there is no such file.
        CorruptDataError: the file is truncated or has a different format, states something twice or something that does not fit the
            rest, or its probabilities do not add up to 1.
        ModuleNotFoundError: pgmpy is not installed.

    References:
        Cozman, The interchange format for Bayesian networks (BIF 0.15), 1998. Scutari, bnlearn's repository of networks.
    """
    try:
        from pgmpy.readwrite import BIFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BIF files are read with pgmpy: pip install pgmpy, or pyro-kd[networks]") from error
    path = SOURCE.need(Path(path))
    with reading(path):
        content = path.read_bytes()
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8")
        reader = _parsed(BIFReader, text)
        states = {name: tuple(found) for name, found in reader.variable_states.items()}
        parents = {name: tuple(found) for name, found in reader.variable_parents.items()}
        _check_nodes(reader.network, reader.variable_names, states, parents)
        _check_rows(reader.network, states, parents)
        try:
            order = list(TopologicalSorter(parents).static_order())
        except CycleError as error:
            raise CorruptDataError(f"the nodes {listing(error.args[1])} are each other's ancestors") from error
        tables = {name: _table(reader.variable_cpds[name], name, states, parents[name]) for name in order}
        return DiscreteNetwork({name: states[name] for name in order}, {name: parents[name] for name in order}, tables)


def journey() -> DiscreteNetwork:
    """Load a made-up network of eleven nodes about a journey by train and bus: what the weather does to the time of arrival.

    Its leaves are ``arrival``, ``complaint`` and ``tired``. The eight other nodes have 1296 joint states, so exact sums are quick.

    Raises:
        ModuleNotFoundError: pgmpy is not installed.
    """
    with as_file(files("pyro_kd.datasets").joinpath("journey.bif")) as path:
        return bif(path)


def _parsed(reader: Any, text: str) -> Any:
    """The text as pgmpy's reader has it. That skips a block whose last line does not end right after the brace."""
    try:
        return reader(string="".join(f"{line.rstrip()}\n" for line in ("", *text.splitlines())))
    except Exception as error:  # it looks up what it expects
        raise CorruptDataError(
            f"pgmpy's reader fails with {type(error).__name__}: {error}. Each variable needs a table, whose head and rows name "
            "variables and states as they are declared, with a number for each state of the variable"
        ) from error


def _check_nodes(
    text: str, names: list[str], states: Mapping[str, tuple[str, ...]], parents: Mapping[str, tuple[str, ...]]
) -> None:
    """Compare the variables and tables that were found with those that the text has."""
    variables = len(re.findall(r"\bvariable\s[^;{}]*\{", text))
    if not names:
        raise CorruptDataError("it has no variable, and is no BIF file")
    if not variables == len(names) == len({name.lower() for name in names}):
        raise CorruptDataError(
            f"it has {variables} variables, and their names must differ in more than capitals: {listing(dict.fromkeys(names))}"
        )
    counts = [int(count) for count in re.findall(r"\btype\s+discrete\s*\[\s*(\d+)\s*\]", text)]
    found = [len(states[name]) for name in names]
    if counts != found:
        raise CorruptDataError(f"it states {counts} states of {listing(names)}, and lists {found}")
    for name, listed in states.items():
        if len(set(listed)) != len(listed):
            raise CorruptDataError(f"it lists a state of {name!r} twice: {listing(listed)}")
    tables = len(re.findall(r"\bprobability\s*\([^;{}]*\{", text))
    if tables != len(names) or set(parents) != set(names):
        raise CorruptDataError(f"it has {tables} tables, and must have one of each variable: {listing(names)}")
    for name, found_parents in parents.items():
        for parent in found_parents:
            if parent not in states or found_parents.count(parent) > 1:
                raise CorruptDataError(
                    f"the parents of {name!r} must be variables, each once, and are {listing(found_parents)}"
                )


def _check_rows(text: str, states: Mapping[str, tuple[str, ...]], parents: Mapping[str, tuple[str, ...]]) -> None:
    """Compare the rows of each table with the states of the parents: a missing row would be 0, and of two the last would count."""
    bodies = re.findall(r"\bprobability\s*\([^)]*\)\s*\{([^}]*)\}", text)
    for body, (name, of_name) in zip(bodies, parents.items(), strict=True):
        rows = [tuple(re.split(r"\s*,\s*", row.strip())) for row in re.findall(r"\(([^)]*)\)", body)]
        count = math.prod(len(states[parent]) for parent in of_name)
        if rows and not len(rows) == len(set(rows)) == count:
            raise CorruptDataError(f"the table of {name!r} must have {count} rows, one for each state of {listing(of_name)}")


def _table(values: Any, name: str, states: Mapping[str, tuple[str, ...]], parents: tuple[str, ...]) -> Tensor:
    """The probabilities of a node, shape (states of the first parent, ..., states of the node).

    Args:
        values: the array of pgmpy, shape (states of the node, joint states of the parents), where the last parent runs fastest.
        name, parents: the node and its parents.
        states: of all nodes.
    """
    shape = [len(states[parent]) for parent in parents]
    table = torch.tensor(values, dtype=torch.float64).T.reshape(*shape, len(states[name]))
    total = table.sum(-1, keepdim=True)
    if not ((table >= 0).all() and ((total - 1).abs() <= _ROUNDING).all()):
        raise CorruptDataError(
            f"the probabilities of {name!r} must be at least 0 and add up to 1 for each state of its parents"
        )
    return table / total
