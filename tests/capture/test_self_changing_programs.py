"""Programs that change what they depend on while they run."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.support.captured import pair
from tests.support.losses import SurrogateKD

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
]


class Annealed(nn.Module):
    """Counts its runs, and depends on the count or not."""

    def __init__(self, rate):
        super().__init__()
        self.loc, self.runs, self.rate = nn.Parameter(torch.ones(3)), 0, rate
        self.history = []

    def forward(self):
        self.runs += 1
        self.history.append(self.runs)
        factor = 1.0 + self.rate * self.runs if self.rate else 1.0
        pyro.sample("y", dist.Normal(factor * self.loc, 1.0).to_event(1))


def standard():
    pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_a_program_that_counts_its_runs_has_a_graph():
    eager, captured = pair(Annealed(0.0), standard)
    for _ in range(3):
        assert_close(captured(), eager())
    assert captured.loss._pairs._pairs[0].captured._capture.num_graphs == 1


def test_a_program_that_depends_on_its_number_of_runs_has_no_graph():
    student = Annealed(0.1)
    _, captured = pair(student, standard)
    with pytest.warns(UserWarning, match=r"differ from run to run: .* what they change themselves \(.*runs"):
        captured()
    for _ in range(3):
        value = captured()
        assert_close(value.detach(), 1.5 * torch.tensor((1.0 + 0.1 * student.runs) ** 2))


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), lambda: __import__("random").random()], ids=["numpy", "python"])
def test_a_loss_with_random_numbers_of_numpy_or_python_has_no_graph(draw):
    loc = torch.ones(3, requires_grad=True)
    captured = SurrogateKD(["y"])(lambda: pyro.sample("y", dist.Normal(draw() * loc, 1.0).to_event(1)), standard)
    captured.compile(backend=None)
    with (
        pytest.warns(UserWarning, match="cannot be shared"),
        pytest.warns(UserWarning, match="random numbers of Python or NumPy"),
    ):
        captured()
    assert len({captured().item() for _ in range(4)}) == 4
