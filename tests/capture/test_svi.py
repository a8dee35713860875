"""Pyro's SVI trains a captured loss, whatever happens to the parameter store."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, Net, Pair, Registered, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def with_param():
    def student(inputs):
        weight = pyro.param("weight", torch.zeros(3))
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(inputs)):
            z = pyro.sample("z", dist.Normal((inputs * weight).sum(-1, keepdim=True).expand(-1, 2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0))

    return student


def stored():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("make", [with_param, lambda: Registered(1)], ids=["pyro.param", "pyro.module"])
def test_svi_trains_alike_with_and_without_capture(make, num_graphs):
    teacher, results = freeze(Net(0)), []
    for loss in (SurrogateKD(["x"]).compile(backend=None), SurrogateKD(["x"])):
        pyro.clear_param_store()
        svi = SVI(make(), teacher, pyro.optim.Adam({"lr": 0.05}), loss)
        pyro.set_rng_seed(2)
        losses = [svi.step(rows(step)) for step in range(5)]
        results.append((losses, stored()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1].keys() == results[1][1].keys() != set()
    assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    assert num_graphs() == 1


@pytest.mark.parametrize("make", [with_param, lambda: Registered(1)], ids=["pyro.param", "pyro.module"])
def test_svi_trains_after_the_store_was_cleared(make):
    teacher, student, results = freeze(Net(0)), make(), []
    start = student.state_dict() if isinstance(student, nn.Module) else {}
    start = {name: value.clone() for name, value in start.items()}
    for loss in (SurrogateKD(["x"]).compile(backend=None), SurrogateKD(["x"])):
        svi = SVI(student, teacher, pyro.optim.Adam({"lr": 0.05}), loss)
        for _ in range(2):
            pyro.clear_param_store()
            if start:
                student.load_state_dict(start)
            pyro.set_rng_seed(2)
            svi.step(rows())
            first = stored()
            losses = [svi.step(rows(step)) for step in range(3)]
            assert all(not torch.equal(value, first[name]) for name, value in stored().items())
            results.append((torch.tensor(losses), stored()))
    for found in results[1:]:
        assert found[1].keys() == results[0][1].keys()
    assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    assert_close(results[1], results[3], rtol=1e-4, atol=1e-5)


def test_parameters_of_a_refilled_store_are_used():
    student = lambda: pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))  # noqa: E731
    captured = SurrogateKD(["x"])(student, freeze(lambda: pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))))
    captured.compile(backend=None)
    assert captured().item() == pytest.approx(0.5)
    pyro.clear_param_store()
    pyro.param("loc", torch.tensor(10.0))
    assert captured().item() == pytest.approx(50.0)
    state = pyro.get_param_store().get_state()
    pyro.get_param_store()["loc"] = torch.tensor(2.0)
    assert captured().item() == pytest.approx(2.0)
    pyro.get_param_store().set_state(state)
    assert captured().item() == pytest.approx(50.0)


def test_svi_evaluates_without_gradients():
    pair, x = Pair(Registered(1)), rows()
    svi = SVI(pair.student, pair.teacher, pyro.optim.Adam({"lr": 0.05}), SurrogateKD(["x"]).compile(backend=None))
    svi.step(x)
    pyro.set_rng_seed(4)
    found = svi.evaluate_loss(x)
    pyro.set_rng_seed(4)
    assert found == pytest.approx(SurrogateKD(["x"]).loss(pair.student, pair.teacher, x), rel=1e-6)
