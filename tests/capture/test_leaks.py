"""A capture runs the programs several times, and leaves buffers, parameters and other tensors as one run would have."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.usefixtures("one_thread")


def teacher(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))


class Averages(nn.Module):
    """A norm that is used by a method of another name than ``forward``."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))

    def normalise(self, x):
        self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
        return x - self.mean


def method_of_a_module():
    norm, loc = Averages(), nn.Parameter(torch.ones(2))

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(norm.normalise(x) * loc, 1.0).to_event(1))

    return student, [norm.mean]


def batch_norm_by_a_method():
    norm, loc = nn.BatchNorm1d(2), nn.Parameter(torch.ones(2))

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(norm.forward(x) * loc, 1.0).to_event(1))

    return student, [norm.running_mean, norm.running_var, norm.num_batches_tracked]


def flow_with_batch_norm():
    flow = [T.affine_coupling(2, hidden_dims=[3]), T.BatchNorm(2)]

    def student(x):
        law = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", law)

    return student, [flow[1].moving_mean, flow[1].moving_variance]


def module_in_a_list_of_an_object():
    class Holder:
        def __init__(self):
            self.norms, self.loc = {"one": [Averages()]}, nn.Parameter(torch.ones(2))

        def student(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.norms["one"][0].normalise(x) * self.loc, 1.0).to_event(1))

    holder = Holder()
    return holder.student, [holder.norms["one"][0].mean]


def tensor_of_a_closure():
    total, loc = torch.zeros(2), nn.Parameter(torch.ones(2))

    def student(x):
        total.add_(x.mean(0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(loc * x, 1.0).to_event(1))

    return student, [total]


def codebook_that_is_a_parameter():
    codes, loc = nn.Embedding(1, 2), nn.Parameter(torch.ones(2))

    def student(x):
        codes.weight.data.mul_(0.5).add_(0.5 * x.mean(0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(codes.weight.detach()[0] + loc * x, 1.0).to_event(1))

    return student, [codes.weight]


@pytest.mark.parametrize(
    "make",
    [
        *(method_of_a_module, batch_norm_by_a_method, flow_with_batch_norm, module_in_a_list_of_an_object),
        *(tensor_of_a_closure, codebook_that_is_a_parameter),
    ],
    ids=lambda make: make.__name__,
)
def test_a_captured_call_writes_to_tensors_as_an_eager_one(make):
    x, found = torch.randn(5, 2), []
    for is_captured in (False, True):
        torch.manual_seed(0)
        student, written = make()
        module = SurrogateKD(["y"])(student, freeze(teacher))
        if is_captured:
            module.compile(backend=None)
        for calls in range(1, 4):
            pyro.set_rng_seed(calls)
            found.append((module(x).detach(), [tensor.detach().clone() for tensor in written]))
    for eager, captured in zip(found[:3], found[3:], strict=True):
        assert_close(captured, eager)


def test_an_argument_that_is_written_to_changes_as_in_an_eager_call():
    loc = nn.Parameter(torch.ones(2))

    def student(x):
        x.add_(1.0)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(loc * x, 1.0).to_event(1))

    module, x = SurrogateKD(["y"])(student, freeze(teacher)), torch.zeros(5, 2)
    module.compile(backend=None)
    for calls in range(1, 4):
        module(x)
        assert_close(x, torch.full((5, 2), float(calls)))


def test_missing_values_do_not_count_as_written():
    norm = Averages()
    norm.register_buffer("data", torch.tensor([1.0, torch.nan]))

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(norm.loc + norm.data.nan_to_num(0.0), 1.0).to_event(1))

    module = SurrogateKD(["y"])(student, freeze(teacher))
    module.compile(backend=None)
    version = norm.data._version
    for _ in range(2):
        module(torch.zeros(5, 2))
    assert norm.data._version == version
