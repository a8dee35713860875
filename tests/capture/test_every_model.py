"""Every model trains alike with and without capture."""

import pyro
import pytest
import torch
from torch.testing import assert_close

from models.bayesian_network import NeuralBayesianNetwork
from models.bottleneck import Bottleneck
from models.chains import BinomialChain, BinomialStudent, NormalChain, NormalStudent
from models.conditional_vae import ConditionalVAE
from models.helmholtz import HelmholtzMachine
from models.hierarchical_vae import HierarchicalVAE
from models.vae import VAE
from models.vrnn import VRNN
from pyro_kd import LocalKD, freeze
from tests.support.captured import MARKS, Pair, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def helmholtz():
    return HelmholtzMachine(3, 3).model, ["y1", "y2"], (6,)


def helmholtz_guide():
    return HelmholtzMachine(3, 3).guide, None, (6, torch.arange(6.0), torch.arange(6.0) / 2)


def hierarchical_vae():
    return HierarchicalVAE(32, 3, latents=2).model, ["x"], (3,)


def conditional_vae():
    return ConditionalVAE(32, 3, latents=2).model, ["x"], (3, 1)


def vrnn():
    is_point = lambda site: site["name"].startswith(("pen", "move"))  # noqa: E731
    return VRNN(3, 4, latents=2).model, is_point, (5, 3)


def bottleneck():
    return Bottleneck(3, latents=2, classes=4, hidden=[5]).classify, ["label"], (rows(),)


def vae():
    return VAE(6, 2, [4]).model, ["x"], (5,)


def normal_chain():
    return NormalStudent(3).model, ["y"], (5,)


def binomial_chain():
    return BinomialStudent(3, count=20).model, ["y"], (5,)


def bayesian_network():
    parents = {"a": (), "b": ("a",), "c": ("a", "b")}
    return NeuralBayesianNetwork(parents, {"a": 2, "b": 3, "c": 4}).model, ["c"], (5,)


TEACHERS = {normal_chain: lambda: NormalChain(3), binomial_chain: lambda: BinomialChain(3, count=20)}


@pytest.mark.parametrize(
    "make",
    [
        helmholtz,
        helmholtz_guide,
        hierarchical_vae,
        conditional_vae,
        vrnn,
        bottleneck,
        vae,
        normal_chain,
        binomial_chain,
        bayesian_network,
    ],
)
def test_a_model_trains_alike_with_and_without_capture(make, num_graphs, float64):
    """Losses of four steps, then parameters and running averages."""

    def train(is_captured):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        teacher = freeze(TEACHERS[make]().model if make in TEACHERS else make()[0])
        student, targets, args = make()
        loss = (SurrogateKD(targets) if targets else LocalKD(["z1", "z3"]))(student, teacher)
        if is_captured:
            loss.compile(backend=None)
        optim = torch.optim.SGD(loss.parameters(), lr=1e-6)
        losses = []
        for _ in range(4):
            optim.zero_grad()
            value = loss(*args)
            value.backward()
            optim.step()
            losses.append(value.detach())
        return losses, loss.state_dict(), torch.rand(())

    assert_close(train(True), train(False), rtol=1e-9, atol=1e-9)
    assert num_graphs() == 1


def test_each_call_writes_to_buffers_once():
    pair = Pair()
    for calls in range(1, 4):
        pair.captured(rows())
        assert pair.student.norm.num_batches_tracked == calls
