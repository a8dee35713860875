"""Weights of the latents, divergences and several particles."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from models.vae import VAE
from pyro_kd import freeze
from tests.support.captured import MARKS, Net, Pair, Registered, differ, outcome, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def test_a_latent_weight_that_changes_needs_no_new_graph(num_graphs):
    pair, x = Pair(loss=SurrogateKD(["x"], latent_weight=0.5)), rows()
    values = []
    for weight in (0.5, 0.25, 2.0, {"z": 0.75}, {"z": 3.0}):
        pair.eager.loss.latent_weight = pair.captured.loss.latent_weight = weight
        values.append(pair.agree(x)[0].item())
    assert len(set(values)) == 5
    assert num_graphs() == 2  # numbers, and mappings


def test_a_latent_weight_of_zero_has_a_graph_of_its_own(num_graphs):
    pair, x = Pair(loss=SurrogateKD(["x"], latent_weight=0.0)), rows()
    for weight in (0.0, 1.0, 0.0, 0.5):
        pair.eager.loss.latent_weight = pair.captured.loss.latent_weight = weight
        pair.agree(x)
    assert num_graphs() == 2


def test_a_latent_weight_can_be_a_function():
    pair = Pair(loss=SurrogateKD(["x"], latent_weight=lambda name: 0.3))
    pair.agree(rows())
    pair.eager.loss.latent_weight = pair.captured.loss.latent_weight = lambda name: 0.6
    pair.agree(rows())


def test_a_changed_divergence_is_used():
    pair = Pair(loss=SurrogateKD(["x"]))
    before = pair.agree(rows())
    halved = lambda p, q, value: 0.5 * torch.distributions.kl_divergence(p, q)  # noqa: E731
    pair.eager.loss.divergence = pair.captured.loss.divergence = halved
    assert differ(pair.agree(rows()), before)


def test_several_particles_share_a_graph(num_graphs):
    pair, x = Pair(loss=SurrogateKD(["x"], num_particles=3)), rows()
    pair.agree(x)
    pair.agree(x)
    assert num_graphs() == 1


@pytest.mark.parametrize("seed", range(4))
def test_three_particles_have_their_gradients_bit_for_bit(seed):
    """A third of each is not a third of the sum of rounded numbers."""
    torch.manual_seed(seed)
    pair, x = Pair(student=Net(seed), loss=SurrogateKD(["x"], num_particles=3)), torch.randn(8, 3, dtype=torch.float64)
    for one, other in zip(outcome(pair.captured, x), outcome(pair.eager, x), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_parameters_of_the_store_keep_their_order_after_capture():
    """Optimisers and their files go by it, in this process and the next."""
    names = [f"{greek}_{number}" for greek in ("alpha", "beta", "gamma", "delta") for number in range(5)]

    def program(x):
        scales = [pyro.param(name, torch.tensor(1.0)) for name in names]
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x * torch.stack(scales).sum(), 1.0))

    def teacher(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(x, 1.0))

    module = SurrogateKD(["x"])(program, teacher)
    module.compile(backend=None)
    module(torch.randn(3))
    assert [name.removeprefix("reached.") for name, _ in module.named_parameters()] == names


def test_vectorised_particles_share_a_graph(num_graphs):
    loss = SurrogateKD(["x"], num_particles=3, max_plate_nesting=1, vectorize_particles=True)
    student, teacher = VAE(6, 2, [4]).model, freeze(VAE(6, 2, [4]).model)
    eager, captured = loss(student, teacher), loss(student, teacher)
    captured.compile(backend=None)
    for _ in range(2):
        assert_close(outcome(captured, 5), outcome(eager, 5))
    assert num_graphs() == 1


def test_particles_add_up_in_loss_and_grads():
    x, results = rows(), []
    for is_captured in (True, False):
        pyro.clear_param_store()
        loss, student, teacher = SurrogateKD(["x"], num_particles=3), Registered(1), freeze(Net(0))
        if is_captured:
            loss.compile(backend=None)
        for _ in range(2):
            pyro.set_rng_seed(5)
            student.zero_grad()
            value = loss.loss_and_grads(student, teacher, x)
        results.append([torch.tensor(value), *(param.grad for param in student.parameters())])
    assert_close(*results)
