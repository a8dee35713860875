"""Laws of the losses, each a check on one random program or on a pair of them."""

import math
from contextlib import contextmanager
from typing import Any

import pyro
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import SVI
from pyro.infer.reparam import LocScaleReparam, TransformReparam

from pyro_kd import LocalKD, freeze, record_noise, replay_noise
from pyro_kd.divergences import jensen_shannon, kl, reverse_kl
from pyro_kd.errors import NoiseMismatchError, NonFiniteLossError
from pyro_kd.sites.weighting import compared_elements
from tests.support.losses import SurrogateKD
from tests.support.program_laws.traces import equal, fresh, sample_sites
from tests.support.random_programs import KINDS, program, tables

__all__ = [
    "BOTH",
    "STYLES",
    "check_closed_forms",
    "check_equal_programs",
    "check_gradients",
    "check_loss_derivative",
    "check_particles",
    "check_reparam",
    "check_svi",
    "check_terms",
    "require_something_to_learn",
    "shared_noise",
]

BOTH = {"surrogate": lambda *args, **options: SurrogateKD(*args, latent_weight=1.0, **options), "local": LocalKD}


@contextmanager
def shared_noise(*recipes):
    """Where the student takes another family at a site than the teacher, it may need noise of another shape, and says so."""
    try:
        yield
    except NoiseMismatchError:
        families = [{(s.name, kind) for s in recipe.sites for kind in (s.kind, s.other) if kind} for recipe in recipes]
        if len(set.union(*families)) == len(recipes[0].sites):
            raise
        assume(False)


def require_something_to_learn(recipe):
    """A program whose sites are all masked by False, or empty, has a loss without parameters, which is an error."""
    sites = [site for site in recipe.sites if site.kind in KINDS and site.role != "input"]
    assume(any(site.mask != "none" and 0 not in site.event for site in sites))


def check_equal_programs(recipe):
    """Where the student equals the teacher, each term is exactly 0; in closed form, up to rounding for some families."""
    numbers = tables(recipe, 1)
    rounding = recipe.spread**2 * (1e-4 if recipe.single else 1e-12) if any(kind.rounds for kind in recipe.kinds) else 0.0
    for make in BOTH.values():
        for divergence in (kl, reverse_kl, jensen_shannon):
            fresh()
            loss = make(recipe.targets, divergence=divergence, latent_divergence=divergence)
            teacher, student = program(recipe, numbers, "closure"), program(recipe, numbers, "param", rename="s_")
            with torch.no_grad():
                loss.site_map = {f"s_{name}": name for name in sample_sites(poutine.trace(teacher).get_trace())}
            terms = loss.terms(student, teacher)
            assert terms
            for term in terms.values():
                assert abs(float(term.value.detach())) <= (rounding if term.analytic else 0.0), term


STYLES = st.sampled_from(["param", "closure", "module", "bare"])


def check_gradients(recipe, other, teachers, students):
    """The teacher's parameters never get a gradient; the student's are finite, and equal for both ways to ask for them."""
    require_something_to_learn(recipe)
    for make in BOTH.values():
        fresh()
        teacher, student = (
            program(
                recipe, {name: [t.requires_grad_() for t in ts] for name, ts in tables(recipe, i).items()}, style, prefix
            )
            for i, style, prefix in ((1, teachers, "t_"), (2, students, "s_"))
        )
        for model in (teacher, student):
            poutine.trace(model).get_trace()
        theirs = teacher.leaves()
        loss = make(recipe.targets)
        pyro.set_rng_seed(1)
        value = loss.loss_and_grads(student, teacher)
        mine = student.leaves()  # now, since another branch has others
        assert math.isfinite(value)
        assert all(t.grad is None for t in theirs)
        assert all(t.requires_grad for t in theirs)
        grads = [None if t.grad is None else t.grad.clone() for t in mine]
        assert any(g is not None for g in grads)
        assert all(g.isfinite().all() for g in grads if g is not None)
        pyro.set_rng_seed(1)
        again = torch.autograd.grad(loss(student, teacher)(), mine, allow_unused=True)
        for g, h in zip(grads, again, strict=True):
            assert (g is None and h is None) or torch.allclose(g, h, rtol=1e-9, atol=1e-9)


