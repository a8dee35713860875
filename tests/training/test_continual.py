"""Continual learning: replay, CURL's and LGM's losses against their definitions, and the weights of new and old."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_kd
from pyro_kd import errors, freeze
from pyro_kd.training import (
    DistillationObjective,
    ELBOObjective,
    LifelongELBO,
    Replay,
    Trainer,
    continual_objectives,
    generative_replay,
    lifelong_replay,
)
from tests.support.losses import SurrogateKD


class Autoencoder(nn.Module):
    """z ~ N(prior, 1), x ~ N(w z, 1), guide N(a x, s)."""

    def __init__(self, prior=0.0, weight=1.0, slope=0.5, scale=0.7):
        super().__init__()
        self.prior = nn.Parameter(torch.tensor(prior))
        self.weight = nn.Parameter(torch.tensor(weight))
        self.slope = nn.Parameter(torch.tensor(slope))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def model(self, rows, x=None):
        pyro.module("vae", self)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(self.prior, 1.0))
            return pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=x)

    def guide(self, rows, x):
        pyro.module("vae", self)
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()))


def arguments(values, rows):
    return rows, values["x"]


def test_replay_draws_from_the_old_program_and_leaves_no_trace():
    old = Autoencoder(prior=3.0)
    rows, x = Replay(freeze(old.model), ["x"], arguments)(20_000)
    error = (2 / 20_000) ** 0.5  # x ~ N(3, 2)
    assert abs(x.mean() - 3.0) < 5 * error
    assert abs(x.var() - 2.0) < 5 * 2 * (2 / 20_000) ** 0.5
    assert rows == 20_000
    assert not x.requires_grad
    assert len(pyro.get_param_store()) == 0


def test_replay_draws_where_the_program_observes():
    def old(rows, x):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    data = torch.full((5,), 9.0)
    drawn = Replay(old, "x", lambda values, x: (values["x"],), lambda x: (len(x), x))(data)[0]
    assert drawn.shape == (5,)
    assert (drawn != 9.0).all()


def test_replay_of_an_unknown_site_is_an_error():
    with pytest.raises(errors.UnknownTargetError, match=r"'y' is not a sample site.*it has 'z', 'x'"):
        Replay(freeze(Autoencoder().model), ["y"], arguments)(3)


def test_curl_is_the_elbo_on_the_old_models_samples():
    old, new = Autoencoder(prior=2.0), Autoencoder(weight=0.3)
    replay = Replay(freeze(old.model), ["x"], arguments)
    objective = generative_replay(Trace_ELBO(), new.model, new.guide, replay, weight=0.1)
    pyro.set_rng_seed(1)
    found = objective.value(0, (7,), {})
    pyro.set_rng_seed(1)
    with torch.no_grad():
        x = torch.randn(7)
        x = torch.randn(7) + (2.0 + x)
    mean, scale = new.slope * x, new.log_scale.exp()
    z = mean + scale * torch.randn(7)
    by_hand = dist.Normal(mean, scale).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    by_hand = by_hand - dist.Normal(new.weight * z, 1.0).log_prob(x)
    torch.testing.assert_close(found, by_hand.sum())
    assert objective.weight_at(0) == 0.1


def test_lgm_adds_the_kl_from_the_old_posterior():
    old, new = Autoencoder(slope=0.5, scale=0.7), Autoencoder(slope=0.2, scale=0.4)
    x = torch.randn(50)
    elbo = TraceMeanField_ELBO()
    pyro.set_rng_seed(1)
    plain = elbo.differentiable_loss(new.model, new.guide, 50, x)
    pyro.set_rng_seed(1)
    found = LifelongELBO(elbo, freeze(old.guide), weight=3.0).differentiable_loss(new.model, new.guide, 50, x)
    kl = torch.tensor(0.7 / 0.4).log() + (0.4**2 + (0.3 * x) ** 2) / (2 * 0.7**2) - 0.5
    torch.testing.assert_close(found - plain, 3.0 * kl.sum(), rtol=1e-4, atol=1e-4)
    slope = torch.autograd.grad(found - plain, new.slope)[0]
    torch.testing.assert_close(slope, 3.0 * ((0.2 - 0.5) * x.square() / 0.49).sum(), rtol=1e-3, atol=1e-3)


def test_the_consistency_of_a_guide_with_itself_is_zero():
    vae = Autoencoder()
    x = torch.randn(10)
    pyro.set_rng_seed(1)
    plain = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, 10, x)
    pyro.set_rng_seed(1)
    loss = LifelongELBO(TraceMeanField_ELBO(), freeze(vae.guide)).differentiable_loss(vae.model, vae.guide, 10, x)
    assert loss.item() == plain.item()


@pytest.mark.parametrize("kind", ["ours", "curl", "lgm"])
def test_each_form_of_old_knowledge_trains_with_new_data(kind):
    """New data moves the model; the old knowledge holds it: the prior ends between, and the old model stays as it was."""
    old = Autoencoder(prior=-2.0)
    vae = Autoencoder(prior=-2.0)
    program, guide = freeze(old.model), freeze(old.guide)
    replay = Replay(program, ["x"], arguments)
    knowledge = {
        "ours": DistillationObjective(SurrogateKD(["x"]), vae.model, program, weight=1 / 100),
        "curl": generative_replay(Trace_ELBO(), vae.model, vae.guide, replay, weight=1 / 100),
        "lgm": lifelong_replay(Trace_ELBO(), vae.model, vae.guide, guide, replay, weight=1 / 100),
    }[kind]
    new = ELBOObjective(
        Trace_ELBO(), vae.model, vae.guide, weight=1 / 100, arguments=lambda rows: (rows, 4 + torch.randn(rows))
    )
    trainer = Trainer(continual_objectives(new, knowledge, new_share=0.5), lambda params: torch.optim.Adam(params, lr=0.03))
    trainer.fit(100, steps=150, progress=False)
    assert -1.8 < vae.prior < 3.0
    assert old.prior.item() == -2.0
    assert old.prior.grad is None
    pyro.clear_param_store()
    alone = Autoencoder(prior=-2.0)
    pyro.set_rng_seed(0)
    objective = ELBOObjective(Trace_ELBO(), alone.model, alone.guide, weight=1 / 100, arguments=new.arguments)
    Trainer(objective, lambda params: torch.optim.Adam(params, lr=0.03)).fit(100, steps=150, progress=False)
    assert (alone.prior * alone.weight) > (vae.prior * vae.weight) + 0.3


def test_weights_of_new_and_old_are_multiplied_by_their_shares():
    vae = Autoencoder()
    elbo = ELBOObjective(Trace_ELBO(), vae.model, vae.guide, weight=0.5)
    rising = ELBOObjective(Trace_ELBO(), vae.model, vae.guide, weight=lambda step: float(step))
    joined = continual_objectives(elbo, {"samples": elbo, "distillation": rising}, new_share=0.25)
    assert {name: part.weight_at(8) for name, part in joined.items()} == {
        "new": 0.125,
        "samples": 0.375,
        "distillation": 6.0,
    }
    assert list(continual_objectives(elbo, elbo, new_share=0.25)) == ["new", "old"]
    assert elbo.weight == 0.5
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        continual_objectives(elbo, elbo, new_share=1.5)
    with pytest.raises(ValueError, match="called 'new'"):
        continual_objectives(elbo, {"new": elbo}, new_share=0.5)


def test_a_program_that_is_not_callable_is_an_error():
    with pytest.raises(errors.InvalidProgramError):
        Replay(None, ["x"], arguments)
    with pytest.raises(errors.InvalidProgramError):
        LifelongELBO(Trace_ELBO(), "guide")


class TwoLayers(nn.Module):
    """A guide z1 ~ N(a, 1), z2 ~ N(z1, 1), and the model N(0, 1) of both."""

    def __init__(self, loc):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))

    def model(self, rows):
        with pyro.plate("rows", rows):
            z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
            pyro.sample("z2", dist.Normal(0.0 * z1, 1.0))

    def guide(self, rows):
        pyro.module("two", self)
        with pyro.plate("rows", rows):
            z1 = pyro.sample("z1", dist.Normal(self.loc, 1.0))
            pyro.sample("z2", dist.Normal(z1 * (self.loc != 0), 1.0))


def test_consistency_of_several_layers_is_along_the_old_draws():
    """Of z1, KL(N(3, 1) || N(0, 1)) = 4.5; of z2 given the old z1 ~ N(0, 1), z1^2 / 2, so that the mean is 5, and not the joint's 9.5."""
    old, new, rows = TwoLayers(0.0), TwoLayers(3.0), 20_000
    loss = LifelongELBO(TraceMeanField_ELBO(), old.guide).consistency
    found = loss.loss(new.guide, freeze(old.guide), rows) / rows
    assert abs(found - 5.0) < 5 * (0.5 / rows) ** 0.5


