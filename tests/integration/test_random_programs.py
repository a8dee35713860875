"""The laws of the library (tests/support/program_laws) hold on random programs, which Hypothesis finds and shrinks.

The ordinary run tries the same programs every time; ``pytest -m slow`` tries many new ones. A failure prints the recipe of a
smallest program that breaks the law: add it to PAST_FAILURES.
"""

import os

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.support.program_laws.bounds import check_likelihood
from tests.support.program_laws.losses import (
    check_closed_forms,
    check_equal_programs,
    check_gradients,
    check_particles,
    check_reparam,
    check_svi,
    shared_noise,
)
from tests.support.program_laws.table import LAWS, Law
from tests.support.random_programs import Block, Plate, Recipe, Site

pytestmark = [
    pytest.mark.filterwarnings("ignore:pyro.factor .* has no part in the loss"),
    pytest.mark.filterwarnings("ignore:Singular sample detected"),  # torch's own Wishart sampler
    pytest.mark.usefixtures("one_thread"),
]


SHARE = float(os.environ.get("FUZZ_SHARE", "1"))
"""The share of the programs of the long run to try, for a shorter run."""


def try_programs(law, count, passed=None, **options):
    """A test of one law. The programs on which it holds are added to the list ``passed``."""

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(law.programs)
    def check(arguments):
        with shared_noise(*[recipe for recipe in arguments if isinstance(recipe, Recipe)]):
            law.check(*arguments)
        if passed is not None:
            passed.append(arguments)

    return check


@pytest.mark.parametrize("shard", range(2))
@pytest.mark.parametrize("name", LAWS)
def test_law_on_random_programs(name, shard):
    seed(shard)(try_programs(LAWS[name], LAWS[name].ordinary))()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", range(4))
@pytest.mark.parametrize("name", LAWS)
def test_law_on_new_random_programs(name, shard, record_property):
    passed = []
    try_programs(LAWS[name], max(1, int(LAWS[name].slow * SHARE)), passed)()
    record_property("programs", len(passed))  # for tests/random_programs_report.py


# Smallest programs that break a law.


def single(kind, *, plates=(), **options):
    block = Block((Site("a", kind, role="target", plates=tuple(range(len(plates))), **options),))
    return Recipe((block,), plates=plates)


TWO = (Plate(2, dim=-1),)
LATENT = Recipe((Block((Site("a", "Affine"), Site("b", "Normal", role="target", parents=("a",)))),))
EMPTY = Recipe((Block((Site("a", "Bernoulli", event=(0,)), Site("b", "Bernoulli", role="target"))),))
POINT = Recipe((Block((Site("a", "Delta", role="input", plates=(0,)), Site("b", "Normal", role="target"))),), plates=TWO)
PAST_FAILURES = {
    "a reparametrised latent was taken for an input": (check_reparam, (LATENT,)),
    "the KL of Wisharts in a plate mixed its rows": (check_closed_forms, (single("Wishart", plates=TWO, local=True),) * 2),
    "the KL of Wisharts had leaves that SVI does not know": (check_svi, (single("Wishart"),) * 2),
    "the KL of Wisharts failed without gradients": (check_particles, (single("Wishart"),) * 2),
    "a Delta with a mask under to_event had no divergence": (
        check_equal_programs,
        (single("Delta", event=(2,), mask="inner"),),
    ),
    "a Delta that is observed at its own point was no target": (
        check_equal_programs,
        (single("Delta", event=(0,), observed=True),),
    ),
    "a latent without elements could not be enumerated": (check_likelihood, (EMPTY,)),
    "a Delta observed without the dimension of its plate": (check_gradients, (POINT, POINT, "bare", "bare")),
}


@pytest.mark.parametrize("what", PAST_FAILURES)
def test_programs_that_broke_a_law_in_the_past_satisfy_it(what):
    check, arguments = PAST_FAILURES[what]
    try_programs(Law(check, st.just(arguments), 1), 1)()
