"""Reports, bounds, terms and inference pairs are shown as a table in a terminal and in a notebook."""

import html.parser

import pyro
import pyro.distributions as dist
import pytest

import pyro_kd
from pyro_kd import LocalKD, bound_report, divergences, site_report, to_inference_data
from tests.support.losses import SurrogateKD


def program(loc):
    def model():
        with pyro.plate("rows", 4):
            z = pyro.sample("z<1>", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


LOSS, PAIR = SurrogateKD(["x"]), (program(1.0), program(0.0))
SHOWN = {
    "site_report": (lambda: site_report(LOSS, *PAIR, num_samples=2), ["site", "z<1>", "closed form", "90.9 %", "direct"], 3),
    "a row of site_report": (lambda: site_report(LOSS, *PAIR, num_samples=2)["x"], ["site", "x", "given", "closed form"], 2),
    "bound_report": (
        lambda: bound_report(*PAIR, ["x"], num_samples=2),
        ["surrogate bound", "0.5 ± 0", "local bound", "lower bound", "64 samples"],
        8,
    ),
    "terms": (lambda: LOSS.terms(*PAIR), ["z<1>", "latent", "target", "loss", "2.2"], 4),
    "a module's terms": (lambda: LOSS(*PAIR).terms(), ["z<1>", "latent", "target", "loss", "2.2"], 4),
    "to_inference_data": (
        lambda: to_inference_data(LOSS, *PAIR, num_samples=2),
        ["z<1>", "prior_predictive", "teacher", "student", "chain draw rows", "1 2 4", "sample_stats"],
        7,
    ),
}


class Cells(html.parser.HTMLParser):
    """Collects the texts in the table of a document, and its paragraphs."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.rows = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


@pytest.mark.parametrize("what", SHOWN)
def test_a_result_is_shown_as_a_table(what):
    make, expected, rows = SHOWN[what]
    result = make()
    text, document = repr(result), Cells(result._repr_html_())
    assert all(part in text for part in expected), text
    assert set(text.split("\n")[1]) == {"-"}, "a rule under the header"
    assert document.open == []
    assert document.rows == rows
    assert all(any(part in cell for cell in document.cells) for part in expected), "escaped, and whole"


def test_one_term_is_a_table_in_a_notebook():
    assert "latent" in Cells(LOSS.terms(*PAIR)["z<1>"]._repr_html_()).cells


def test_a_loss_shows_its_options():
    """Only options that differ from their defaults; functions are shown by their names."""
    assert repr(pyro_kd.SurrogateKD(["x"])) == "SurrogateKD(targets=['x'], latent_weight=0.0)"
    assert repr(SurrogateKD(["x"])) == "SurrogateKD(targets=['x'], latent_weight=0.1, teacher_forcing=0.0)"
    loss = LocalKD(latent_weight={"z": 0.5}, divergence=divergences.cross_entropy, site_map={"w": "z"}, fresh=["b", "a"])
    expected = {
        "targets": "None",
        "latent_weight": "{'z': 0.5}",
        "divergence": "cross_entropy",
        "site_map": "{'w': 'z'}",
        "fresh": "['a', 'b']",
    }
    assert repr(loss) == f"LocalKD({', '.join(f'{name}={value}' for name, value in expected.items())})"
    document = Cells(loss._repr_html_())
    assert document.open == []
    assert document.cells == ["LocalKD", *[cell for row in expected.items() for cell in row]]


def test_terms_are_a_dictionary():
    terms = LOSS.terms(*PAIR)
    assert list(terms) == ["z<1>", "x"]
    assert isinstance(terms, dict)
