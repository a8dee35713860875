"""What is around a call: handlers of Pyro, and autocast."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, Dropping, Pair, differ, outcome, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


@pytest.mark.parametrize("handler", [poutine.scale(scale=2.0), poutine.mask(mask=torch.tensor([True, False] * 2 + [True]))])
def test_a_handler_around_the_call_has_its_effect(handler):
    pair, x = Pair(), rows()
    plain = pair.agree(x)
    with handler:
        assert differ(pair.agree(x), plain)
    assert_close(pair.agree(x), plain)


def test_a_call_under_a_handler_makes_no_graph(num_graphs):
    pair, x = Pair(), rows()
    with poutine.scale(scale=2.0):
        pair.agree(x)
    assert num_graphs() == 0
    pair.agree(x)
    assert num_graphs() == 1


def test_autocast_has_a_graph_of_its_own(num_graphs):
    pair, x = Pair(Dropping(), freeze(Dropping())), rows(0, 16).float()
    pair.captured.float()
    full = pair.agree(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outcome(pair.captured, x), outcome(pair.eager, x), rtol=2e-2, atol=2e-2)
        low = outcome(pair.captured, x)
        assert not torch.equal(low[0], full[0])
    assert_close(pair.agree(x), full)
    assert num_graphs() == 2


def test_what_a_distribution_has_computed_of_its_parameters_is_not_checked_in_some_runs_only():
    """A OneHotCategorical by logits computes its probs where it is validated, and not where it is captured."""

    def program(net):
        def model(rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("c", dist.OneHotCategorical(logits=net(z)))

        return model

    module = SurrogateKD(["c"])(program(torch.nn.Linear(2, 3)), freeze(program(torch.nn.Linear(2, 3))))
    module.compile(backend=None)
    for _ in range(2):
        assert module(8).isfinite()
