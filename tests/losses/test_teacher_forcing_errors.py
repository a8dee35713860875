"""Wrong values of the options of teacher forcing."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import freeze
from pyro_kd.errors import UnknownTargetError
from tests.support.losses import SurrogateKD


class Chain(nn.Module):
    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))

    def forward(self, rows):
        with pyro.plate("rows", rows):
            z_1 = pyro.sample("z_1", dist.Normal(self.loc, 1.0))
            z_2 = pyro.sample("z_2", dist.Normal(z_1, 1.0))
            pyro.sample("y", dist.Normal(z_2, 1.0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(
    ("option", "value", "error", "text"),
    [
        (
            "teacher_forcing",
            1.5,
            ValueError,
            r"teacher_forcing of site 'z_1' is 1.5, but must be a probability, in \[0, 1\]",
        ),
        ("teacher_forcing", -0.1, ValueError, "teacher_forcing of site 'z_1' is -0.1"),
        ("teacher_forcing", float("nan"), ValueError, "teacher_forcing of site 'z_1' is nan"),
        ("teacher_forcing", "0.5", TypeError, "teacher_forcing of site 'z_1' is '0.5', but must be a number"),
        (
            "teacher_forcing",
            {"z_1": 0.5},
            UnknownTargetError,
            "no entry for the latent site 'z_2'.*Give every latent site a prob",
        ),
        ("given_weight", -1.0, ValueError, "given_weight of site 'z_1' is -1.0, but must be at least 0"),
        ("given_weight", {"z_2": 1.0}, UnknownTargetError, "given_weight has no entry for the latent site 'z_1'"),
    ],
)
def test_a_wrong_value_names_the_site_and_the_remedy(option, value, error, text, compiled):
    loss = SurrogateKD(["y"], **({"teacher_forcing": 0.5} | {option: value}))
    if compiled:
        loss.compile(backend=None)
    with pytest.raises(error, match=text):
        loss(Chain(1.0), freeze(Chain(0.0)))(10)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("option", ["teacher_forcing", "given_weight"])
def test_a_mapping_may_lack_a_site_that_one_program_alone_may_have(option, compiled):
    def teacher(rows):
        with pyro.plate("rows", rows):
            own = pyro.sample("own", dist.Normal(0.0, 1.0))
            z_1 = pyro.sample("z_1", dist.Normal(own, 1.0))
            z_2 = pyro.sample("z_2", dist.Normal(z_1, 1.0))
            pyro.sample("y", dist.Normal(z_2, 1.0))

    by_site = {"z_1": 0.5, "z_2": 0.5}
    loss = SurrogateKD(["y"], fresh="*", **({"teacher_forcing": 0.5} | {option: by_site}))
    if compiled:
        loss.compile(backend=None)
    assert loss(Chain(1.0), freeze(teacher))(10).isfinite()
