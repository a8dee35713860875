"""A map that returns its input: its draws carry the input of this map, and not that of the map before it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoRegressiveMessenger
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform, IndependentTransform, identity_transform

from pyro_kd import LocalKD, SurrogateKD, freeze
from pyro_kd.divergences import jensen_shannon, kl, reverse_kl

ROWS = 4000
IDENTITIES = {
    "biject_to(real)": biject_to(constraints.real),
    "identity_transform": identity_transform,
    "of nothing, twice": ComposeTransform([ComposeTransform([])]),
    "independent": IndependentTransform(identity_transform, 0),
}


def maps(identity, where, shift):
    affine, exp = T.AffineTransform(shift, 0.5), T.ExpTransform()
    return {
        "last": [affine, identity],
        "between": [affine, identity, exp],
        "after exp": [affine, exp, identity],
        "twice": [affine, identity, identity],
    }[where]


def program(identity, where, shift):
    def model():
        with pyro.plate("rows", ROWS):
            base = dist.StudentT(5.0, torch.zeros(ROWS), 1.0)  # which has no KL in closed form
            return pyro.sample("x", dist.TransformedDistribution(base, maps(identity, where, shift)))

    return model


@pytest.mark.parametrize("where", ["last", "between", "after exp", "twice"])
@pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)
def test_divergences_are_those_of_the_densities(identity, where):
    shift = torch.tensor(0.0, requires_grad=True)
    teacher, student = program(identity, where, 0.7), program(identity, where, shift)
    torch.manual_seed(0)
    loss = SurrogateKD(["x"]).differentiable_loss(student, teacher) / ROWS
    # The KL is that of the laws before all that comes after the affine map.
    p, q = (dist.TransformedDistribution(dist.StudentT(5.0), [T.AffineTransform(m, 0.5)]) for m in (0.7, shift))
    grid = torch.linspace(-60, 60, 40_001)
    log_p, log_q = p.log_prob(grid), q.log_prob(grid)
    exact = torch.trapezoid(log_p.exp() * (log_p - log_q), grid)
    assert loss.item() == pytest.approx(exact.item(), abs=0.06)
    (grad,), (expected,) = torch.autograd.grad(loss, shift), torch.autograd.grad(exact, shift)
    assert grad.item() == pytest.approx(expected.item(), abs=0.12)


@pytest.mark.parametrize("divergence", [kl, reverse_kl, jensen_shannon], ids=lambda d: d.name)
def test_other_divergences_agree_with_and_without_the_identity(divergence):
    found = []
    for tail in ([], [biject_to(constraints.real)]):
        laws = [
            dist.TransformedDistribution(dist.StudentT(5.0, torch.zeros(ROWS), 1.0), [T.AffineTransform(m, 0.5), *tail])
            for m in (0.7, 0.0)
        ]

        def model(law):
            with pyro.plate("rows", ROWS):
                pyro.sample("x", law)

        torch.manual_seed(0)
        loss = SurrogateKD(["x"], divergence=divergence)
        found.append(loss.loss(lambda: model(laws[1]), lambda: model(laws[0])) / ROWS)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] > 0.05


@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_a_guide_that_ends_in_the_map_of_the_real_numbers_is_learned(loss):
    """AutoRegressiveMessenger puts ``biject_to(support)`` last."""
    data = 2.0 + 0.3 * torch.randn(20, generator=torch.Generator().manual_seed(0))

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=data)

    def guide():
        pyro.set_rng_seed(0)
        made = AutoRegressiveMessenger(model)
        made()
        return made

    teacher_guide, student = guide(), guide()
    svi = SVI(model, teacher_guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    teacher = freeze(teacher_guide)
    optim = torch.optim.Adam(student.parameters(), lr=0.05)
    module = loss(["mean"])(student, teacher)
    for _ in range(300):
        optim.zero_grad()
        module().backward()
        optim.step()
    with torch.no_grad():
        drawn = [torch.stack([g()["mean"] for _ in range(300)]) for g in (teacher_guide, student)]
    assert drawn[1].mean() == pytest.approx(drawn[0].mean().item(), abs=0.05)
    assert drawn[1].std() == pytest.approx(drawn[0].std().item(), rel=0.3)
