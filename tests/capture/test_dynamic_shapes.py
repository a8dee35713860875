"""A captured loss is the eager one where shapes, or numbers in Python, are made of values of tensors.

Where these come from the arguments, from what is trained or from a draw there is no graph, and the warning names the line.
"""

import copy
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.losses import SurrogateKD

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 6


def picked(x, keep):
    return x[keep].sum(0) / len(x[keep])


def by_number(x, keep):
    return x[keep.to(torch.uint8)].mean(0)


def by_nonzero(x, keep):
    return x[keep.nonzero()[:, 0]].mean(0)


def by_where(x, keep):
    return x[torch.where(keep)[0]].mean(0)


def by_masked_select(x, keep):
    return x[:, 0].masked_select(keep).mean() * torch.ones(2)


def by_list(x, keep):
    return x.split(torch.stack([keep.sum(), (~keep).sum()]).tolist())[0].mean(0)


def by_numpy(x, keep):
    return x[: int(np.sum(keep.numpy()))].mean(0)


def by_array(x, keep):
    return x[: int(np.asarray(keep).sum())].mean(0)


def by_dlpack(x, keep):
    return x[: int(np.from_dlpack(keep.long()).sum())].mean(0)


def by_numbers_in_a_list(x, keep):
    return torch.tensor([keep.sum(), keep.sum() + 1]).float()


def by_new_tensor(x, keep):
    return x.new_tensor([keep.sum(), 1.0])


def by_unique(x, keep):
    return len(torch.unique(torch.arange(ROWS) * keep)) * torch.ones(2)


def by_repeats(x, keep):
    return x.repeat_interleave(keep.long(), dim=0).mean(0)


def by_bincount(x, keep):
    return len(torch.bincount(torch.arange(ROWS) * keep)) * torch.ones(2)


def by_tensor_split(x, keep):
    return x.tensor_split(keep.sum().view(1))[0].mean(0)


def by_argwhere(x, keep):
    return x[torch.argwhere(keep)[:, 0]].mean(0)


def by_combinations(x, keep):
    return torch.combinations(x[keep][:, 0]).sum() * torch.ones(2)


def by_sparse(x, keep):
    return (x * keep[:, None]).to_sparse().values().numel() * torch.ones(2)


