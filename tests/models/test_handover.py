"""What a guide hands on is what the model would compute, and nothing is handed on that may differ."""

import gc
import weakref

import pytest
import torch
from pyro import poutine
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO

from models.conditional_vae import ConditionalVAE
from models.hierarchical_vae import HierarchicalVAE


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return ConditionalVAE(32, 4, latents=2)


X = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def count_runs(vae):
    """The number of runs of the model's stages from now on."""
    runs = []
    for stage in vae.top_down:
        stage.register_forward_hook(lambda *_: runs.append(1))
    return runs


def replayed(vae, guide, *args):
    return poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(*args)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_handing_on_gives_the_same_elbo_in_fewer_runs(elbo, num_particles, vae, monkeypatch):
    def loss_and_grads():
        runs = count_runs(vae)
        torch.manual_seed(1)
        loss = elbo(num_particles=num_particles).differentiable_loss(vae.model, vae.guide, 2, 1, X)
        return len(runs), [loss.detach(), *torch.autograd.grad(loss, list(vae.parameters()))]

    count, mine = loss_and_grads()
    monkeypatch.setattr("models.handover._state", lambda network, key: object())
    other, theirs = loss_and_grads()
    assert (count, other) == (5 * num_particles, 9 * num_particles)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("is_training", "count"), [(True, 9), (False, 5)])
def test_running_averages_count_each_run(is_training, count):
    vae = HierarchicalVAE(32, 4, latents=2).train(is_training)
    runs = count_runs(vae)
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, 2, X)
    assert len(runs) == count


def update(vae):
    with torch.no_grad():
        for param in vae.top_down.parameters():
            param.mul_(1.5)


@pytest.mark.parametrize(
    ("between", "task", "count"),
    [
        (lambda vae: None, 0, 1),
        (lambda vae: None, 1, 5),
        (update, 0, 5),
        (lambda vae: vae.eval(), 0, 5),
    ],
    ids=["same", "task", "parameters", "mode"],
)
def test_what_may_differ_is_computed_again(between, task, count, vae, monkeypatch):
    guide = poutine.trace(vae.guide).get_trace(2, 0, X)
    between(vae)
    runs = count_runs(vae)
    model = replayed(vae, guide, 2, task, X)
    assert len(runs) == count
    again = replayed(vae, guide, 2, task, X)
    assert len(runs) == count + 5  # taken once
    torch.testing.assert_close(model.log_prob_sum(), again.log_prob_sum())


def test_a_different_guide_or_autograd_mode_hands_nothing_on(vae):
    other = ConditionalVAE(32, 4, latents=2)
    runs = count_runs(vae)
    replayed(vae, poutine.trace(other.guide).get_trace(2, 0, X), 2, 0, X)
    assert len(runs) == 5
    with torch.no_grad():
        guide = poutine.trace(vae.guide).get_trace(2, 0, X)
    runs.clear()
    model = replayed(vae, guide, 2, 0, X)
    assert len(runs) == 5
    model.log_prob_sum().backward()
    assert all(param.grad is not None for param in vae.top_down.parameters())


@pytest.mark.parametrize(
    "change",
    [lambda guide: guide.detach_(), lambda guide: guide.nodes["z5"].update(value=torch.ones(2, 2, 1, 1))],
    ids=["detached", "replaced"],
)
def test_a_changed_draw_is_computed_again(change, vae):
    guide = poutine.trace(vae.guide).get_trace(2, 0, X)
    change(guide)
    first, second = (replayed(vae, guide, 2, 0, X) for _ in range(2))
    assert torch.equal(first.nodes["z4"]["fn"].mean, second.nodes["z4"]["fn"].mean)
    first.nodes["z4"]["fn"].mean.sum().backward()
    assert all(param.grad is None for param in vae.bottom_up.parameters())


def test_wake_sleep_trains_as_without_handing_on(vae, monkeypatch):
    def grads():
        vae.zero_grad()
        torch.manual_seed(1)
        loss = ReweightedWakeSleep(num_particles=2, insomnia=1.0, vectorize_particles=False, max_plate_nesting=1)
        loss.loss_and_grads(vae.model, vae.guide, 2, 0, X)
        return [param.grad.clone() for param in vae.parameters() if param.grad is not None]

    mine = grads()
    monkeypatch.setattr("models.handover._state", lambda network, key: object())
    for one, two in zip(mine, grads(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


def test_nothing_is_kept_beyond_the_guides_trace(vae):
    guide = poutine.trace(vae.guide).get_trace(2, 0, X)
    ((_, handed),) = guide.nodes["z5"]["infer"]["computed"].values()
    handed = weakref.ref(handed)
    assert handed() is not None
    del guide
    gc.collect()
    assert handed() is None
    assert "computed" not in poutine.trace(vae.model).get_trace(2, 0).nodes["z5"]["infer"]
