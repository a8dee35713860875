"""Objectives without training."""

import math

import pyro
import pytest
import torch

from pyro_kd import Distiller, freeze
from tests.support.losses import SurrogateKD
from tests.support.training_programs import decoder, fast_sgd


def test_evaluate_uses_the_same_noise_each_time():
    distiller = Distiller(decoder(1), freeze(decoder(0)), fast_sgd, SurrogateKD(["x"], latent_weight=1.0))
    pyro.clear_param_store()
    state = torch.get_rng_state()
    one, two, other = (
        distiller.evaluate(50, num_samples=20),
        distiller.evaluate(50, num_samples=20),
        distiller.evaluate(50, num_samples=20, seed=1),
    )
    assert one == two
    assert one.loss != other.loss
    assert torch.equal(state, torch.get_rng_state())
    assert one.loss.num_samples == 20
    assert one.loss.mean == pytest.approx(one.terms["x"].mean)
    assert abs(one.loss.mean - other.loss.mean) < 5 * math.hypot(one.loss.standard_error, other.loss.standard_error)
    assert distiller.num_steps == 0
    with pytest.raises(ValueError, match="no batch"):
        distiller.evaluate(batches=[])
