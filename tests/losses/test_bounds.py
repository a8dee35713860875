"""On random discrete models with one to three layers, both losses bound the exact KL from above."""

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_kd import LocalKD
from pyro_kd.metrics import marginal_log_prob
from tests.support.losses import SurrogateKD
from tests.support.random_chains import each_case, estimate, exact_kl, random_chain


@each_case
@pytest.mark.parametrize("loss", [SurrogateKD(["y"], latent_weight=0.0), LocalKD(["y"])], ids=["surrogate", "local"])
def test_both_losses_bound_the_exact_kl(loss, layers, seed, families):
    teacher, student = random_chain(layers, seed, families), random_chain(layers, seed + 100, families)
    mean, error = estimate(loss, student=student, teacher=teacher)
    assert mean + 5 * error >= exact_kl(student=student, teacher=teacher)
    assert error < 0.05 * mean  # the check has the power to fail


@each_case
def test_both_bounds_are_zero_where_student_equals_teacher(layers, seed, families):
    program = random_chain(layers, seed, families)
    assert exact_kl(student=program, teacher=program) == 0.0
    for loss in (SurrogateKD(["y"], latent_weight=0.0), SurrogateKD(["y"], latent_weight=1.0), LocalKD(["y"])):
        assert loss.loss(program, program) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_surrogate_by_exact_enumeration_of_the_noise(seed):
    """One Bernoulli layer: uniform noise meets the two thresholds in at most three ways, so the bound is an exact sum."""
    teacher, student = random_chain(1, seed, ("bernoulli",)), random_chain(1, seed + 50, ("bernoulli",))

    def tables(program):
        trace = pyro.poutine.trace(program).get_trace(1)
        log_prob = torch.stack([torch.stack([_log_y(program, z, y) for y in range(3)]) for z in range(2)])
        return float(trace.nodes["z0"]["fn"].probs[0]), log_prob

    (p, log_p), (q, log_q) = tables(teacher), tables(student)
    weights = {(1, 1): min(p, q), (0, 0): 1 - max(p, q), (1, 0): max(p - q, 0.0), (0, 1): max(q - p, 0.0)}
    exact = sum(w * float((log_p[a].exp() * (log_p[a] - log_q[b])).sum()) for (a, b), w in weights.items())
    mean, error = estimate(SurrogateKD(["y"], latent_weight=0.0), student=student, teacher=teacher)
    assert abs(mean - exact) <= 5 * error
    assert exact >= exact_kl(student=student, teacher=teacher)


def _log_y(program, z, y):
    data = {"z0": torch.tensor([float(z)], dtype=torch.float64), "y": torch.tensor([y])}
    trace = pyro.poutine.trace(pyro.condition(program, data=data)).get_trace(1)
    return trace.nodes["y"]["fn"].log_prob(data["y"])[0]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_exact_likelihood_is_pyros(layers):
    """Against Pyro's own enumeration, which covers scalar latents."""
    program = random_chain(layers, 9, ("categorical",) * layers)
    y = torch.tensor([0, 1, 2, 1])
    conditioned = pyro.condition(program, data={"y": y})
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected = -elbo.loss(config_enumerate(conditioned), lambda n: None, 4)
    assert float(marginal_log_prob(program, {"y": y}, 4).sum()) == pytest.approx(expected)
