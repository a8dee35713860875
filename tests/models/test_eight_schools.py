"""The eight schools, and Gaussian laws of their estimates."""

import pyro
import torch
from pyro import poutine

from models.eight_schools import EFFECTS, ERRORS, EightSchools, GaussianSchools


def test_sites_have_the_documented_shapes():
    model = EightSchools()
    trace = poutine.trace(model).get_trace()
    assert {name: tuple(trace.nodes[name]["value"].shape) for name in ("mu", "tau", "eta", "effects")} == {
        "mu": (),
        "tau": (),
        "eta": (8,),
        "effects": (8,),
    }
    assert poutine.trace(model).get_trace(model.effects).nodes["effects"]["is_observed"]
    assert (len(EFFECTS), len(ERRORS)) == (8, 8)


def test_it_broadcasts_over_draws_of_the_parameters():
    given = {"mu": torch.zeros(5), "tau": torch.arange(5.0), "eta": torch.ones(5, 8)}
    fn = poutine.trace(poutine.condition(EightSchools(), given)).get_trace().nodes["effects"]["fn"]
    torch.testing.assert_close(fn.mean, torch.arange(5.0)[:, None].expand(5, 8))


def test_the_gaussian_laws_have_the_covariance_of_their_rank():
    pyro.set_rng_seed(0)
    for rank in (0, 2):
        law = GaussianSchools(rank).law()
        assert law.event_shape == (8,)
    assert torch.linalg.matrix_rank(law.covariance_matrix - torch.diag(law.cov_diag)) == 2
