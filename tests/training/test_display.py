"""How trainers, objectives, histories and evaluations display themselves."""

import html
import re

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

from pyro_kd import Distiller, freeze
from pyro_kd.training import DistillationObjective, ELBOObjective, History, Trainer, linear
from tests.support.losses import SurrogateKD
from tests.support.training_programs import adam, gaussian, mean


def decoder(rows):
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * z, 1.0))


def text_of(value):
    """The cells of a table for a notebook, tags and entities taken away."""
    return html.unescape(re.sub("<[^>]*>", " ", value._repr_html_()))


def test_trainers_show_what_they_train():
    one = Distiller(mean, gaussian(3.0), adam, SurrogateKD(["x"]), weight=2.0, latent_weight=linear(0.0, 1.0, 5))
    for shown in (repr(one), text_of(one)):
        for part in (
            "Distiller",
            "0 done",
            "SurrogateKD",
            "mean",
            "gaussian.teacher",
            "weight=2",
            "found at the first step",
        ):
            assert part in shown
    one.fit(10, steps=2, progress=False)
    for shown in (repr(one), text_of(one)):
        for part in ("2 done, last loss", "torch's Adam", "1 in 1 tensors"):
            assert part in shown
    new, old = (
        ELBOObjective(Trace_ELBO(), decoder, gaussian(1.0)),
        DistillationObjective(SurrogateKD(["x"]), decoder, freeze(decoder)),
    )
    two = Trainer({"new": new, "old": old}, adam)
    assert "objective new" in repr(two)
    assert "objective old" in repr(two)
    assert one._repr_html_().startswith("<table>")


def test_objectives_histories_and_evaluations_show_what_they_are():
    objective = DistillationObjective(SurrogateKD(["x"]), decoder, gaussian(3.0), weight=linear(0.0, 1.0, 5))
    for shown in (repr(objective), text_of(objective)):
        assert "SurrogateKD" in shown
        assert "decoder" in shown
    pyro.clear_param_store()
    decoder(1)
    teacher = freeze(decoder)
    pyro.clear_param_store()
    one = Distiller(decoder, teacher, adam, SurrogateKD(["x"]))
    history = one.fit(10, steps=3, progress=False)
    assert repr(history).startswith("History(3 steps: step=3, loss=")
    assert "History of 3 steps" in text_of(history)
    assert re.search(r"loss .* at first, .* at last", text_of(history))
    assert "measured at 1 steps" in text_of(history)
    found = one.evaluate(10, num_samples=3)
    for shown in (repr(found), text_of(found)):
        assert re.search(r"loss .* ± ", shown)
        assert re.search(r"term x .* ± ", shown)
    assert "±" not in repr(one.evaluate(10)), "one value has no standard error"
    assert repr(History()) == "History(0 steps)"
    assert "History of 0 steps" in text_of(History())
