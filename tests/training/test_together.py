"""Small parameters are updated together, with the same results bit for bit, unless the user has chosen otherwise."""

import pytest
import torch
from torch.testing import assert_close

from pyro_kd.training.optimisers import make_optimiser


def made(kind, shapes=((3, 4), (5,), (), (40, 30)), **options):
    torch.manual_seed(0)
    params = {str(n): torch.nn.Parameter(torch.randn(shape)) for n, shape in enumerate(shapes)}
    optim = kind(params.values(), lr=1e-2, **options)
    adapter = make_optimiser(optim, None)
    adapter.bind(params)
    return params, optim, adapter


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
def test_a_step_over_all_parameters_equals_one_after_the_other(kind, options):
    found = []
    for foreach in (None, False):
        params, optim, adapter = made(kind, foreach=foreach, **options)
        assert optim.param_groups[0]["foreach"] is (foreach is None)
        for _ in range(50):
            for param in params.values():
                param.grad = torch.randn_like(param)
            adapter.step()
        found.append([params, adapter.state_dict()["optimiser"]["state"]])
    assert_close(*found, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("kind", "options", "left"),
    [
        (torch.optim.Adam, {"foreach": False}, False),
        (torch.optim.Adam, {"fused": True}, None),
        (torch.optim.Adam, {"differentiable": True}, None),
        (torch.optim.Adam, {"shapes": ((1025, 1024),)}, None),  # large
        (torch.optim.NAdam, {}, None),  # differs by rounding
        (type("Mine", (torch.optim.Adam,), {}), {}, None),
    ],
)
def test_other_optimisers_are_left_as_they_are(kind, options, left):
    assert made(kind, **options)[1].param_groups[0]["foreach"] is left