def check_loss_derivative(recipe, other):
    """The gradient of the loss equals finite differences of the loss at fixed random numbers."""
    require_something_to_learn(recipe)
    numbers = {name: [t.requires_grad_() for t in ts] for name, ts in tables(other, 2).items()}
    leaves = [t for ts in numbers.values() for t in ts]
    for make in BOTH.values():
        fresh()
        teacher, loss = program(recipe, tables(recipe, 1), "closure"), make(recipe.targets)
        directions = [torch.randn_like(t) for t in leaves]

        def at(step):
            shifted = iter([(t.detach() + step * d).requires_grad_() for t, d in zip(leaves, directions, strict=True)])
            moved = {name: [next(shifted) for _ in ts] for name, ts in numbers.items()}
            student = program(other, moved, "closure")
            pyro.set_rng_seed(4)
            return loss.differentiable_loss(student, teacher), [t for ts in moved.values() for t in ts]

        value, moved = at(0.0)
        gradients = torch.autograd.grad(value, moved, allow_unused=True)
        exact = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
        numerical = float((at(1e-6)[0] - at(-1e-6)[0]).detach()) / 2e-6
        scale = (
            1 + abs(numerical) + abs(float(value.detach())) + sum(float(g.abs().sum()) for g in gradients if g is not None)
        )
        assert abs(exact - numerical) <= max(1e-5, *(kind.atol for kind in other.kinds)) * scale


def check_svi(recipe, other):
    """A step of SVI moves the student along the gradient of the loss, and leaves a frozen teacher as it was."""
    require_something_to_learn(recipe)
    precision = 1e-5 if recipe.single else 1e-9
    for name, make in BOTH.items():
        fresh()
        original = program(recipe, tables(recipe, 1), "param")
        poutine.trace(original).get_trace()
        teacher = freeze(original)
        pyro.clear_param_store()
        student = program(other, tables(other, 2), "module" if name == "local" else "param")
        pyro.set_rng_seed(5)
        before = sample_sites(poutine.trace(teacher).get_trace())
        loss, rate = make(recipe.targets), 1e-4
        svi = SVI(student, teacher, pyro.optim.SGD({"lr": rate}), loss=loss)
        assert math.isfinite(svi.step())
        params = student.leaves()
        for param in params:
            param.grad = None
        pyro.set_rng_seed(6)
        value = loss.loss_and_grads(student, teacher)
        expected = [p.detach().clone() if p.grad is None else (p - rate * p.grad).detach() for p in params]
        for param in params:
            param.grad = None
        pyro.set_rng_seed(6)
        assert svi.step() == pytest.approx(value, rel=precision, abs=precision)
        for param, value in zip(params, expected, strict=True):
            assert torch.allclose(param, value, rtol=precision, atol=1e-3 * precision)
        pyro.set_rng_seed(5)
        after = sample_sites(poutine.trace(teacher).get_trace())
        assert all(equal(site["value"], after[name]["value"]) for name, site in before.items())


def check_particles(recipe, other):
    """With particles, in a loop or in a plate, the loss is finite and the weighted sum of its terms; a mean, not a sum."""
    for make in BOTH.values():
        for vectorize in (False, True):
            fresh()
            teacher, student = program(recipe, tables(recipe, 1), "closure"), program(other, tables(other, 2), "param")
            loss = make(recipe.targets, num_particles=3, vectorize_particles=vectorize, max_plate_nesting=3)
            pyro.set_rng_seed(7)
            with torch.no_grad():
                terms = loss.terms(student, teacher)
            total = sum(term.weight * float(term.value) for term in terms.values())
            assert math.isfinite(total)
            assert list(terms) == list(make(recipe.targets).terms(student, teacher))
            pyro.set_rng_seed(7)
            precision = 1e-4 if recipe.single else 1e-9
            assert loss.loss(student, teacher) == pytest.approx(total, rel=precision, abs=precision)


def _where(condition, first, second):
    return torch.where(torch.as_tensor(condition), first, second)


