"""Packed sequences, which are tuples to Python and single values to torch, as arguments, batches, attributes and results."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from pyro_kd import Distiller, LocalKD, bound_report, freeze, site_report, to_inference_data
from pyro_kd.training import DistillationObjective, Replay
from pyro_kd.training.batches import to_device
from tests.support.losses import SurrogateKD

SEQUENCES = [torch.randn(length, 2, generator=torch.Generator().manual_seed(length)) for length in (2, 4, 3)]
PACKED = pack_sequence(SEQUENCES, enforce_sorted=False)


class Sequences(nn.Module):
    """One latent a sequence; the steps are targets, masked beyond each one's end."""

    def __init__(self, width):
        super().__init__()
        self.rnn = nn.GRU(2, width, batch_first=True)
        self.out = nn.Linear(width, 2)

    def forward(self, packed):
        out, lengths = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        x, _ = pad_packed_sequence(packed, batch_first=True)
        with pyro.plate("sequences", len(lengths)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for t in range(x.shape[1]):
                fn = dist.Normal(self.out(out[:, t]) + z, 1.0).to_event(1).mask(t < lengths)
                pyro.sample(f"x{t}", fn, obs=x[:, t])
        return packed


def programs():
    pyro.set_rng_seed(0)
    return Sequences(4), freeze(Sequences(8))


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_as_argument_and_return_value(kind):
    student, teacher = programs()
    loss = kind()(student, teacher)(PACKED)
    loss.backward()
    assert student.out.weight.grad.abs().sum() > 0
    assert kind().loss(teacher, teacher, PACKED) == 0.0


def test_in_reports():
    student, teacher = programs()
    assert site_report(SurrogateKD(), student, teacher, PACKED, num_samples=2)["x1"].batch_shape == (3,)
    assert bound_report(student, teacher, None, PACKED, num_samples=2).rows == 3
    pair = to_inference_data(SurrogateKD(), student, teacher, PACKED, num_samples=2)
    assert pair.student["prior_predictive"]["x3"].shape == (1, 2, 3, 2)


@pytest.mark.parametrize(
    "batches",
    [
        [PACKED, PACKED],
        DataLoader(SEQUENCES, batch_size=3, collate_fn=lambda rows: pack_sequence(rows, enforce_sorted=False)),
    ],
    ids=["list", "loader"],
)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_as_batch(batches, device):
    student, teacher = programs()
    distiller = Distiller(student, teacher, lambda params: torch.optim.Adam(params, lr=0.01), SurrogateKD(), device=device)
    assert len(distiller.fit(batches=batches, steps=2, progress=False)["loss"]) == 2


def test_what_a_function_makes_of_a_step_is_a_tuple_of_arguments():
    student, teacher = programs()
    objective = DistillationObjective(SurrogateKD(), student, teacher, arguments=lambda packed, name: (packed,))
    assert objective.program_arguments(((PACKED, "name"), {})) == ((PACKED,), {})
    with pytest.raises(TypeError, match="must return a tuple"):
        DistillationObjective(SurrogateKD(), student, teacher, arguments=lambda packed: packed).program_arguments(
            ((PACKED,), {})
        )
    with pytest.raises(TypeError, match="must return a tuple"):
        Replay(teacher, ["x0"], lambda values, packed: (packed,), program_arguments=lambda packed: packed)(PACKED)


def test_moves_to_a_device_with_its_lengths_on_the_cpu():
    moved = to_device((PACKED, 3), "meta")[0]
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


def test_as_an_attribute_of_a_frozen_program():
    class Holder(Sequences):
        def __init__(self, width):
            super().__init__(width)
            self.packed = pack_sequence(SEQUENCES, enforce_sorted=False)

        def forward(self):
            return super().forward(self.packed)

    pyro.set_rng_seed(0)
    SurrogateKD()(Holder(4), freeze(Holder(8)))().backward()
