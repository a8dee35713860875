"""Programs that write to memory through a second tensor, or move a random stream: the graph does the same, or there is none."""

import copy
import random
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyro_kd import freeze
from tests.support.losses import SurrogateKD

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
]
ROWS = 8


class Student(nn.Module):
    """inputs -> z -> y, with a layer, a buffer, and a part of its mean that a case defines: ``part(student, z, y)``."""

    def __init__(self, part):
        super().__init__()
        self.layer, self.part = nn.Linear(2, 1), part
        self.normed = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4))
        self.dropping = nn.Sequential(nn.Linear(2, 32), nn.Dropout(0.5), nn.Linear(32, 1))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            y = self.layer(z).squeeze(-1)
            pyro.sample("y", dist.Normal(self.part(self, z, y), 0.5))


@freeze
def teacher(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5))


def outcomes(part, steps, is_captured):
    """Losses, gradients, buffers and the random stream after some steps, and the reasons why there is no graph."""
    torch.manual_seed(0)
    student = Student(part)
    module = SurrogateKD(["y"])(student, teacher)
    if is_captured:
        module.compile(backend=None)
    pyro.set_rng_seed(1)
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            module.zero_grad()
            losses.append(module(torch.ones(ROWS, 2)))
            losses[-1].backward()
    grads = [param.grad for param in student.parameters() if param.grad is not None]
    reasons = [str(each.message) for each in caught if "without a graph" in str(each.message)]
    return [*losses, *grads, *copy.deepcopy(student).buffers(), torch.rand(())], reasons


def both(part, steps=2):
    """The same for both ways, which must be equal bit for bit. Returns the reasons."""
    (eager, _), (captured, reasons) = outcomes(part, steps, False), outcomes(part, steps, True)
    assert len(eager) == len(captured)
    assert all(torch.equal(one, other) for one, other in zip(eager, captured, strict=True))
    return reasons


def by_parts(student, z, y):
    first, _ = student.count.chunk(2)
    first.add_(1.0)
    return y + student.count.sum()


def by_out(student, z, y):
    torch.add(student.count, 1.0, out=student.count)
    return y + student.count.sum()


def by_list(student, z, y):
    torch._foreach_add_([student.count], 1.0)
    return y + student.count.sum()


def by_detached(student, z, y):
    student.count.detach()[1:3].mul_(0.5).add_(1.0)
    return y + student.count.sum()


def by_spectral_norm(student, z, y):
    return y + student.normed(z).tanh().sum(-1)


@pytest.mark.parametrize("part", [by_parts, by_out, by_list, by_detached, by_spectral_norm])
def test_a_buffer_is_written_once_a_call_also_where_calls_are_validated(part):
    """The 50th call is, and puts back what that writes."""
    assert both(part, steps=55) == []


def filled_mask(student, z, y):
    keep = torch.zeros(ROWS, dtype=torch.bool)
    keep[:7] = z[:7, 0] > 0
    keep[7] = True
    return y + z.detach()[keep].sum() / keep.sum()


def filled_length(student, z, y):
    lengths = torch.zeros(2, dtype=torch.long)
    lengths[0].copy_((z[:, 0] > 0).sum())
    lengths[1] = ROWS - lengths[0]
    first, _ = z.split(lengths.tolist())
    return y + first.sum()


def filled_by_a_constant(student, z, y):
    keep = torch.zeros(ROWS, dtype=torch.bool)
    keep[2:5] = True
    return y + z[keep].sum()


@pytest.mark.parametrize("part", [filled_mask, filled_length])
def test_a_mask_or_length_that_is_filled_with_draws_has_no_graph(part):
    (reason,) = both(part)
    assert "depend on the values of a tensor" in reason


def test_a_mask_that_is_filled_with_constants_has_one():
    assert both(filled_by_a_constant) == []


def reshaped_beside_a_detached(student, z, y):
    h = y * 2
    other = h.detach()
    return (h.unsqueeze_(-1) - other.unsqueeze(-1)).squeeze(-1) + y


def reshaped_alone(student, z, y):
    return (y * 2).unsqueeze_(-1).squeeze(-1)


def assigned(student, z, y):
    w = torch.zeros(ROWS)
    w.data = z[:, 0].detach().clone()
    return y + w


def read_after_a_write_to_data(student, z, y):
    w = torch.tensor(0.0)
    w.data.copy_(z[0, 0].detach())
    return y + float(w)


