"""How well shared noise couples two slightly different settings of a family, against the best that any coupling can do."""

import re
import warnings
from pathlib import Path

import pytest

from tests.benchmarks.families import coupling, distance, exports, page
from tests.support.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "distributions.md"
NUMBER = re.compile(r"\d\.\d\d")
CONTINUOUS = {name: family for name, family in FAMILIES.items() if not family.discrete}
CATEGORIES = {name: family for name, family in FAMILIES.items() if family.discrete and not family.ordered}
COUNTS = {name: family for name, family in FAMILIES.items() if family.ordered}
SUMS_OF_CATEGORIES = {"Multinomial", "DirichletMultinomial"}  # several trials that may differ, each near the best


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_families_move_together(name, float64):
    correlation, _ = coupling(CONTINUOUS[name])
    assert correlation > 0.96


@pytest.mark.parametrize("name", sorted(set(CATEGORIES) - SUMS_OF_CATEGORIES))
def test_categories_are_equal_nearly_as_often_as_possible(name, float64):
    equal, best = coupling(CATEGORIES[name])
    assert equal > (0.98 if best is None else best - 0.03)


@pytest.mark.parametrize("name", sorted(SUMS_OF_CATEGORIES))
def test_sums_of_categories_are_mostly_equal(name, float64):
    equal, best = coupling(CATEGORIES[name])
    assert best - 0.1 < equal <= best


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_as_close_as_possible(name, float64):
    near, best = distance(COUNTS[name])
    one_draw = name in {
        "Binomial",
        "ExtendedBinomial",
        "GammaPoisson",
        "Geometric",
        "NegativeBinomial",
        "OrderedLogistic",
        "Poisson",
    }
    assert near <= (1 if one_draw else 2) * best + 0.01


def test_the_page_agrees_with_the_code(float64):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = PAGE.read_text()
        cells = [line.split(" | ") for line in old.split("\n") if line.startswith("| ")]
        new = page({line[0].removeprefix("| "): line[-1].removesuffix(" |") for line in cells}) + "\n"
    assert NUMBER.sub("#", new) == NUMBER.sub("#", old)
    for mine, theirs in zip(NUMBER.findall(new), NUMBER.findall(old), strict=True):
        assert abs(float(mine) - float(theirs)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_tells_what_exports(name, float64):
    line = next(line for line in PAGE.read_text().split("\n") if line.startswith(f"| {name} |"))
    assert line.endswith(f"| {exports(FAMILIES[name])} |")