def test_old_programs_that_are_not_frozen_are_frozen():
    vae = Autoencoder(prior=-2.0)
    replay, loss = Replay(vae.model, ["x"], arguments), LifelongELBO(Trace_ELBO(), vae.guide)
    assert len(pyro.get_param_store()) == 0
    with torch.no_grad():
        vae.prior += 100
        vae.slope += 100
    assert abs(replay(1000)[1].mean() + 2.0) < 1
    x = torch.ones(3)
    moved = loss.consistency.loss(vae.guide, loss.old_guide, 3, x)
    assert moved > 1000


def test_svi_takes_a_lifelong_elbo():
    old, vae = Autoencoder(), Autoencoder(slope=0.1)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), LifelongELBO(Trace_ELBO(), old.guide))
    before = vae.slope.item()
    svi.step(20, torch.randn(20))
    assert vae.slope.item() != before


def test_invalid_arguments_of_continual_learning_are_errors():
    vae = Autoencoder()
    with pytest.raises(TypeError, match="RenyiELBO has no differentiable_loss.*Trace_ELBO"):
        LifelongELBO(pyro.infer.RenyiELBO(), vae.guide)
    loss = LifelongELBO(Trace_ELBO(), vae.guide)
    with pytest.raises(TypeError, match="cannot be annealed"):
        ELBOObjective(loss, vae.model, vae.guide, latent_weight=lambda step: 0.5)
    with pytest.raises(TypeError, match="f returned Tensor, and must return a tuple"):
        Replay(vae.model, ["x"], arguments, lambda x: x)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="old is empty"):
        continual_objectives(ELBOObjective(loss, vae.model, vae.guide), {}, new_share=0.5)

    def partly(rows):
        with pyro.plate("rows", rows):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.ones(rows), obs_mask=torch.arange(rows) < 2)

    with pytest.raises(errors.UnknownTargetError, match="'x' has an obs_mask.*'x_unobserved'"):
        Replay(partly, ["x"], arguments)(4)


def test_point_posteriors_are_compared_by_their_distance():
    def guide_at(value):
        return lambda rows: pyro.sample("z", dist.Delta(torch.tensor(value)))

    loss = LifelongELBO(Trace_ELBO(), guide_at(1.0)).consistency
    assert loss.terms(guide_at(3.0), guide_at(1.0), 5)["z"].value == 4.0


def test_old_knowledge_has_no_local_steps_unless_it_says_so():
    """The student begins as the old model: there is nothing to learn site by site."""

    def program(rows):
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    old = freeze(program)
    new = ELBOObjective(Trace_ELBO(), pyro.poutine.condition(program, {"x": torch.zeros(3)}), lambda rows: None)
    for asked, expected in ((None, 0), (5, 5)):
        knowledge = DistillationObjective(pyro_kd.SurrogateKD(["x"]), program, old, local_steps=asked)
        joined = continual_objectives(new, knowledge, new_share=0.5)["old"]
        joined.begin_fit(100)
        assert joined.local_steps == expected
