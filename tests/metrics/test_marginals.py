"""Exact likelihoods, against brute force. tests/losses/test_bounds.py compares them with Pyro's own enumeration."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from models.helmholtz import HelmholtzMachine
from pyro_kd.errors import PlateMismatchError, UnknownTargetError, UnsupportedDivergenceError
from pyro_kd.metrics import (
    Estimate,
    marginal_kl,
    marginal_log_prob,
)


def test_the_likelihood_of_the_helmholtz_machine_agrees_with_brute_force():
    """256 states one after the other."""
    torch.manual_seed(0)
    machine = HelmholtzMachine(8)
    y1, y2 = torch.randn(2, 5)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8).reshape(256, 4, 2)
    log_joint = torch.stack([_log_joint(machine, state, y1, y2) for state in states])
    expected = log_joint.logsumexp(0)
    actual = marginal_log_prob(machine.model, {"y1": y1, "y2": y2}, 5)
    assert actual.shape == (5,)
    assert torch.allclose(actual, expected, atol=1e-5)


def _log_joint(machine, state, y1, y2):
    data = {f"z{4 - i}": state[i].expand(5, 2) for i in range(4)} | {"y1": y1, "y2": y2}
    trace = pyro.poutine.trace(pyro.condition(machine.model, data=data)).get_trace(5)
    trace.compute_log_prob()
    return sum(
        site["log_prob"]
        for site in trace.nodes.values()
        if site["type"] == "sample" and "log_prob" in site and site["log_prob"].dim()
    )


def test_likelihood_integrates_to_one():
    torch.manual_seed(1)
    machine = HelmholtzMachine(3)
    axis = torch.linspace(-6, 6, 120)
    grid = torch.cartesian_prod(axis, axis)
    log_prob = marginal_log_prob(machine.model, {"y1": grid[:, 0], "y2": grid[:, 1]}, len(grid))
    assert float(log_prob.exp().sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-3)


def test_a_global_latent_may_have_a_plate_of_targets():
    """log sum_z p(z) prod_n p(y_n | z): the rows are summed before the latent is summed out."""

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.25))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * z))

    y = torch.tensor([1.0, 1.0, 0.0])
    expected = math.log(0.75 * 0.1**2 * 0.9 + 0.25 * 0.9**2 * 0.1)
    assert float(marginal_log_prob(program, {"y": y})) == pytest.approx(expected)


def test_a_program_may_lack_latents_or_observe_its_targets():
    def program(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=data)

    y = torch.tensor([0.0, 1.0])
    assert torch.allclose(marginal_log_prob(program, {"y": y}, torch.zeros(2)), dist.Normal(0.0, 1.0).log_prob(y))


def test_marginal_kl_of_a_mixture_is_exact():
    def program(weight, low):
        def model(n):
            with pyro.plate("rows", n):
                z = pyro.sample("z", dist.Bernoulli(weight))
                pyro.sample("y", dist.Normal(torch.where(z > 0, 2.0, low), 1.0))

        return model

    teacher, student = program(0.5, -2.0), program(0.3, -1.0)
    axis = torch.linspace(-12, 12, 20_001)
    log_p, log_q = (marginal_log_prob(model, {"y": axis}, len(axis)) for model in (teacher, student))
    truth = float((log_p.exp() * (log_p - log_q)).sum() * (axis[1] - axis[0]))
    estimate = marginal_kl(student, teacher, ["y"], 50_000)
    assert abs(estimate.mean - truth) <= 5 * estimate.standard_error
    assert estimate.num_samples == 50_000
    assert marginal_kl(teacher, teacher, ["y"], 100) == Estimate(0.0, 0.0, 100)


def test_programs_that_cannot_be_enumerated_are_refused():
    def continuous():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedDivergenceError, match="latent site 'z' is Normal.*cannot be enumerated"):
        marginal_log_prob(continuous, {"y": torch.tensor(0.0)})
    with pytest.raises(UnknownTargetError, match="'w' is not a sample site.*'z', 'y'"):
        marginal_log_prob(continuous, {"w": torch.tensor(0.0)})


def test_latents_inside_and_outside_of_a_plate():
    """log sum_z p(z) prod_n sum_w p(w | z) prod_t p(y_nt | w, z), against all joint states."""
    p_w, p_y = torch.tensor([0.3, 0.8]), torch.tensor([[0.2, 0.6], [0.9, 0.5]])

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        with pyro.plate("rows", 3, dim=-2):
            w = pyro.sample("w", dist.Bernoulli(p_w[z.long()]))
            with pyro.plate("times", 2, dim=-1):
                pyro.sample("y", dist.Bernoulli(p_y[z.long(), w.long()]))

    y = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    total = 0.0
    for z, *w in itertools.product([0, 1], repeat=4):
        prob = torch.tensor([0.6, 0.4])[z]
        for n in range(3):
            prob = prob * torch.stack([1 - p_w[z], p_w[z]])[w[n]]
            prob = prob * dist.Bernoulli(p_y[z, w[n]]).log_prob(y[n]).sum().exp()
        total += float(prob)
    assert float(marginal_log_prob(program, {"y": y})) == pytest.approx(math.log(total), rel=1e-5)


def test_latents_that_cannot_be_summed_out_plate_by_plate_are_refused():
    def crossed():
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with rows, columns:
            pyro.sample("y", dist.Bernoulli(0.2 + 0.3 * a + 0.3 * b))

    with pytest.raises(
        PlateMismatchError, match="'a' lies in the plates 'rows' and latent 'b' in 'columns'.*TraceEnum_ELBO"
    ):
        marginal_log_prob(crossed, {"y": torch.zeros(2, 3)})

    def pooled(event):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        law = dist.Bernoulli(0.1 + 0.8 * z.mean(-1, keepdim=True))
        pyro.sample("y", law.to_event(1) if event else law)

    with pytest.raises(
        PlateMismatchError, match="latent 'z' lies in the plates 'rows', and a site outside of them depends on"
    ):
        marginal_log_prob(pooled, {"y": torch.zeros(1)}, event=False)
    with pytest.raises(
        PlateMismatchError, match="'y' lies outside of a plate, and its density has a dim.*of latents in data"
    ):
        marginal_log_prob(pooled, {"y": torch.zeros(1)}, event=True)


def test_rows_that_depend_on_each_other_are_refused():
    """The enumerated states have one row, so that their mean over rows is another one."""

    def program():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * z.mean(-1, keepdim=True)))

    pyro.set_rng_seed(0)
    with pytest.raises(PlateMismatchError, match="the density of site 'y' in a row depends on the latents of other rows"):
        marginal_log_prob(program, {"y": torch.ones(5)})


def test_deterministic_sites_factors_and_observed_inputs_count_correctly():
    def program(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        z = pyro.sample("z", dist.Bernoulli(0.25))
        pyro.deterministic("double", 2 * z)
        pyro.factor("potential", torch.log(1 + z))
        pyro.sample("y", dist.Normal(z * x, 1.0))

    x, y = torch.tensor(0.7), torch.tensor(0.2)
    normal = dist.Normal(0.0, 1.0)
    expected = normal.log_prob(x) + torch.log(
        0.75 * normal.log_prob(y).exp() + 0.25 * 2 * dist.Normal(x, 1.0).log_prob(y).exp()
    )
    assert torch.allclose(marginal_log_prob(program, {"y": y}, x), expected)


def test_masked_targets_count_for_nothing():
    def program():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            with pyro.poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * z))

    expected = torch.tensor([math.log(0.3 * 0.7 + 0.7 * 0.2), 0.0])
    assert torch.allclose(marginal_log_prob(program, {"y": torch.ones(2)}), expected)


@pytest.mark.parametrize("change", ["subsample", "scale", "mask"])
def test_likelihood_of_subsampled_scaled_or_masked_latents_is_refused(change):
    def program():
        size = 4 if change == "subsample" else None
        with pyro.plate("rows", 8 if size else 4, subsample_size=size):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * z))

    handlers = {
        "subsample": lambda fn: fn,
        "scale": lambda fn: pyro.poutine.scale(fn, scale=2.0),
        "mask": lambda fn: pyro.poutine.mask(fn, mask=torch.tensor([True, False, True, True])),
    }
    with pytest.raises(PlateMismatchError, match="'z' is subsampled, scaled or masked"):
        marginal_log_prob(handlers[change](program), {"y": torch.ones(4)})


def test_marginal_kl_keeps_observed_inputs():
    """y is drawn given the x that both programs observe, and not given another x of the teacher's."""

    def program(weight):
        def model(x):
            with pyro.plate("rows", len(x)):
                x = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
                z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.5)))
                pyro.sample("y", dist.Normal(weight * x + 0 * z, 1.0))

        return model

    estimate = marginal_kl(program(1.0), program(2.0), ["y"], torch.full((20_000,), 3.0))
    assert abs(estimate.mean - 3.0**2 / 2) <= 5 * estimate.standard_error


def test_marginal_kl_names_an_unknown_target():
    with pytest.raises(UnknownTargetError, match="'w' is not a sample site"):
        marginal_kl(lambda: None, lambda: None, ["w"])


def test_batch_dimensions_need_plates():
    """Without a plate they would be taken for enumerated states, and the likelihood be wrong without a word."""

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(torch.tensor([0.0, 5.0]) + z, 1.0))

    with pytest.raises(PlateMismatchError, match=r"'y' has batch shape \(2,\).*pyro.plate.*to_event"):
        marginal_log_prob(program, {"y": torch.zeros(2)})


def test_inputs_do_not_change_the_marginal_kl():
    def program(loc):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("u", dist.Normal(loc, 1.0), obs=x)
                pyro.sample("y", dist.Normal(x, 1.0))

        return model

    found = marginal_kl(program(2.0), program(0.0), "y", torch.zeros(200))
    assert found.mean == 0.0
