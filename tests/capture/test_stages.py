"""A capture says what it is doing, and goes on saying so while it takes long."""

import logging
import time

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import Distiller, SurrogateKD, freeze
from pyro_kd.capture.stages import listening, stage


def test_a_long_stage_is_named_again_and_again(caplog):
    heard = []
    with caplog.at_level(logging.INFO, "pyro_kd.capture"), listening(heard.append), stage("compiling", every=0.02):
        end = time.monotonic() + 10
        while len(heard) < 3 and time.monotonic() < end:
            time.sleep(0.005)
    assert heard[0] == "compiling"
    assert heard[1] == "compiling: 0 s"
    assert heard[-1] == ""
    assert [record.getMessage() for record in caplog.records] == heard[:-1]


def test_nobody_hears_of_a_stage_after_it():
    heard = []
    with listening(heard.append), pytest.raises(RuntimeError, match="fails"), stage("tracing", every=0.01):
        raise RuntimeError("fails")
    assert heard == ["tracing", ""]
    with stage("tracing", every=0.01):
        time.sleep(0.05)
    assert heard == ["tracing", ""]


def test_the_bar_of_a_fit_shows_tracing_and_compiling(capfd):
    """The fit's own bar, at the first step, which captures."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, rows):
            with pyro.plate("rows", rows):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5))

    teacher, student = freeze(Model()), Model()
    distiller = Distiller(
        student,
        teacher,
        lambda params: torch.optim.Adam(params, lr=0.1),
        SurrogateKD(["x"]),
        compile={"backend": None},
        local_steps=0,
    )
    distiller.fit(8, steps=2)
    shown = capfd.readouterr().err
    assert "tracing the programs" in shown
    assert "compiling " in shown
