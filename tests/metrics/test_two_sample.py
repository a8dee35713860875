"""Metrics against closed forms, brute force and trusted libraries."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from models.helmholtz import HelmholtzMachine
from pyro_kd.errors import PlateMismatchError, UnknownTargetError, UnsupportedDivergenceError
from pyro_kd.metrics import (
    Estimate,
    gaussian,
    laplacian,
    marginal_kl,
    marginal_log_prob,
    mmd,
    nearest_neighbour_accuracy,
    rational_quadratic,
)

# Exact likelihoods. Against Pyro's own enumeration: tests/losses/test_bounds.py.


def test_likelihood_of_the_helmholtz_machine_by_brute_force():
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


def test_global_latent_with_a_plate_of_targets():
    """log sum_z p(z) prod_n p(y_n | z): the rows are summed before the latent is summed out."""

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.25))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Bernoulli(0.1 + 0.8 * z))

    y = torch.tensor([1.0, 1.0, 0.0])
    expected = math.log(0.75 * 0.1**2 * 0.9 + 0.25 * 0.9**2 * 0.1)
    assert float(marginal_log_prob(program, {"y": y})) == pytest.approx(expected)


def test_program_without_latents_and_observed_targets():
    def program(data):
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=data)

    y = torch.tensor([0.0, 1.0])
    assert torch.allclose(marginal_log_prob(program, {"y": y}, torch.zeros(2)), dist.Normal(0.0, 1.0).log_prob(y))


def test_marginal_kl_of_a_mixture():
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


def test_enumeration_errors():
    def continuous():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedDivergenceError, match="latent site 'z' is Normal.*cannot be enumerated"):
        marginal_log_prob(continuous, {"y": torch.tensor(0.0)})
    with pytest.raises(UnknownTargetError, match="'w' is no sample site.*'z', 'y'"):
        marginal_log_prob(continuous, {"w": torch.tensor(0.0)})

    def mixed():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("rows", 3):
            w = pyro.sample("w", dist.Bernoulli(0.5 * z))
            pyro.sample("y", dist.Bernoulli(0.5 * w))

    with pytest.raises(PlateMismatchError, match="'w' lies in the plates 'rows'.*TraceEnum_ELBO"):
        marginal_log_prob(mixed, {"y": torch.zeros(3)})


def test_deterministic_factor_and_observed_inputs():
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
    with pytest.raises(UnknownTargetError, match="'w' is no sample site"):
        marginal_kl(lambda: None, lambda: None, ["w"])


# Two samples.

KERNELS = pytest.mark.parametrize("kernel", [gaussian, laplacian, rational_quadratic], ids=lambda kernel: kernel.__name__)


def _gaussian_closed_form(shift, h):
    """E k(x, y) of a Gaussian kernel between N(0, 1) and N(shift, 1) is itself a Gaussian density."""

    def kernel_mean(mean):
        return h / math.sqrt(h**2 + 2) * math.exp(-(mean**2) / (2 * (h**2 + 2)))

    return 2 * kernel_mean(0.0) - 2 * kernel_mean(shift)


def test_mmd_against_the_closed_form_for_gaussians():
    estimates = torch.tensor([mmd(torch.randn(500, 1), torch.randn(400, 1) + 1.5, 0.8) for _ in range(60)])
    truth = _gaussian_closed_form(1.5, 0.8)
    assert abs(float(estimates.mean()) - truth) < 5 * float(estimates.std()) / 60**0.5


@KERNELS
def test_mmd_is_unbiased(kernel):
    values = torch.tensor([mmd(torch.randn(40, 2), torch.randn(30, 2), 1.0, kernel) for _ in range(400)])
    assert abs(values.mean()) < 5 * values.std() / 20
    assert (values < 0).any()


NAIVE = {
    gaussian: lambda r, h: math.exp(-(r**2) / (2 * h**2)),
    laplacian: lambda r, h: math.exp(-r / h),
    rational_quadratic: lambda r, h: 1 / (1 + r**2 / (2 * h**2)),
}


@KERNELS
@pytest.mark.parametrize("bandwidth", [None, 0.7])
def test_mmd_by_double_loop(kernel, bandwidth):
    """By default the bandwidth is the median distance."""
    x, y = torch.randn(7, 2, 3), torch.randn(9, 2, 3) + 1
    rows = torch.cat([x, y]).flatten(1).double()
    distances = torch.tensor([float((a - b).norm()) for i, a in enumerate(rows) for b in rows[:i]], dtype=torch.float64)
    h = bandwidth or float(distances.median())

    def k(a, b):
        return NAIVE[kernel](float((a - b).norm()), h)

    p, q = rows[:7], rows[7:]
    within_p = sum(k(a, b) for i, a in enumerate(p) for j, b in enumerate(p) if i != j) / 42
    within_q = sum(k(a, b) for i, a in enumerate(q) for j, b in enumerate(q) if i != j) / 72
    across = sum(k(a, b) for a in p for b in q) / 63
    assert mmd(x, y, bandwidth, kernel) == pytest.approx(within_p + within_q - 2 * across, rel=1e-10)


def test_mmd_with_another_kernel_not_one_at_zero():
    """The kernel -r^2 / 2 gives the squared distance of the means without its bias, by hand for four values."""
    x, y = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 7.0])
    expected = -(2**2) / 2 - 4**2 / 2 + (9 + 49 + 1 + 25) / 4
    assert mmd(x, y, 1.0, lambda squared, h: 5 - squared / 2) == pytest.approx(expected)


@KERNELS
def test_mmd_far_from_the_origin(kernel):
    x, y = torch.randn(50, 2).double(), torch.randn(50, 2).double() + 1
    assert mmd(x + 1e6, y + 1e6, kernel=kernel) == pytest.approx(mmd(x, y, kernel=kernel), rel=1e-6)


def test_nearest_neighbour_accuracy_against_scikit_learn():
    """Without ties."""
    x, y = torch.randn(50, 2), torch.randn(50, 2) + 0.7
    values, labels = torch.cat([x, y]).double().numpy(), [0] * 50 + [1] * 50
    expected = cross_val_score(KNeighborsClassifier(1), values, labels, cv=LeaveOneOut()).mean()
    assert 0.5 < expected < 1
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(expected, rel=1e-12)


def test_ties_count_by_the_fraction_with_the_right_label():
    """Integers repeat, within and across the samples."""
    x, y = torch.randint(0, 4, (30, 2)), torch.randint(1, 5, (30, 2))
    rows, right = torch.cat([x, y]), 0.0
    for i, a in enumerate(rows):
        squared = {j: int((a - b).square().sum()) for j, b in enumerate(rows) if j != i}
        nearest = [j for j, value in squared.items() if value == min(squared.values())]
        right += sum((j < 30) == (i < 30) for j in nearest) / len(nearest)
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(right / 60, rel=1e-12)
    assert nearest_neighbour_accuracy(y, x) == pytest.approx(right / 60, rel=1e-12)


def test_ties_far_from_the_origin():
    """Distances by matrix products would round: 1e8 squared leaves no digits below 1."""
    x, y = torch.randint(0, 4, (40, 2)), torch.randint(1, 5, (40, 2))
    assert nearest_neighbour_accuracy(x + 10**8, y + 10**8) == nearest_neighbour_accuracy(x, y)


def test_ties_of_one_law_cannot_be_told_apart():
    """200 zeros against 200 zeros: 199 of the 399 nearest have the right label."""
    assert nearest_neighbour_accuracy(torch.zeros(200), torch.zeros(200)) == pytest.approx(199 / 399, rel=1e-12)


def test_nearest_neighbours_in_blocks(monkeypatch):
    x, y = torch.randn(50, 2), torch.randn(50, 2) + 0.7
    whole = nearest_neighbour_accuracy(x, y)
    monkeypatch.setattr("pyro_kd.metrics.two_sample._CHUNK", 700)
    assert nearest_neighbour_accuracy(x, y) == pytest.approx(whole, rel=1e-12)


def test_nearest_neighbour_accuracy_extremes():
    x = torch.randn(200, 3)
    assert nearest_neighbour_accuracy(x, x + 100) == 1.0
    assert nearest_neighbour_accuracy(x, x.clone()) == 0.0
    same = torch.tensor([nearest_neighbour_accuracy(torch.randn(200, 3), torch.randn(200, 3)) for _ in range(50)])
    # a neighbour is one of the 199 others of the sample or the 200 of the other one
    assert abs(float(same.mean()) - 199 / 399) < 5 * float(same.std()) / 50**0.5


def test_two_sample_errors():
    with pytest.raises(ValueError, match="bandwidth must be positive, but half of the distances are zero; pass bandwidth=h"):
        mmd(torch.zeros(5, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="bandwidth must be positive and finite, not -1"):
        mmd(torch.zeros(5, 2), torch.ones(5, 2), bandwidth=-1.0)
    with pytest.raises(ValueError, match="equal size"):
        nearest_neighbour_accuracy(torch.zeros(5, 2), torch.zeros(4, 2))


def test_batch_dimensions_need_plates():
    """Without a plate they would be taken for enumerated states, and the likelihood be wrong without a word."""

    def program():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(torch.tensor([0.0, 5.0]) + z, 1.0))

    with pytest.raises(PlateMismatchError, match=r"'y' has batch shape \(2,\).*pyro.plate.*to_event"):
        marginal_log_prob(program, {"y": torch.zeros(2)})


def test_inputs_have_no_part_in_the_kl():
    def program(loc):
        def model(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("u", dist.Normal(loc, 1.0), obs=x)
                pyro.sample("y", dist.Normal(x, 1.0))

        return model

    found = marginal_kl(program(2.0), program(0.0), "y", torch.zeros(200))
    assert found.mean == 0.0
