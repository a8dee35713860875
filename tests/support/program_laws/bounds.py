"""Laws of bounds and likelihoods, each a check on a random discrete program against the sum over all of its states."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume
from pyro import poutine

from pyro_kd import LocalKD, MarginalKD, metrics
from pyro_kd.errors import PlateMismatchError
from tests.support.losses import SurrogateKD
from tests.support.program_laws.traces import fresh, sample_sites
from tests.support.random_programs import KINDS, Recipe, program, tables

__all__ = ["Exact", "check_bounds", "check_likelihood", "check_marginal", "estimate"]


@dataclass
class Exact:
    """All joint states of a discrete program, with their log probabilities under several tables of numbers."""

    recipe: Recipe
    numbers: list[Any]
    log_joint: list[torch.Tensor] = field(default_factory=list)
    log_target: list[torch.Tensor] = field(default_factory=list)  # of each target value, in one order for all programs
    values: dict[str, torch.Tensor] = field(default_factory=dict)  # by site, states x batch_shape x event_shape

    def __post_init__(self):
        statements = {s.name: s for s in self.recipe.sites}
        sites = sample_sites(poutine.trace(program(self.recipe, self.numbers[0], "closure")).get_trace())
        shapes, counts = {}, {}
        for name in self.recipe.names():
            fn, kind = sites[name]["fn"], KINDS[statements[name.split("_")[0]].kind]
            event = fn.event_shape[: len(fn.event_shape) - kind.states.dim() + 1]
            shapes[name] = (kind.states, (*(1,) * (3 - len(fn.batch_shape)), *fn.batch_shape), event)
            counts[name] = [len(kind.states)] * (fn.batch_shape + event).numel()
        radices = [radix for name in counts for radix in counts[name]]
        assume(math.prod(radices) <= 6000)
        grid = torch.tensor(list(itertools.product(*map(range, radices))), dtype=torch.int64).reshape(
            math.prod(radices), len(radices)
        )
        code, start = torch.zeros(len(grid), dtype=torch.int64), 0
        for name, (states, batch, event) in shapes.items():
            columns = grid[:, start : start + len(counts[name])]
            start += len(counts[name])
            self.values[name] = states[columns].reshape(len(grid), *batch, *event, *states.shape[1:])
            if name in self.recipe.names("target"):
                for i, radix in enumerate(counts[name]):
                    code = code * radix + columns[:, i]
        for numbers in self.numbers:
            model = poutine.condition(program(self.recipe, numbers, "closure"), data=self.values)
            trace = poutine.trace(model).get_trace()
            trace.compute_log_prob()
            log_joint = torch.zeros(len(grid), dtype=torch.float64)
            for name in self.values:
                log_prob = trace.nodes[name]["log_prob"]
                log_joint = log_joint + log_prob.expand(len(grid), *log_prob.shape[-3:]).flatten(1).sum(1)
            assert float(log_joint.detach().logsumexp(0).abs()) < 1e-9, (
                "the program is no probability law: the enumeration is wrong"
            )
            self.log_joint.append(log_joint)
            total = torch.zeros(int(code.max()) + 1, dtype=torch.float64).index_add(0, code, log_joint.exp())
            self.log_target.append(total.log())

    def kl(self, log_probs):
        p, q = log_probs
        return float((p.exp() * (p - q)).sum())

    def at(self, data):
        """The log probability of some target values under each table of numbers."""
        same = torch.ones(len(self.log_joint[0]), dtype=torch.bool)
        for name, value in data.items():
            same &= (self.values[name] == value).flatten(1).all(1)
        return [log_joint[same].logsumexp(0) for log_joint in self.log_joint]


def estimate(loss, student, teacher, blocks):
    return metrics.Estimate.of(torch.tensor([loss.loss(student, teacher) for _ in range(blocks)], dtype=torch.float64))


def check_bounds(recipe):
    """By enumeration: the local loss has the KL of the joint laws for its mean, and the surrogate's is at least the targets'."""
    fresh()
    numbers = [tables(recipe, 1), tables(recipe, 2)]
    exact = Exact(recipe, numbers)
    joint, targets = exact.kl(exact.log_joint), exact.kl(exact.log_target)
    assert joint >= targets - 1e-9
    teacher, student = (program(recipe, n, "closure") for n in numbers)
    many = {"num_particles": 40, "vectorize_particles": True, "max_plate_nesting": 3}
    local, few = LocalKD(recipe.targets, **many), LocalKD(recipe.targets, num_particles=4)
    surrogate = SurrogateKD(recipe.targets, latent_weight=0.0, **many)

    def holds(blocks):
        tolerance = 1e-9 * (1 + joint)
        for loss in (local, few):
            found = estimate(loss, student, teacher, blocks)
            if abs(found.mean - joint) > 5 * found.standard_error + tolerance:
                return f"local loss {found}, and the KL of the joint laws is {joint}"
        found = estimate(surrogate, student, teacher, blocks)
        if found.mean < targets - 5 * found.standard_error - tolerance:
            return f"surrogate loss {found}, and the KL of the targets is {targets}"
        return None

    # The error of few blocks is itself uncertain: what looks like a failure is tried again with many.
    complaint = holds(8)
    complaint = complaint and holds(200)
    assert complaint is None, complaint


def check_likelihood(recipe):
    """marginal_log_prob agrees with the sum over all joint states, wherever it takes the program."""
    fresh()
    numbers = tables(recipe, 1)
    exact = Exact(recipe, [numbers])
    model = program(recipe, numbers, "closure")
    i = int(torch.randint(len(exact.log_joint[0]), ()))
    data = {name: exact.values[name][i] for name in recipe.names("target")}
    (expected,) = exact.at(data)
    plain = sample_sites(poutine.trace(model).get_trace())
    data = {name: value.reshape(plain[name]["fn"].shape()) for name, value in data.items()}
    try:
        found = metrics.marginal_log_prob(model, data)
    except PlateMismatchError:
        assume(False)
    assert float(found.sum()) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


def check_marginal(recipe):
    """MarginalKD and its gradient agree with the sum over all joint states, on drawn targets and over all of them."""
    fresh()
    numbers = [tables(recipe, 1), tables(recipe, 2)]
    leaves = [tensor.requires_grad_() for tensors in numbers[1].values() for tensor in tensors]
    exact = Exact(recipe, numbers)
    teacher, student = (program(recipe, n, "closure") for n in numbers)
    drawn = MarginalKD(recipe.targets)
    try:
        (particle,) = drawn.particles(student, teacher)
    except PlateMismatchError:
        assume(False)
    shapes = {name: exact.values[name].shape[1:] for name in recipe.names("target")}
    p, q = exact.at({pair.name: pair.value.reshape(shapes[pair.name]) for pair in particle.run.pairs})
    check_equal(drawn.combine([particle]), p - q, leaves)
    try:
        found = MarginalKD(recipe.targets, enumerate_targets=True).differentiable_loss(student, teacher)
    except PlateMismatchError:
        return
    p, q = exact.log_target
    check_equal(found, torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(), leaves)


def check_equal(found, expected, leaves):
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-9)
    if not expected.requires_grad:
        return
    gradients = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
    others = torch.autograd.grad(found, leaves, allow_unused=True, materialize_grads=True)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9), (one, other)