def by_numpy(student, z, y):
    w = torch.zeros(ROWS)
    w.numpy()[:] = np.arange(ROWS)
    return y + w


def read_by_numpy(student, z, y):
    return y + float(np.cumsum(torch.arange(3.0).numpy())[-1])


def from_numpy(student, z, y):
    return y + torch.from_numpy(np.arange(ROWS, dtype=np.float32))


def of_its_own_generator(student, z, y):
    return y + torch.rand(ROWS, generator=torch.Generator().manual_seed(0))


def of_a_fixed_seed(student, z, y):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = torch.randn(2)
    return y + z @ weight


def of_a_stream_put_back(student, z, y):
    state = torch.get_rng_state()
    first = torch.rand(())
    torch.set_rng_state(state)
    return y + first - torch.rand(())


def seeded_at_the_end(student, z, y):
    torch.manual_seed(5)
    return y


def recomputed(student, z, y):
    return checkpoint(student.dropping, z, use_reentrant=False).squeeze(-1)


def recomputed_without_dropout(student, z, y):
    return y + checkpoint(student.normed, z, use_reentrant=False).sum(-1)


def dropping(student, z, y):
    return student.dropping(z).squeeze(-1)


def in_a_forked_stream(student, z, y):
    with torch.random.fork_rng(devices=[]):
        return 2 * y


REFUSED = [
    (reshaped_beside_a_detached, r"changes the shape of a tensor in place \(unsqueeze_\).*It does so at test_shared_memory"),
    (assigned, r"assigns tensor\.data"),
    (read_after_a_write_to_data, "reads the value of a tensor"),
    (by_numpy, "gives the memory of a tensor to NumPy at test_shared_memory"),
    (of_its_own_generator, r"draws from a torch\.Generator of its own"),
    (of_a_fixed_seed, "sets torch's random stream"),
    (of_a_stream_put_back, "sets torch's random stream"),
    (seeded_at_the_end, "sets torch's random stream"),
    (recomputed, r"checkpoint around dropout\), which a graph does not"),
]


@pytest.mark.parametrize(("part", "reason"), REFUSED)
def test_what_a_graph_would_not_do_has_none(part, reason):
    (found,) = both(part)
    assert re.search(reason, found)


@pytest.mark.parametrize(
    "part", [reshaped_alone, read_by_numpy, from_numpy, recomputed_without_dropout, dropping, in_a_forked_stream]
)
def test_what_a_graph_does_as_well_has_one(part):
    assert both(part, steps=55) == []


class Named(nn.Parameter):
    """A parameter that knows its name, as in some libraries of models."""

    name = "scale"


def test_a_subclass_of_a_parameter_is_a_parameter():
    scale = Named(torch.tensor(2.0))
    assert both(lambda student, z, y: y * scale) == []


def test_a_generator_that_goes_on_from_run_to_run_is_named_in_the_reason():
    generator = torch.Generator().manual_seed(0)
    module = SurrogateKD(["y"])(Student(lambda student, z, y: y + torch.rand(ROWS, generator=generator)), teacher)
    module.compile(backend=None)
    with pytest.warns(UserWarning, match=r"a torch\.Generator of their own, or on a clock"):
        module(torch.ones(ROWS, 2))


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda generator: torch.rand((), generator=generator)),
        (lambda: np.random.default_rng(0), lambda generator: generator.random()),
        (lambda: np.random.RandomState(0), lambda generator: generator.random_sample()),
        (lambda: random.Random(0), lambda generator: generator.random()),
    ],
    ids=["torch", "NumPy", "NumPy's older", "Python"],
)
def test_a_refused_program_finds_its_own_generator_as_it_was(make, draw):
    losses = []
    for is_captured in (False, True):
        torch.manual_seed(0)
        student, generator = Student(lambda student, z, y: y + draw(generator)), make()
        module = SurrogateKD(["y"])(student, teacher)
        if is_captured:
            module.compile(backend=None)
        pyro.set_rng_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append([module(torch.ones(ROWS, 2)).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_a_sparse_gradient_is_refused_with_the_reason():
    embedding = nn.Embedding(5, 1, sparse=True)
    (reason,) = both(lambda student, z, y: y + embedding(torch.arange(4).repeat(2)).squeeze(-1))
    assert "makes a tensor of layout torch.sparse_coo, which a graph does not have. Make dense ones." in reason
