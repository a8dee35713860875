"""The variational autoencoder of binary vectors."""

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from models.vae import VAE


def test_sites_have_the_documented_shapes():
    vae = VAE(pixels=6, latents=2, hidden=[4, 3])
    trace = poutine.trace(vae.model).get_trace(5)
    assert trace.nodes["z"]["value"].shape == (5, 2)
    assert trace.nodes["x"]["value"].shape == (5, 6)
    assert trace.nodes["_RETURN"]["value"].shape == (5, 6)


def test_the_elbo_bounds_the_likelihood_of_an_enumerated_sample():
    """The model's pixels do not depend on z where the weights are zero: then the bound is tight for the prior as guide."""
    vae = VAE(pixels=6, latents=2, hidden=[4])
    for parameter in vae.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.rand(5, 6).bernoulli()
    elbo = -Trace_ELBO().loss(vae.model, vae.guide, 5, x)
    assert abs(elbo + 30 * torch.tensor(2.0).log().item()) < 1e-4


def test_a_model_in_float64_draws_in_float64():
    vae = VAE(6, 2, [4]).double()
    trace = poutine.trace(vae.model).get_trace(3)
    assert trace.nodes["z"]["value"].dtype == torch.float64
