"""Hidden Markov models as single sites: Gaussian, linear and discrete ones share noise and have the terms of brute force."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LinearHMMReparam, StudentTReparam

from pyro_kd import LocalKD, freeze
from pyro_kd.errors import UnsupportedDivergenceError
from tests.support.loss_options import both, particles
from tests.support.losses import SurrogateKD
from tests.support.runs import only_run, runs_of, values_of

STEPS = 3
MATRIX, READOUT = torch.tensor([[0.9, 0.2], [-0.1, 0.8]]), torch.tensor([[1.0], [0.5]])


def gaussian_hmm(loc):
    def normal(size):
        return dist.MultivariateNormal(torch.zeros(size), torch.eye(size))

    initial = dist.MultivariateNormal(loc * torch.ones(2), torch.eye(2))
    return dist.GaussianHMM(initial, MATRIX, normal(2), READOUT, normal(1), duration=STEPS)


def linear_hmm(loc):
    def student_t(size, mean=0.0):
        return dist.StudentT(4.0, mean * torch.ones(size), 1.0).to_event(1)

    return dist.LinearHMM(student_t(2, loc), MATRIX, student_t(2), READOUT, student_t(1), duration=STEPS)


def observed_mean(loc):
    """The mean of the observations, given that of the state before the first transition."""
    state, means = loc * torch.ones(2), []
    for _ in range(STEPS):
        state = state @ MATRIX
        means.append(state @ READOUT)
    return torch.stack(means)


def hmm_program(hmm, loc):
    def model():
        with pyro.plate("rows", 5):
            h = pyro.sample("h", hmm(loc))
            pyro.sample("y", dist.Normal(h, 1.0).to_event(2))

    return model


def joint_gaussian(loc):
    """The same law of the observations, written out: y = sum of noises through powers of the matrix."""
    rows = []
    for t in range(1, STEPS + 1):
        blocks = [torch.linalg.matrix_power(MATRIX, t)]
        blocks += [torch.linalg.matrix_power(MATRIX, t - s) if s <= t else torch.zeros(2, 2) for s in range(1, STEPS + 1)]
        rows.append(torch.cat(blocks) @ READOUT)
    factor = torch.cat(rows, -1)  # (2 + 2 STEPS, STEPS): of the initial state and of each transition's noise
    return dist.MultivariateNormal(observed_mean(loc).squeeze(-1), factor.T @ factor + torch.eye(STEPS))


@both
@particles
def test_gaussian_hmm_as_a_latent(loss, options):
    student, teacher = hmm_program(gaussian_hmm, 1.0), hmm_program(gaussian_hmm, 0.0)
    objective = loss(["y"], max_plate_nesting=1, **options)
    shift = {SurrogateKD: observed_mean(1.0), LocalKD: torch.zeros(STEPS, 1)}[loss]
    for run in runs_of(objective, student, freeze(teacher)):
        h, y = run.pairs
        assert torch.allclose(h.student_value, h.value + shift, atol=1e-5)
        assert torch.allclose(y.q.mean - y.p.mean, shift, atol=1e-5)
    assert values_of(objective.terms(student, teacher))["y"] == pytest.approx(
        5 * float(shift.square().sum() / 2), rel=1e-4, abs=1e-5
    )


@both
@particles
def test_gaussian_hmm_as_a_target(loss, options):
    student, teacher = hmm_program(gaussian_hmm, 1.0), hmm_program(gaussian_hmm, 0.0)
    objective = loss(["h", "y"], max_plate_nesting=1, **options)
    pyro.set_rng_seed(2)
    terms = values_of(objective.terms(student, teacher))
    pyro.set_rng_seed(2)
    values = [run.pairs[0].value.squeeze(-1) for run in runs_of(objective, student, teacher)]
    by_hand = sum((joint_gaussian(0.0).log_prob(v) - joint_gaussian(1.0).log_prob(v)).sum() for v in values)
    assert terms == pytest.approx({"h": float(by_hand) / objective.num_particles, "y": 0.0}, rel=1e-3)


def discrete_hmm(gap):
    initial, transition = torch.tensor([0.7, 0.3]).log(), torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log()
    return dist.DiscreteHMM(initial, transition, dist.Normal(gap * torch.tensor([-1.0, 1.0]), 1.0), duration=STEPS)


def brute_force(gap, y):
    """The log density of one sequence, by the sum over the states: the first is before the first transition."""
    hmm, paths = discrete_hmm(gap), []
    for states in itertools.product(range(2), repeat=STEPS + 1):
        path = hmm.initial_logits.log_softmax(-1)[states[0]]
        for before, after, value in zip(states, states[1:], y, strict=False):
            path = path + hmm.transition_logits[before, after] + dist.Normal(gap * (2.0 * after - 1), 1.0).log_prob(value)
        paths.append(path)
    return torch.stack(paths).logsumexp(0)


@both
@pytest.mark.parametrize("targets", [["h", "y"], ["y"]], ids=["target", "latent"])
def test_discrete_hmm(loss, targets):
    """Its states are drawn inside one site; the density sums them out. A latent one shares states and noise."""

    def program(gap):
        def model():
            h = pyro.sample("h", discrete_hmm(gap))
            pyro.sample("y", dist.Normal(h, 1.0).to_event(1))

        return model

    pyro.set_rng_seed(1)
    terms = values_of(loss(targets).terms(program(2.0), program(1.0)))
    pyro.set_rng_seed(1)
    run = only_run(loss(targets), program(2.0), program(1.0))
    h = run.pairs[0]
    assert terms["h"] == pytest.approx(float(brute_force(1.0, h.value) - brute_force(2.0, h.value)), rel=1e-4)
    shift = (h.student_value - h.value).abs()
    expected = {("SurrogateKD", 1): 1.0}.get((loss.__name__, len(targets)), 0.0)
    assert torch.allclose(shift, torch.tensor(expected), atol=1e-5)  # the emission's mean moves from +-1 to +-2
    assert terms["y"] == pytest.approx(STEPS * expected / 2, abs=1e-5)


@both
def test_linear_hmm_shares_noise(loss):
    """It has no density: a latent of weight 0, whose noise is shared all the same, and whose value is not given."""
    objective = loss(["y"], latent_weight=0.0)
    value = objective.loss(hmm_program(linear_hmm, 1.0), hmm_program(linear_hmm, 0.0))
    assert value == pytest.approx(5 * float(observed_mean(1.0).square().sum() / 2), rel=1e-4)


@pytest.mark.parametrize("targets", [["h", "y"], ["y"]], ids=["target", "latent"])
def test_linear_hmm_has_no_divergence(targets):
    with pytest.raises(UnsupportedDivergenceError, match="site 'h'"):
        SurrogateKD(targets).loss(hmm_program(linear_hmm, 1.0), hmm_program(linear_hmm, 0.0))


@both
def test_linear_hmm_reparameterised_as_a_gaussian_one(loss):
    """Auxiliary gammas, the same in both programs, and given them a GaussianHMM, which has a density."""

    def reparameterised(loc):
        config = {"h": LinearHMMReparam(StudentTReparam(), StudentTReparam(), StudentTReparam())}
        return poutine.reparam(hmm_program(linear_hmm, loc), config=config)

    student, teacher = reparameterised(1.0), reparameterised(0.0)
    shift = {SurrogateKD: observed_mean(1.0), LocalKD: torch.zeros(STEPS, 1)}[loss]
    run = only_run(loss(["y"]), student, teacher)
    *gammas, h, y = run.pairs
    assert [pair.name for pair in gammas] == ["h_init_gamma", "h_trans_gamma", "h_obs_gamma"]
    assert all(torch.equal(pair.value, pair.student_value) for pair in gammas)
    assert isinstance(h.p, dist.GaussianHMM)
    assert torch.allclose(y.q.mean - y.p.mean, shift, atol=1e-5)
    pyro.set_rng_seed(3)
    terms = values_of(loss(["y"]).terms(student, teacher))
    pyro.set_rng_seed(3)
    h = only_run(loss(["y"]), student, teacher).pairs[-2]
    by_hand = float((h.p.log_prob(h.value) - h.q.log_prob(h.value)).sum())
    zeros = dict.fromkeys(["h_init_gamma", "h_trans_gamma", "h_obs_gamma"], 0.0)
    assert terms == pytest.approx(zeros | {"h": by_hand, "y": 5 * float(shift.square().sum() / 2)}, rel=1e-4, abs=1e-5)
