"""Programs around a network, and the state of a network, for tests of freezing."""

import copy

import pyro
import pyro.distributions as dist
import torch


def state(module):
    """Everything of a module that must not move."""
    return (
        copy.deepcopy(module.state_dict()),
        [p.grad for p in module.parameters()],
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
    )


def assert_same_state(module, before):
    values, grads, modes, requires = before
    for name, value in module.state_dict().items():
        assert torch.equal(value, values[name]), name
    assert [p.grad for p in module.parameters()] == grads
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == requires


def sample_through(decode):
    with pyro.plate("rows", 6):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1))
