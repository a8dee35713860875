"""Whatever changes in a teacher, a captured loss is the eager one."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import pair, values

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
]


def linear(x, net, name="net"):
    pyro.module(name, net)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))


def weights(value):
    return {"weight": torch.full((3, 3), value), "bias": torch.full((3,), value)}


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_new_tensors_of_a_teacher_are_used(is_frozen, backend):
    teacher_net = nn.Linear(3, 3)
    program = functools.partial(linear, net=teacher_net)
    if is_frozen:
        program = freeze(program)
        (teacher_net,) = program.modules_held
    pyro.clear_param_store()
    _, captured = modules = pair(functools.partial(linear, net=nn.Linear(3, 3), name="student"), program)
    captured.compile(backend=backend)
    x = torch.randn(4, 3)
    for step, assign in enumerate((False, True, True, False, True, False)):
        teacher_net.load_state_dict(weights(float(step)), assign=assign)
        assert_close(*values(modules, x))
    teacher_net.weight = nn.Parameter(torch.eye(3), requires_grad=is_frozen is False)
    assert_close(*values(modules, x))
    teacher_net.bias.data = torch.ones(3)
    assert_close(*values(modules, x))
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1, (
        "a teacher that has moved becomes an input of the graph"
    )


def test_a_write_by_data_to_all_weights_of_a_teacher_is_seen(monkeypatch):
    """A long graph has a frozen teacher's matrices in another order, as copies."""
    monkeypatch.setattr("pyro_kd.capture.compile._LONGEST", 1)

    def program(net):
        def run():
            x = torch.arange(12.0).view(4, 3) / 12
            means = [nn.functional.linear(x + step, net.weight) for step in range(12)]
            pyro.sample("y", dist.Normal(torch.stack(means), 1.0).to_event(3))

        return run

    teacher = freeze(program(nn.Linear(3, 2)))
    _, captured = modules = pair(program(nn.Linear(3, 2)), teacher)
    captured.compile()
    before = values(modules)
    for tensor in teacher.tensors():
        tensor.data.add_(0.5)
    after = values(modules)
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


def test_a_changed_mode_of_a_teacher_is_seen():
    def program(x, net):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(net(x), 1.0).to_event(1))

    frozen = freeze(functools.partial(program, net=nn.Sequential(nn.Linear(3, 3), nn.ELU(0.5))))
    modules, x = pair(functools.partial(program, net=nn.Linear(3, 3)), frozen), torch.randn(4, 3)
    before = values(modules, x)
    next(module for module in frozen.modules_held if isinstance(module, nn.ELU)).alpha = 2.0
    after = values(modules, x)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])
