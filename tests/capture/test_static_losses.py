"""Whatever changes in the options of a loss or an ELBO, the captured one is the eager one."""

import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_kd import LocalKD, divergences
from pyro_kd.training import CompiledELBO
from tests.support.captured import pair
from tests.support.losses import SurrogateKD

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
]


class Curriculum(SurrogateKD):
    """Values of the teacher at first, its noise later; with options of its own, private ones too."""

    strength = 1.0

    def __init__(self, targets):
        super().__init__(targets)
        self._is_local = True
        self._options = {"strengths": [1.0]}

    def given_sites(self, teacher, targets):
        return list(teacher) if self._is_local else targets

    def combine(self, particles):
        return super().combine(particles) * self.strength * self._options["strengths"][0]


def chain(loc):
    def model():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5))

    return model


def differentiable_chain():
    loc = torch.tensor(1.0, requires_grad=True)
    return chain(loc), chain(torch.tensor(0.0))


def test_a_change_of_a_private_option_of_a_loss_is_seen(monkeypatch):
    eager, captured = pair(*differentiable_chain(), Curriculum(["y"]))
    changes = [
        lambda loss: setattr(loss, "_is_local", False),
        lambda loss: loss._options["strengths"].__setitem__(0, 2.0),
        lambda loss: setattr(loss, "strength", 3.0),
        lambda loss: setattr(loss, "_is_local", True),
    ]
    seen = []
    for change in [lambda loss: None, *changes]:
        change(eager.loss)
        change(captured.loss)
        found = [module().item() for module in (eager, captured)]
        assert found[0] == pytest.approx(found[1])
        seen.append(found[0])
    assert len(set(seen)) == 5


def test_a_change_in_what_a_divergence_or_a_weight_reaches_is_seen():
    scale = {"kl": 1.0, "weight": 1.0}

    def divergence(p, q, value):
        return scale["kl"] * divergences.kl(p, q, value)

    loss = LocalKD(["y"], divergence=divergence, latent_divergence=divergence, latent_weight=lambda name: scale["weight"])
    modules = pair(*differentiable_chain(), loss)
    seen = []
    for change in ({}, {"kl": 2.0}, {"weight": 3.0}):
        scale.update(change)
        found = [module().item() for module in modules]
        assert found[0] == pytest.approx(found[1])
        seen.append(found[0])
    assert len(set(seen)) == 3


class Tempered(Trace_ELBO):
    """Options of its own, nested ones too."""

    def __init__(self):
        super().__init__()
        self.temperature, self._schedule = 1.0, types.SimpleNamespace(factor=1.0)

    def differentiable_loss(self, model, guide, *args, **kwargs):
        return super().differentiable_loss(model, guide, *args, **kwargs) * self.temperature * self._schedule.factor


def elbo_changes():
    tempered, nested, renyi, particles = Tempered(), Tempered(), RenyiELBO(0.5, num_particles=2), Trace_ELBO()
    return {
        "temperature": (tempered, lambda: setattr(tempered, "temperature", 3.0)),
        "nested": (nested, lambda: setattr(nested._schedule, "factor", 3.0)),
        "alpha": (renyi, lambda: setattr(renyi, "alpha", 0.25)),
        "num_particles": (particles, lambda: setattr(particles, "num_particles", 3)),
    }


class LossOfRenyi:
    """Pyro's RenyiELBO has no ``differentiable_loss``: its bound, from the log weights of two particles."""

    def __init__(self, elbo):
        self.elbo = elbo

    def differentiable_loss(self, model, guide, *args, **kwargs):
        weights = []
        for _ in range(self.elbo.num_particles):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            weights.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
        scaled = (1 - self.elbo.alpha) * torch.stack(weights)
        return -scaled.logsumexp(0) / (1 - self.elbo.alpha)


@pytest.mark.parametrize("name", elbo_changes())
def test_a_change_in_an_elbo_is_seen(name):
    elbo, change = elbo_changes()[name]
    loss = LossOfRenyi(elbo) if isinstance(elbo, RenyiELBO) else elbo

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 0.5))

    captured, seen = CompiledELBO(loss, model, guide, backend=None), []
    for step in (lambda: None, change):
        step()
        found = []
        for function in (captured, lambda: loss.differentiable_loss(model, guide)):
            pyro.set_rng_seed(0)
            found.append(function().item())
        assert found[0] == pytest.approx(found[1])
        seen.append(found[0])
    assert seen[0] != seen[1]
