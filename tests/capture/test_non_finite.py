"""A loss or gradient that is not finite is reported as without capture."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd.errors import NonFiniteLossError
from tests.support.captured import MARKS, Pair, Registered, rows, standard
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def raised(loss, pair, *args):
    with pytest.raises(NonFiniteLossError) as caught:
        loss.loss_and_grads(pair.student, pair.teacher, *args)
    assert all(param.grad is None for param in pair.student.parameters())
    return str(caught.value)


@pytest.mark.parametrize("where", ["data", "parameter"])
def test_a_nan_raises_the_error_of_an_eager_call(where):
    pair, x = Pair(Registered(1)), rows()
    eager, captured = SurrogateKD(["x"]), SurrogateKD(["x"]).compile(backend=None)
    captured.loss_and_grads(pair.student, pair.teacher, x)
    pair.student.zero_grad()
    if where == "data":
        x[0, 0] = torch.nan
    else:
        pair.student.last.bias.data.fill_(torch.nan)
    runs = pair.student.runs
    message = raised(captured, pair, x)
    assert pair.student.runs == runs
    with pyro.validation_enabled(False):  # which would find it earlier
        assert message == raised(eager, pair, x)
    assert ("'z'" if where == "data" else "'x'") in message


def test_a_gradient_that_is_not_finite_raises_the_error_of_an_eager_call():
    def student(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x + (loc - 1.0).abs().sqrt(), 1.0))

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x, 1.0))

    messages = []
    for loss in (SurrogateKD(["x"]).compile(backend=None), SurrogateKD(["x"])):
        with pytest.raises(NonFiniteLossError, match="gradient with respect to parameter 'loc'") as caught:
            loss.loss_and_grads(student, teacher, torch.zeros(2))
        messages.append(str(caught.value))
        assert pyro.get_param_store()._params["loc"].grad is None
    assert messages[0] == messages[1]


def test_a_scale_that_becomes_negative_is_found_by_validation():
    """Validation goes on, first before the 50th call."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self):
            pyro.sample("x", dist.Normal(torch.zeros(2), self.scale).to_event(1))

    student = Net()
    loss = SurrogateKD(["x"])(student, standard)
    loss()
    student.scale.data.neg_()

    def train():
        for _ in range(50):
            loss()

    with pytest.raises((ValueError, NonFiniteLossError), match="scale"):  # the KL of two Normals is NaN there at once
        train()
