"""Laws of record_noise and replay_noise, each a check on a random program."""

from typing import Any

import pyro
import torch
from hypothesis import assume
from pyro import poutine

from pyro_kd import record_noise, replay_noise
from tests.support.program_laws.traces import assert_same, equal, fresh, get_trace, sample_sites
from tests.support.random_programs import program, tables

__all__ = ["check_commutes", "check_derivative", "check_replay"]


def check_replay(recipe):
    """Replay gives every value again, draws nothing, and leaves in the trace what Pyro puts there."""
    fresh()
    model = program(recipe, tables(recipe, 1))
    with record_noise() as noise:
        first = get_trace(recipe, model)
    state = torch.get_rng_state()
    for _ in range(2):
        with replay_noise(noise=noise):
            assert_same(get_trace(recipe, model), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(get_trace(recipe, poutine.replay(model, trace=first)), first)


def check_commutes(recipe):
    """Another handler inside record_noise or replay_noise, and outside of it, makes the same trace."""
    fresh()
    model = program(recipe, tables(recipe, 1))
    with record_noise() as noise:
        first = sample_sites(get_trace(recipe, model))
    data = {name: site["value"] for name, site in first.items() if name in recipe.names() and not site["is_observed"]}
    data = dict(list(data.items())[:2])
    handlers: dict[str, Any] = {
        "trace": poutine.trace,
        "mask": lambda fn: poutine.mask(fn, mask=torch.tensor(False)),
        "scale": lambda fn: poutine.scale(fn, scale=3.0),
        "block": lambda fn: poutine.block(fn, hide_types=["param"]),
    }
    if not any(site["is_observed"] for site in first.values()):
        handlers["uncondition"] = poutine.uncondition
    if all(kind.batched for kind in recipe.kinds):
        handlers["plate"] = lambda fn: pyro.plate("particles", 3, dim=-4)(fn)

    def run(fn):
        pyro.set_rng_seed(3)
        return get_trace(recipe, fn)

    for name, other in handlers.items():
        inner, outer = record_noise(other(model)), record_noise(model)
        inside, outside = run(inner), run(other(outer))
        assert list(inner.noise) == list(outer.noise), name
        replayed = run(replay_noise(other(model), noise=inner.noise))
        for trace in (outside, replayed, run(other(replay_noise(model, noise=inner.noise)))):
            assert_same(inside, trace)
    # Outside of record_noise, condition changes what follows: the draws that it replaces have used up random numbers.
    inside = run(replay_noise(poutine.condition(model, data=data), noise=noise))
    assert_same(inside, run(poutine.condition(replay_noise(model, noise=noise), data=data)))
    assert all(equal(inside.nodes[name]["value"], value) for name, value in data.items())


def check_derivative(recipe):
    """Autograd at frozen noise equals finite differences, along a random direction in all parameters."""
    fresh()
    numbers = {name: [t.requires_grad_() for t in tensors] for name, tensors in tables(recipe, 1).items()}
    leaves = [t for tensors in numbers.values() for t in tensors]
    with record_noise() as noise:
        first = poutine.trace(program(recipe, numbers, "closure")).get_trace()
    weights = {name: torch.randn_like(first.nodes[name]["value"]) for name in noise if name in recipe.names()}
    directions = [torch.randn_like(t) for t in leaves]

    def functional(trace):
        parts = [(torch.tanh(trace.nodes[name]["value"] / 3) * weight).sum() for name, weight in weights.items()]
        return torch.stack([torch.zeros(()).double(), *parts]).sum()

    def moved(step):
        shifted = iter([t.detach() + step * d for t, d in zip(leaves, directions, strict=True)])
        new = {name: [next(shifted) for _ in tensors] for name, tensors in numbers.items()}
        with replay_noise(noise=noise), torch.no_grad():
            return float(functional(poutine.trace(program(recipe, new, "closure")).get_trace()))

    assume(functional(first).requires_grad)
    gradients = torch.autograd.grad(functional(first), leaves, allow_unused=True)
    products = [(g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None]
    numerical = (moved(1e-5) - moved(-1e-5)) / 2e-5
    scale = 1 + abs(numerical) + sum(float(g.abs().sum()) for g in gradients if g is not None)
    assert abs(float(sum(products)) - numerical) <= max(kind.atol for kind in recipe.kinds) * scale
