"""Graphs that torch's compiler has compiled."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.helmholtz import HelmholtzMachine
from pyro_kd import freeze
from tests.support.captured import MARKS, Dropping, Pair, differ, outcome, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def test_inductor_on_the_noise_of_torch_equals_an_eager_call():
    targets, args = ["y1", "y2"], (6,)
    student, teacher = HelmholtzMachine(3, 3).model, HelmholtzMachine(3, 3).model
    loss = SurrogateKD(targets)
    eager = loss(student, freeze(teacher))
    captured = loss(student, eager.teacher)
    captured.compile(options={"fallback_random": True})
    for seed in range(3):
        assert_close(outcome(captured, *args, seed=seed), outcome(eager, *args, seed=seed), rtol=1e-4, atol=1e-5)


def test_inductor_on_its_own_noise_has_the_same_mean():
    def program(loc):
        def run():
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
                pyro.sample("x", dist.Normal(loc * z.square(), 1.0))

        return run

    loss, student, teacher = SurrogateKD(["x"]), program(torch.tensor(1.0, requires_grad=True)), freeze(program(0.5))
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile()
    draws = [torch.tensor([module().item() for _ in range(200)]) for module in (captured, eager)]
    assert len(set(draws[0].tolist())) == 200
    error = math.sqrt(sum(values.var().item() / len(values) for values in draws))
    assert abs(draws[0].mean() - draws[1].mean()) < 4 * error


def test_inductor_uses_changed_weights_of_a_frozen_teacher():
    pair, x = Pair(Dropping(), freeze(Dropping())), rows()
    pair.student.eval()
    x, captured = x.float(), SurrogateKD(["x"])(pair.student, pair.teacher)
    captured.float().compile()
    before = outcome(captured, x)
    assert_close(before, outcome(pair.eager, x), rtol=1e-4, atol=1e-5)
    for tensor in pair.teacher.tensors():
        tensor.add_(0.5)
    after = outcome(captured, x)
    assert differ(after, before)
    assert_close(after, outcome(pair.eager, x), rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """Writes to one buffer and then reads another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.written, self.read = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.zeros(4))

    def forward(self):
        with torch.no_grad():
            self.written.add_(1.0)
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(self.layer(self.read.unsqueeze(-1) + 1.0).squeeze(-1) + self.written, 0.5))


def test_buffers_that_begin_to_share_memory_have_a_graph_of_their_own(num_graphs):
    def standard():
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))

    torch.manual_seed(0)
    student, found = Counting(), []
    eager, captured = SurrogateKD(["x"])(student, standard), SurrogateKD(["x"])(student, standard)
    captured.compile()
    for module in (eager, captured):
        student.written, student.read = torch.zeros(4), torch.zeros(4)
        found.append([module().item()])
        student.written = torch.zeros(4)
        student.read = student.written.view(4)
        found[-1] += [module().item() for _ in range(3)]
        assert student.read.tolist() == [3.0] * 4
    assert found[0] == pytest.approx(found[1])
    assert num_graphs() == 2
