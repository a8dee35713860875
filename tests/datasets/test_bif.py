"""BIF files give the networks that were written, in every form of a table, and what is broken or incomplete is refused."""

import gzip
import random
import sys
from pathlib import Path

import pytest
import torch

from pyro_kd.datasets import bif, journey
from pyro_kd.errors import CorruptDataError, MissingDataError
from tests.support.damaged_files import damaged
from tests.support.networks import bif_text, random_network


@pytest.fixture(scope="module")
def pgmpy():
    """pgmpy, which makes its grammar once for all files of this module: that takes a second."""
    found = pytest.importorskip("pgmpy", reason="BIF files are read with pgmpy: pip install pyro-kd[networks]")
    from pgmpy.readwrite import BIFReader

    names = ("get_variable_grammar", "get_probability_grammar")
    before = {name: getattr(BIFReader, name) for name in names}
    for name in names:
        grammar = before[name](None)
        setattr(BIFReader, name, lambda self, grammar=grammar: grammar)
    yield found
    for name in names:
        setattr(BIFReader, name, before[name])


@pytest.fixture
def read(pgmpy, tmp_path):
    def read(text, name="network.bif"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return bif(tmp_path / name)

    return read


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("as_tables", [True, False])
def test_tables_are_those_written(seed, as_tables, read):
    """Whatever the order of nodes and rows, with rows for each state of the parents and with plain tables."""
    written = random_network(seed, nodes=8)
    network = read(bif_text(written, as_tables, seed))
    assert set(network.names) == set(written.names)
    for name in written.names:
        assert network.states[name] == written.states[name]
        assert network.parents[name] == written.parents[name]
        assert torch.allclose(network.tables[name], written.tables[name], rtol=1e-12)


def test_forms_of_the_text_make_no_difference(read):
    written = random_network(3)
    plain = bif_text(written)
    forms = [
        gzip.compress(plain.encode()),
        plain.rstrip(),
        plain.replace("\n", "\r\n"),
        plain.replace("\n", "  \n"),
        plain.replace("network test", "// a comment: variable x {\nnetwork test"),
        plain.replace("  type", "  property of the variable ;\n  type"),
        plain.replace(" )", ")").replace("( ", "("),
        plain.replace("{ s0, s1 }", '{ "s0" "s1" }'),
    ]
    for form in forms:
        network = read(form)
        assert network.states == {name: written.states[name] for name in network.names}
        assert all(torch.allclose(network.tables[name], written.tables[name]) for name in written.names)


def test_rounded_probabilities_are_divided_by_their_sum(read):
    network = read("variable a {\n type discrete [ 3 ] { x, y, z };\n}\nprobability ( a ) {\n table 0.33, 0.33, 0.33;\n}\n")
    assert network.tables["a"].tolist() == pytest.approx([1 / 3] * 3)


def test_the_network_that_comes_with_the_package(pgmpy):
    network = journey()
    assert network.leaves == ("arrival", "complaint", "tired")
    inner = [len(network.states[name]) for name in network.names if name not in network.leaves]
    assert (len(network.names), torch.tensor(inner).prod()) == (11, 1296)
    assert network.states["arrival"] == ("early", "on_time", "late")
    assert network.parents["connection"] == ("train_delay", "bus_delay")
    assert network.tables["connection"][2, 1].tolist() == pytest.approx([0.05, 0.95])


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "parameters"), [("asia", 8, 8, 18), ("child", 20, 25, 230), ("alarm", 37, 46, 509)]
)
def test_pgmpys_networks_have_the_published_sizes(name, nodes, edges, parameters, pgmpy):
    """The numbers of bnlearn's repository."""
    path = Path(pgmpy.__file__).parent / "utils" / "example_models" / f"{name}.bif.gz"
    if not path.exists():
        pytest.skip(f"this version of pgmpy comes without {name}")
    network = bif(path)
    assert len(network.names) == nodes
    assert sum(len(parents) for parents in network.parents.values()) == edges
    assert network.num_parameters == parameters


