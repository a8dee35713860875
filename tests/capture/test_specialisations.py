"""What makes a new graph: shapes, dtypes, modes, numbers among the arguments."""

import decimal
import fractions

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, Dropping, Pair, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def test_each_batch_size_has_one_graph(num_graphs):
    pair = Pair()
    for number in (5, 4, 5, 4):
        pair.agree(rows(0, number))
    assert num_graphs() == 2


def test_each_number_among_the_arguments_has_one_graph(num_graphs):
    def program(loc):
        def run(number, factor):
            with pyro.plate("rows", number):
                pyro.sample("x", dist.Normal(loc * (2.0 if factor is True else factor), 1.0))

        return run

    loc = torch.zeros((), requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc), program(3.0))
    captured.compile(backend=None)
    for number, factor in [(2, 1), (2, True), (2, 1.0), (2, 3.0), (4, 1)]:
        expected = number * (3.0 * (2.0 if factor is True else factor)) ** 2 / 2
        assert captured(number, factor).item() == pytest.approx(expected)
    assert num_graphs() == 5


EQUAL = [
    (0.0, -0.0),
    (complex(1.0, 0.0), complex(1.0, -0.0)),
    (frozenset({1}), frozenset({1.0}), frozenset({True})),
    (range(0), range(1, 1)),
    ({1: 2.0}, {True: 2.0}, {1.0: 2.0}),
    ([(0.0,)], [(-0.0,)]),
    (fractions.Fraction(1), 1, 1.0, True, decimal.Decimal(1)),
    (np.float32(0.0), np.float32(-0.0)),
]


@pytest.mark.parametrize("arguments", EQUAL, ids=repr)
def test_arguments_that_are_equal_but_not_the_same_have_graphs_of_their_own(arguments):
    def program(loc):
        def run(argument):
            pyro.sample("x", dist.Normal(loc * len(repr(argument)), 1.0 + sum(map(ord, repr(argument)))))

        return run

    loc = torch.ones((), requires_grad=True)
    loss = SurrogateKD(["x"])
    eager, captured = loss(program(loc), program(3.0)), loss(program(loc), program(3.0))
    captured.compile(backend=None)
    found = [[module(argument).item() for argument in (*arguments, *arguments)] for module in (eager, captured)]
    assert found[0] == pytest.approx(found[1])
    assert len(set(found[0])) == len(arguments)


def test_tensors_in_keyword_and_nested_arguments_are_inputs():
    def program(loc):
        def run(batch, *, scale):
            with pyro.plate("rows", 3):
                pyro.sample("x", dist.Normal(loc + batch["shift"][0], scale))

        return run

    loc = torch.zeros((), requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc), program(1.0))
    captured.compile(backend=None)
    for scale in (1.0, 0.5, 2.0):
        batch = {"shift": [torch.randn(3)], "name": "a"}
        assert captured(batch, scale=torch.tensor(scale)).item() == pytest.approx(1.5 / scale**2)


def test_each_dtype_has_one_graph(num_graphs):
    pair = Pair()
    pair.agree(rows())
    pair.captured.float()
    assert pair.agree(rows().float())[0].dtype == torch.float32
    assert num_graphs() == 2


def test_gradient_modes_have_one_graph_each(num_graphs):
    pair, x = Pair(), rows()
    with torch.no_grad():
        torch.manual_seed(3)
        value = pair.captured(x)
        assert not value.requires_grad
        torch.manual_seed(3)
        assert_close(value, pair.eager(x))
    assert_close(pair.agree(x)[0], value)
    assert num_graphs() == 2


def test_the_default_dtype_makes_a_new_graph(float64):
    torch.set_default_dtype(torch.float32)
    student = lambda: pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(1.0)), torch.ones(())))  # noqa: E731
    loss = SurrogateKD(["x"]).compile(backend=None)
    teacher = freeze(lambda: pyro.sample("x", dist.Normal(torch.zeros(()), 1.0)))
    assert loss.differentiable_loss(student, teacher).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    assert loss.differentiable_loss(student, teacher).dtype == torch.float64


def test_parameters_can_be_frozen_and_thawed(num_graphs):
    pair, x = Pair(), rows()
    pair.agree(x)
    pair.student.first.requires_grad_(False)
    grads = dict(zip(dict(pair.captured.named_parameters()), pair.agree(x)[1:], strict=True))
    assert [name for name, grad in grads.items() if grad is None] == ["student.first.weight"]
    assert num_graphs() == 2
    pair.student.first.requires_grad_(True)
    assert None not in pair.agree(x)
    assert num_graphs() == 2


def test_train_and_eval_mode_have_one_graph_each(num_graphs):
    pair, x = Pair(Dropping(), freeze(Dropping())), rows()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(6)}) == 6
    pair.student.eval()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(6)}) == 1
    pair.student.train()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(6)}) == 6
    assert num_graphs() == 2


def test_the_mode_of_a_part_makes_a_new_graph(num_graphs):
    pair, x = Pair(Dropping(), freeze(Dropping())), rows()
    pair.captured(x)
    pair.student.dropout.eval()
    pair.agree(x)
    assert len({pair.captured(x).item() for _ in range(3)}) == 1
    assert num_graphs() == 2


def test_a_changed_dtype_of_a_frozen_teacher_is_used():
    def teacher(inputs, shift=torch.tensor(0.1)):  # noqa: B008
        with pyro.plate("rows", len(inputs)):
            pyro.sample("x", dist.Normal(shift, 1.0))

    pair, x = Pair(Dropping().float(), freeze(teacher)), rows().float()
    assert pair.agree(x)[0].dtype == torch.float32
    pair.teacher.to(torch.float64)
    assert pair.agree(x)[0].dtype == torch.float64


def test_one_tensor_in_two_places_makes_a_new_graph():
    def program(loc, which):
        return lambda *shifts: pyro.sample("x", dist.Normal(loc + shifts[which], 1.0))

    loc = torch.zeros((), requires_grad=True)
    captured = SurrogateKD(["x"])(program(loc, 0), program(0.0, 1))
    captured.compile(backend=None)
    one, two = torch.tensor(1.0), torch.tensor(3.0)
    for shifts, expected in [((one, one), 0.0), ((one, two), 2.0), ((two, two), 0.0), ((two, one), 2.0)]:
        assert captured(*shifts).item() == expected


def test_an_argument_may_need_a_gradient_in_some_calls():
    pair = Pair()
    pair.agree(rows())
    pair.agree(rows().requires_grad_())
    pair.agree(rows())
