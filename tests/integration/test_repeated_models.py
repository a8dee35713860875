"""A model that is called twice has terms for both calls, with names made by scopes and by counters."""

import pyro
import pyro.distributions as dist
import pytest
from pyro.contrib import autoname

from pyro_kd import LocalKD, freeze
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.one_latent import STUDENT, TEACHER
from tests.support.runs import values_of


def step(loc):
    return pyro.sample("z", dist.Normal(loc, 1.0))


def by_scope(loc):
    return autoname.scope(step, prefix="one")(loc) + autoname.scope(step, prefix="two")(loc)


def by_nested_scope(loc):
    with autoname.scope(prefix="outer"):
        return autoname.scope(step, prefix="one")(loc) + autoname.scope(step, prefix="two")(loc)


def by_counting(loc):
    with autoname.name_count():
        return step(loc) + step(loc)


def by_counted_scopes(loc):
    with autoname.name_count():
        return sum(autoname.scope(step, prefix="step")(loc) for _ in range(2))


NAMES = {
    by_scope: ["one/z", "two/z"],
    by_nested_scope: ["outer/one/z", "outer/two/z"],
    by_counting: ["z", "z__1"],
    by_counted_scopes: ["step/z", "step__1/z"],
}


@pytest.mark.parametrize("call", NAMES, ids=lambda call: call.__name__)
@both
@particles
def test_a_model_that_is_called_twice_has_terms_for_both_calls(loss, call, options):
    def twice(loc):
        def model():
            with pyro.plate("rows", 3):
                pyro.sample("x", dist.Normal(call(loc), 1.0))

        return model

    terms = loss(["x"], **options).terms(twice(STUDENT), freeze(twice(TEACHER)))
    expected = dict.fromkeys(NAMES[call], 1.5) | {"x": {SurrogateKD: 6.0, LocalKD: 0.0}[loss]}
    assert values_of(terms) == pytest.approx(expected)