def check_terms(recipe, other):
    """With d = log p - log q, each term is the difference of the two traces' log densities, as Pyro scales and masks them.

    Where a draw lies at the border of a support, Pyro's own density may be infinite there: then the loss says so.
    """
    for make in BOTH.values():
        fresh()
        teacher, student = program(recipe, tables(recipe, 1), "closure"), program(other, tables(other, 2), "closure")
        teacher, student = poutine.trace(teacher), poutine.trace(student)

        def divergence(p, q, value):
            return p.log_prob(value) - q.log_prob(value)

        loss = make(recipe.targets, divergence=divergence, latent_divergence=divergence)
        with torch.no_grad():
            try:
                terms = loss.terms(student, teacher)
            except NonFiniteLossError:
                terms = None
            teacher.trace.compute_log_prob()
        drawn = sample_sites(teacher.trace)
        found = student.trace
        if make is LocalKD:  # on the teacher's own values where their law counts, whatever the loss has done there
            own = dict(found.nodes)
            given = {
                name: _where(compared_elements(site), site["value"], own[name]["value"]) for name, site in drawn.items()
            }
            found = poutine.trace(poutine.condition(student, data=given)).get_trace()
        expected = {}
        for name in terms or drawn:
            site = found.nodes[name]
            log_q = scale_and_mask(site["fn"].log_prob(drawn[name]["value"]), site["scale"], site["mask"]).sum()
            expected[name] = float(drawn[name]["log_prob_sum"] - log_q)
        if terms is None:
            assert not all(map(math.isfinite, expected.values()))
            continue
        for name, term in terms.items():
            assert float(term.value) == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name


def check_closed_forms(recipe, other):
    """Where a term is analytic, it is the mean of the Monte Carlo integrand in each row of the batch."""
    fresh()
    teacher, student = program(recipe, tables(recipe, 1), "closure"), program(other, tables(other, 2), "closure")
    with torch.no_grad():
        with record_noise() as noise:
            first = sample_sites(poutine.trace(teacher).get_trace())
        given = {name: first[name]["value"] for name in recipe.names() if not first[name]["is_observed"]}
        second = sample_sites(poutine.trace(replay_noise(poutine.condition(student, data=given), noise=noise)).get_trace())
        for name, value in given.items():
            p, q = first[name]["fn"], second[name]["fn"]
            with torch.enable_grad():
                found = kl(p, q, value).detach() if kl.is_exact(p, q) else None
            if found is None:
                continue
            for count in (4_000, 100_000):  # the error of few samples is itself uncertain
                draws = p.sample((count,))
                ratio = (p.log_prob(draws) - q.log_prob(draws)).reshape(count, *p.batch_shape)
                assume(ratio.isfinite().all())  # the family's own sampler may round to a bound
                error = ratio.std(0) / count**0.5
                holds = bool(((ratio.mean(0) - found).abs() <= 6 * error + 1e-6 * (1 + found.abs())).all())
                if holds:
                    break
            assert holds, f"site {name!r}: {found} in closed form, {ratio.mean(0)} with error {error} by Monte Carlo"


def check_reparam(recipe):
    """poutine.reparam moves the noise of a latent to another site, and changes no target's term of the surrogate loss."""
    statements = {site.name: site for site in recipe.sites}
    config: dict[str, Any] = {}
    for name in recipe.names("latent"):
        site = statements[name.split("_")[0]]
        kind = (
            None if site.other or site.mask in ("inside", "inner", "half") else site.kind
        )  # Pyro's own do not see through these
        if kind in ("Affine", "LogNormal"):
            config[name] = TransformReparam()
        elif kind in ("Normal", "Laplace", "Logistic"):
            config[name] = LocScaleReparam(0.0)
    assume(config)
    losses = []
    for handler in (lambda fn: fn, poutine.reparam(config=config)):
        fresh()
        teacher, student = (handler(program(recipe, tables(recipe, i), "closure")) for i in (1, 2))
        loss = SurrogateKD(recipe.targets, latent_weight=0.0)
        with torch.no_grad():
            losses.append({name: float(t.value) for name, t in loss.terms(student, teacher).items() if t.kind == "target"})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-6)
