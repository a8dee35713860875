"""Adam takes torch's fused step on a CPU, with the same results up to rounding, unless the user has chosen otherwise."""

import copy

import pytest
import torch
from torch.testing import assert_close

from pyro_kd.errors import CheckpointError
from pyro_kd.training.optimisers import make_optimiser


def made(kind, shapes=((3, 4), (5,), (), (40, 30)), dtype=torch.float64, **options):
    torch.manual_seed(0)
    params = {str(n): torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for n, shape in enumerate(shapes)}
    optim = kind(params.values(), lr=1e-2, **options)
    adapter = make_optimiser(optim, None)
    adapter.bind(params)
    return params, optim, adapter


def step(params, adapter):
    for param in params.values():
        param.grad = torch.randn_like(param)
    adapter.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
def test_a_fused_step_equals_one_after_the_other(kind, options):
    found = []
    for fused in (None, False):
        params, optim, adapter = made(kind, fused=fused, **options)
        assert optim.param_groups[0]["fused"] is (fused is None)
        for _ in range(50):
            step(params, adapter)
        found.append([params, adapter.state_dict()["optimiser"]["state"]])
    assert_close(*found, rtol=1e-12, atol=1e-12)


def test_what_was_saved_before_goes_on_as_it_was():
    """A checkpoint says how its run took its steps, so that the run goes on bit for bit."""
    params, _, adapter = made(torch.optim.Adam, foreach=True, dtype=torch.float32)
    for _ in range(3):
        step(params, adapter)
    saved, weights = copy.deepcopy(adapter.state_dict()), [param.detach().clone() for param in params.values()]
    others, optim, other = made(torch.optim.Adam, dtype=torch.float32)
    other.load_state_dict(saved)
    for param, weight in zip(others.values(), weights, strict=True):
        param.data.copy_(weight)
    for each, by in ((params, adapter), (others, other)):
        torch.manual_seed(1)
        step(each, by)
    assert optim.param_groups[0]["foreach"]
    assert not optim.param_groups[0]["fused"]
    assert_close(others, params, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("name", "shape"), [("exp_avg", (7, 7)), ("exp_avg_sq", ()), ("max_exp_avg_sq", (4, 3)), ("step", (2,))]
)
@pytest.mark.parametrize("fused", [True, None])
def test_a_state_of_a_wrong_shape_is_an_error(name, shape, fused):
    """Torch's kernel does not look at shapes: it would read past the end of the tensor."""
    params, _, adapter = made(torch.optim.Adam, amsgrad=True, fused=fused)
    step(params, adapter)
    saved = copy.deepcopy(adapter.state_dict())
    saved["optimiser"]["state"][0][name] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=f"belongs to different parameters: '{name}' of a parameter of shape"):
        made(torch.optim.Adam, amsgrad=True, fused=fused)[2].load_state_dict(saved)


@pytest.mark.parametrize(
    ("kind", "options", "left"),
    [
        (torch.optim.Adam, {"foreach": False}, None),
        (torch.optim.Adam, {"foreach": True}, None),
        (torch.optim.Adam, {"fused": False}, False),
        (torch.optim.Adam, {"differentiable": True}, None),
        (torch.optim.Adam, {"dtype": torch.complex64}, None),  # has no fused step
        (torch.optim.NAdam, {}, "none"),
        (type("Mine", (torch.optim.Adam,), {}), {}, None),
    ],
)
def test_other_optimisers_are_left_as_they_are(kind, options, left):
    assert made(kind, **options)[1].param_groups[0].get("fused", "none") is left
