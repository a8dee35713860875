"""What stays an input of one graph: parameters, buffers, weights of teachers, data and options of the loss may change between calls."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd.errors import NonFiniteLossError
from tests.support.captured import MARKS, Net, Pair, both, differ, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def test_a_loaded_state_is_used_by_the_same_graph(num_graphs):
    pair, x = Pair(), rows()
    before = pair.agree(x)
    pair.student.load_state_dict(Net(7).state_dict())
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_a_loaded_state_of_new_tensors_is_used_by_the_same_graph(num_graphs):
    pair, x = Pair(), rows()
    before = pair.agree(x)
    pair.student.load_state_dict(Net(7).state_dict(), assign=True)
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_a_replaced_parameter_is_used():
    pair, x = Pair(), rows()
    before = pair.agree(x)
    pair.student.last.bias = nn.Parameter(torch.tensor([9.0], dtype=torch.float64))
    assert differ(pair.agree(x), before)


def test_steps_of_an_optimiser_need_no_new_graph(num_graphs):
    pair, x = Pair(), rows()
    optim = torch.optim.Adam(pair.student.parameters(), lr=0.5)
    before = pair.agree(x)
    for _ in range(3):
        optim.step()
        after = pair.agree(x)
        assert differ(after, before)
        before = after
    assert num_graphs() == 1


def test_data_changed_in_place_need_no_new_graph(num_graphs):
    pair, x = Pair(), rows()
    before = pair.agree(x)
    x[0] += 5.0
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_different_data_of_one_shape_need_no_new_graph(num_graphs):
    pair = Pair()
    before = pair.agree(rows(0))
    assert differ(pair.agree(rows(1)), before)
    assert num_graphs() == 1


def test_data_in_different_strides_give_the_same_loss():
    pair, x = Pair(), rows()
    before = pair.agree(x)
    assert_close(pair.agree(x.t().contiguous().t()), before)
    assert_close(pair.agree(torch.cat([x, x], 1)[:, :3]), before)


def test_a_changed_or_replaced_buffer_needs_no_new_graph(num_graphs):
    pair, x = Pair(), rows()
    pair.student.eval()
    before = pair.agree(x)
    pair.student.norm.running_mean.add_(1.0)
    assert differ(pair.agree(x), before)
    pair.student.norm.running_mean = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1


def test_changed_weights_of_a_frozen_teacher_are_used():
    pair, x = Pair(), rows()
    before = pair.agree(x)
    for tensor in pair.teacher.tensors():
        if tensor.is_floating_point():
            tensor.add_(0.5)
    assert differ(pair.agree(x), before)


def test_changed_weights_of_a_teacher_that_is_not_frozen_need_no_new_graph(num_graphs):
    teacher = Net(0)
    pair, x = Pair(teacher=teacher), rows()
    before = pair.agree(x)
    teacher.load_state_dict(Net(7).state_dict())
    assert differ(pair.agree(x), before)
    assert num_graphs() == 1
    assert all(param.grad is None for param in teacher.parameters())


@pytest.mark.parametrize("change", ["untied", "another module"])
def test_a_parameter_that_is_untied_or_replaced_is_used(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
            self.two.weight = self.one.weight

        def forward(self):
            x = torch.ones(1)
            pyro.sample("x", dist.Normal(self.one(x) + self.two(x), 1.0).to_event(1))

    student = Net()
    eager, captured = both(student)
    torch.testing.assert_close(captured(), eager())
    if change == "untied":
        student.two.weight = nn.Parameter(torch.full((2, 1), 3.0))
    else:
        student.two = nn.Linear(1, 2)
    torch.testing.assert_close(captured(), eager())


def test_changed_options_of_the_loss_are_used():
    def program():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def teacher():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    eager, captured = SurrogateKD(["x"]), SurrogateKD(["x"]).compile(backend=None)
    for targets in (["x"], ["x", "z"], ["z"]):
        eager.targets = captured.targets = targets
        values = []
        for loss in (eager, captured):
            torch.manual_seed(0)
            values.append(loss.loss(program, teacher))
        assert values[0] == pytest.approx(values[1])
    captured.targets, captured.latent_weight = ["x"], math.nan
    with pytest.raises(NonFiniteLossError, match="latent_weight"):
        captured.loss(program, teacher)