RIGHT = """variable a {
  type discrete [ 2 ] { x, y };
}
variable b {
  type discrete [ 2 ] { x, y };
}
probability ( a ) {
  table 0.3, 0.7;
}
probability ( b | a ) {
  (x) 0.1, 0.9;
  (y) 0.6, 0.4;
}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[ 2 ] { x, y };\n}\nvariable b", "[ 3 ] { x, y };\n}\nvariable b"), r"states \[3, 2\] states of 'a', 'b', and lists \[2, 2\]"),
        (("{ x, y };\n}\nprobability", "{ x, x };\n}\nprobability"), "lists a state of 'b' twice: 'x', 'x'"),
        (("variable b", "variable c {\n  type discrete [ 2 ] { x, y };\n}\nvariable C"), "pgmpy's reader fails with KeyError: 'b'"),
        (("variable b", "variable B {\n  type discrete [ 2 ] { x, y };\n}\nvariable b"),
         "3 variables, and their names must differ in more than capitals: 'a', 'B', 'b'"),
        (("variable b", "variable b {\n  type discrete [ 2 ] { x, y };\n}\nvariable b"),
         "3 variables, and their names must differ in more than capitals: 'a', 'b'"),
        (("variable b {\n", "variable b "), "pgmpy's reader fails|2 variables"),
        (("probability ( a ) {\n  table 0.3, 0.7;\n}\n", ""), "1 tables, and must have one of each variable: 'a', 'b'"),
        (("probability ( a )", "probability ( a ) {\n  table 0.5, 0.5;\n}\nprobability ( a )"), "3 tables, and must have one of each"),
        (("probability ( a )", "probability ( b )"), "2 tables, and must have one of each variable: 'a', 'b'"),
        (("( b | a )", "( a | b )"), "2 tables, and must have one of each variable"),
        (("( b | a )", "( b | c )"), "pgmpy's reader fails with KeyError: 'c'. Each variable needs a table"),
        (("( b | a ) {\n  (x) 0.1, 0.9;\n  (y) 0.6, 0.4;", "( b | c ) {\n  table 0.1, 0.9;"),
         "the parents of 'b' must be variables, each once, and are 'c'"),
        (("( b | a ) {\n  (x) 0.1, 0.9;\n  (y) 0.6, 0.4;", "( b | a, a ) {\n  table 0.1, 0.9;"),
         "the parents of 'b' must be variables, each once, and are 'a', 'a'"),
        (("( a ) {\n  table 0.3, 0.7", "( a | b ) {\n  (x) 0.5, 0.5;\n  (y) 0.5, 0.5"), "the nodes '.', '.', '.' are each other's ancestors"),
        (("  (y) 0.6, 0.4;\n", ""), "the table of 'b' must have 2 rows, one for each state of 'a'"),
        (("  (y) 0.6", "  (x) 0.6"), "the table of 'b' must have 2 rows, one for each state of 'a'"),
        (("  (y) 0.6", "  (y) 0.7, 0.3;\n  (y) 0.6"), "the table of 'b' must have 2 rows, one for each state of 'a'"),
        (("  (y) 0.6", "  (z) 0.6"), "name variables and states as they are declared"),
        (("  (y) 0.6, 0.4", "  default 0.6, 0.4"), "pgmpy's reader fails with ValueError"),
        (("  (y) 0.6, 0.4", "  (y) 0.6, 0.3"), "of 'b' must be at least 0 and add up to 1"),
        (("  (y) 0.6, 0.4", "  (y) 1.6, -0.6"), "of 'b' must be at least 0"),
        (("  (y) 0.6, 0.4", "  (y) 0.6"), "pgmpy's reader fails with ValueError"),
        (("0.3, 0.7", "0.3"), "with a number for each state of the variable"),
        (("0.3, 0.7", "0.3, 0.7, 0.0, 0.0"), "cannot be read"),
        (("0.3, 0.7", "0.3, x"), "pgmpy's reader fails with ValueError"),
        ((RIGHT, ""), "it has no variable, and is no BIF file"),
        ((RIGHT, "some text\n"), "it has no variable, and is no BIF file"),
    ],
)  # fmt: skip
def test_files_with_different_contents_are_refused(change, message, read):
    read(RIGHT)
    assert change[0] in RIGHT
    with pytest.raises(CorruptDataError, match=rf"network.bif.*{message}"):
        read(RIGHT.replace(*change))


@pytest.mark.parametrize("packed", [True, False])
def test_truncated_files_are_refused(packed, read):
    whole = gzip.compress(RIGHT.encode()) if packed else RIGHT.rstrip().encode()
    for length in range(0, len(whole), 1 + 2 * packed):
        with pytest.raises(CorruptDataError, match=r"network\.bif"):
            read(whole[:length])


def test_files_damaged_at_random_are_refused_or_valid(read):
    chance, kinds = random.Random(0), {"refused": 0, "read": 0}
    for _ in range(200):
        try:
            read(damaged(RIGHT.encode(), chance))  # a network checks itself
            kinds["read"] += 1
        except CorruptDataError:
            kinds["refused"] += 1
    assert min(kinds.values()) > 10


def test_missing_files_say_so(pgmpy, tmp_path):
    with pytest.raises(MissingDataError, match=r"none.bif is missing(.|\n)*fetch the .bif file(.|\n)*bnlearn"):
        bif(tmp_path / "none.bif")


def test_without_pgmpy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pgmpy.readwrite", None)
    monkeypatch.setitem(sys.modules, "pgmpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install pgmpy, or pyro-kd\[networks\]"):
        journey()
