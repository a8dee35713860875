"""What is around a call: handlers of Pyro, and autocast."""

import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, Dropping, Pair, differ, outcome, rows

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