def packed(x, keep):
    lengths = torch.stack([keep.sum(), torch.tensor(1)])
    sequence = pack_padded_sequence(x.expand(2, ROWS, 2), lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(sequence, batch_first=True)[0].mean((0, 1))


def written_rows(x, keep):
    filled = torch.zeros(ROWS, 2)
    filled[keep] = 2 * x[keep]
    return filled.mean(0)


PICKS = [
    *(
        picked,
        by_number,
        by_nonzero,
        by_where,
        by_masked_select,
        by_list,
        by_numpy,
        by_array,
        by_dlpack,
        by_numbers_in_a_list,
    ),
    *(by_new_tensor, by_unique, by_repeats, by_bincount, by_tensor_split, by_argwhere, by_combinations, by_sparse, packed),
    written_rows,
]


def program(pick):
    net = nn.Linear(2, 2)

    def model(x, keep):
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(net(pick(x, keep)), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal((x * z).sum(-1), 1.0))

    return model


def pair(make, **options):
    """A loss without and with capture."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    teacher, student = freeze(make()), make()
    pyro.clear_param_store()
    eager, captured = SurrogateKD(["y"])(student, teacher), SurrogateKD(["y"])(student, teacher)
    captured.compile(backend=None, **options)
    return eager, captured


def values(modules, *args, seed=1):
    found = []
    for module in modules:
        pyro.set_rng_seed(seed)
        found.append(module(*args).detach())
    return found


def num_graphs(captured):
    return sum(held.captured._capture.num_graphs for held in captured.loss._pairs._pairs)


@pytest.mark.filterwarnings("ignore:.*uint8:UserWarning")
@pytest.mark.parametrize("pick", PICKS, ids=lambda pick: pick.__name__)
def test_a_mask_among_the_arguments_that_picks_elements_is_refused(pick):
    modules, x = pair(lambda: program(pick)), torch.randn(ROWS, 2)
    with pytest.warns(UserWarning, match=rf"without a graph: .* at {__name__.split('.')[-1]}\.py:\d+ \(.+\)") as caught:
        first = values(modules, x, torch.arange(ROWS) < 2)
    assert len([warning for warning in caught if "graph" in str(warning.message)]) == 1
    assert_close(*first)
    for count in (3, 5, 2):
        assert_close(*values(modules, x, torch.arange(ROWS) < count))
    assert num_graphs(modules[1]) == 0


def test_a_refusal_names_the_line_that_decides_a_shape():
    modules = pair(lambda: program(by_nonzero))
    with pytest.warns(UserWarning, match=r"x\[keep.nonzero\(\)\[:, 0\]\]"):
        modules[1](torch.randn(ROWS, 2), torch.arange(ROWS) < 2)


def test_a_plate_over_what_a_mask_picks_is_refused():
    def make():
        net = nn.Linear(2, 2)

        def labelled(x, keep):
            pyro.module("net", net)
            with pyro.plate("rows", len(x[keep])):
                pyro.sample("y", dist.Normal(net(x[keep])[:, 0], 1.0))

        return labelled

    modules, x = pair(make), torch.randn(ROWS, 2)
    with pytest.warns(UserWarning, match="shapes or numbers at"):
        first = values(modules, x, torch.arange(ROWS) < 2)
    assert_close(*first)
    for count in (3, 5, 2):
        assert_close(*values(modules, x, torch.arange(ROWS) < count))


def test_routing_by_a_drawn_category_is_refused():
    def make():
        nets = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))

        def routed(x):
            pyro.module("nets", nets)
            with pyro.plate("rows", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(3)))
                mean = torch.zeros(len(x))
                for number, net in enumerate(nets):
                    mean = mean.index_put((k == number,), net(x[k == number]).squeeze(-1))
                pyro.sample("y", dist.Normal(mean, 1.0))

        return routed

    modules, x = pair(make), torch.randn(ROWS, 2)
    with pytest.warns(UserWarning, match="shapes or numbers at"):
        first = values(modules, x)
    assert_close(*first)
    for seed in range(2, 6):
        assert_close(*values(modules, x, seed=seed))


def test_a_gradient_through_what_a_mask_fills_is_refused():
    """The only shape that depends on the mask is one of the backward pass."""

    def make():
        net = nn.Linear(2, 2)

        def filled(x, missing):
            pyro.module("net", net)
            x = x.clone()
            x[missing] = net.bias
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(net(x)[:, 0], 1.0))

        return filled

    modules, x = pair(make), torch.randn(ROWS, 2)
    with pytest.warns(UserWarning, match="shapes or numbers"):
        modules[1](x, torch.arange(ROWS) < 2)
    for count in (3, 0, 6):
        assert_close(*values(modules, x, torch.arange(ROWS) < count))


@pytest.mark.parametrize("value", [0.0, torch.tensor(1.5)], ids=["number", "tensor"])
def test_filling_by_a_mask_is_captured(value):
    def make():
        net = nn.Linear(2, 2)

        def filled(x, missing):
            pyro.module("net", net)
            x = x.clone()
            x[missing] = value
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(net(x)[:, 0], 1.0))

        return filled

    modules, x = pair(make), torch.randn(ROWS, 2)
    for count in (2, 3, 0, 6):
        assert_close(*values(modules, x, torch.arange(ROWS) < count))
    assert num_graphs(modules[1]) == 1


class Masked(nn.Module):
    """Picks by a buffer, a constant and a list made of a constant, as coupling layers do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x):
        first = int(np.sum(torch.tensor([2, 0]).tolist()))
        x = torch.cat([x[:, :first][:, torch.tensor([True, True])], x.sum(-1, keepdim=True)], -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.net(x[:, self.mask]).squeeze(-1), 1.0))


def test_a_mask_that_is_a_buffer_or_a_constant_is_captured():
    _, captured = modules = pair(Masked)
    x = torch.randn(ROWS, 2)
    for seed in range(3):
        assert_close(*values(modules, x, seed=seed))
    assert num_graphs(captured) == 1
    captured.student.mask.copy_(torch.tensor([False, True, True]))
    assert_close(*values(modules, x))
    captured.student.mask = torch.tensor([True, True, False])
    assert_close(*values(modules, x))
    state = copy.deepcopy(captured.student.state_dict())
    state["mask"] = torch.tensor([True, False, True])
    captured.student.load_state_dict(state)
    assert_close(*values(modules, x))


def test_a_buffer_that_decides_and_keeps_changing_ends_the_graphs():
    _, captured = modules = pair(Masked)
    x, warned = torch.randn(ROWS, 2), []
    for step in range(8):
        captured.student.mask.copy_(torch.roll(torch.tensor([True, True, False]), step))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_close(*values(modules, x))
        warned += [str(warning.message) for warning in caught]
    assert len(warned) == 1
    assert "changes from call to call" in warned[0]
