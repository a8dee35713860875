"""LSTMs, GRUs and RNNs in captured losses: trained, frozen, in several layers, and where a graph has none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, outcome
from tests.support.losses import SurrogateKD

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]


class Sequence(nn.Module):
    """A latent of five points, and a target of as many."""

    def __init__(self, seed, width, kind=nn.LSTM, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.net = kind(2, width, batch_first=True, **options)
        self.last = nn.Linear(width * (1 + self.net.bidirectional), 1)

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(5, 2), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(self.last(self.net(z)[0]).squeeze(-1), 0.5).to_event(1))


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "dropout": 0.5, "bias": False}),
        (nn.GRU, {"num_layers": 2}),
        (nn.RNN, {}),
    ],
)
def test_a_recurrent_network_is_captured(kind, options, is_training, num_graphs):
    student = Sequence(1, 3, kind, **options).train(is_training)
    teacher = freeze(Sequence(0, 4).train(is_training))
    eager, captured = SurrogateKD(["x"])(student, teacher), SurrogateKD(["x"])(student, teacher)
    captured.compile(backend=None)
    for seed in range(3):
        assert_close(outcome(captured, 6, seed=seed), outcome(eager, 6, seed=seed))
    with torch.no_grad():
        for module in (eager, captured):
            module(6)
    assert num_graphs() == 2
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


class Output(nn.Module):
    """TorchScript takes an LSTM inside of a module only."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.bidirectional = False

    def forward(self, x):
        return (self.lstm(x)[0],)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_scripted_lstm_runs_without_a_graph():
    student = Sequence(1, 3)
    student.net = torch.jit.script(Output(student.net))
    teacher = freeze(Sequence(0, 4))
    captured, eager = SurrogateKD(["x"])(student, teacher), SurrogateKD(["x"])(student, teacher)
    captured.compile(backend=None)
    with pytest.warns(
        UserWarning, match=r"without a graph: the program differentiates an LSTM of oneDNN.* without TorchScript"
    ):
        found = outcome(captured, 6)
    assert_close(found, outcome(eager, 6))
