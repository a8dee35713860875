"""How many graphs there may be, and what is refused."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, Means, Net, Pair, both, outcome, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def test_there_are_no_more_graphs_than_allowed(num_graphs):
    pair = Pair(max_graphs=2)
    pair.agree(rows(0, 5))
    pair.agree(rows(0, 4))
    with pytest.warns(UserWarning, match=r"there are 2 graphs already.*max_graphs"):
        pair.agree(rows(0, 3))
    pair.agree(rows(0, 3))  # warned once
    runs = pair.student.runs
    outcome(pair.captured, rows(1, 4))
    assert pair.student.runs == runs
    assert num_graphs() == 2


def test_one_loss_captures_several_pairs_of_programs():
    loss, x = SurrogateKD(["x"]).compile(backend=None), rows()
    teacher = freeze(Net(0))
    students = [Net(seed) for seed in range(1, 7)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for student in 2 * students:
            assert_close(outcome(loss(student, teacher), x), outcome(SurrogateKD(["x"])(student, teacher), x))
    assert ["the graphs of 4 pairs of programs, and this is one more" in str(each.message) for each in caught] == [True]


def test_arguments_without_a_hash_run_without_a_graph():
    def program(loc):
        return lambda holder: pyro.sample("x", dist.Normal(loc, holder.scale))

    class Holder:
        scale = 1.0
        __hash__ = None

    loc = torch.tensor(2.0, requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc), program(0.0))
    captured.compile(backend=None)
    with pytest.warns(UserWarning, match="neither a tensor nor hashable"):
        assert captured(Holder()).item() == pytest.approx(2.0)


def test_a_buffer_that_is_replaced_is_refused():
    class Counting(Means):
        def forward(self):
            self.calls = self.calls + 1
            super().forward()

    student = Counting()
    eager, captured = both(student)
    with pytest.warns(UserWarning, match="replaces buffer 'calls' by a new tensor"):
        torch.testing.assert_close(captured(), eager())
    assert student.calls == 2
