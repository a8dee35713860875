"""Point masses against densities: an infinite divergence is a typed error that names the site and the remedy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AffineTransform

from pyro_kd import LocalKD, bound_report
from pyro_kd.divergences import cross_entropy, jensen_shannon, kl, reverse_kl, wasserstein2
from pyro_kd.errors import PyroKDError, UnsupportedDivergenceError
from tests.support.losses import SurrogateKD

ZERO = torch.tensor(0.0)
POINTS = torch.tensor([-1.0, 0.5])
HALF = torch.tensor([0.5, 0.5])
ATOMS = {
    "Delta": lambda: dist.Delta(ZERO),
    "Delta.to_event": lambda: dist.Delta(POINTS).to_event(1),
    "Delta(event_dim=1)": lambda: dist.Delta(POINTS, event_dim=1),
    "Delta.mask": lambda: dist.Delta(POINTS).mask(torch.tensor([True, False])).to_event(1),
    "Delta.expand": lambda: dist.Delta(ZERO).expand([2]).to_event(1),
    "ExpandedDistribution": lambda: dist.ExpandedDistribution(dist.Delta(ZERO), torch.Size([2])).to_event(1),
    "image of Delta": lambda: dist.TransformedDistribution(dist.Delta(ZERO), [AffineTransform(1.0, 2.0)]),
    "mixture of Deltas": lambda: dist.MixtureSameFamily(dist.Categorical(HALF), dist.Delta(POINTS)),
    "MaskedMixture": lambda: dist.MaskedMixture(torch.tensor([True, False]), dist.Normal(POINTS, 1.0), dist.Delta(POINTS)).to_event(1),
    "Empirical": lambda: dist.Empirical(POINTS, torch.zeros(2)),
    "zero-inflated density": lambda: dist.ZeroInflatedDistribution(dist.Normal(ZERO, 1.0), gate=torch.tensor(0.3)),
    "Bernoulli": lambda: dist.Bernoulli(torch.tensor(0.5)),
}  # fmt: skip


def density_like(fn):
    return dist.Normal(torch.zeros(fn.event_shape), 0.01).to_event(len(fn.event_shape))


def program(fn):
    def model():
        pyro.sample("x", fn)

    return model


def trained(fn):
    """A density of the event shape, with a parameter."""

    def model():
        loc = pyro.param("loc", torch.zeros(fn.event_shape))
        pyro.sample("x", dist.Normal(loc, 0.01).to_event(len(fn.event_shape)))

    return model


MIXED = ("MaskedMixture", "zero-inflated density")


@pytest.mark.parametrize("name", ATOMS)
def test_point_masses_and_a_density_have_no_finite_divergence(name):
    """A mixture of both may be fitted to a density alone, and the reverse, where the KL is finite."""
    fn = ATOMS[name]()
    density = density_like(fn)
    refused = [(kl, fn, density), (reverse_kl, density, fn), (jensen_shannon, fn, density), (jensen_shannon, density, fn)]
    if name not in MIXED:
        refused += [(kl, density, fn), (reverse_kl, fn, density)]
    for divergence, p, q in refused:
        with pytest.raises(UnsupportedDivergenceError, match=f"{divergence.__name__} of .* is infinite"):
            divergence(p, q, p.sample())


@pytest.mark.parametrize(
    "name", [name for name in ATOMS if name != "Delta.mask"]
)  # the mask of one program alone is another error
@pytest.mark.parametrize("loss", [SurrogateKD, LocalKD])
def test_the_error_names_the_site_and_the_remedy(name, loss):
    atoms = ATOMS[name]
    with pytest.raises(PyroKDError, match="'x'") as caught:
        loss(["x"]).loss(trained(atoms()), program(atoms()))
    if not atoms().support.is_discrete:
        assert "cross_entropy" in str(caught.value)


def test_latents_and_targets_are_refused_equally():
    def teacher():
        z = pyro.sample("z", dist.Delta(ZERO))
        pyro.sample("x", dist.Normal(z, 1.0))

    def student():
        z = pyro.sample("z", dist.Normal(pyro.param("loc", ZERO.clone()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    with pytest.raises(UnsupportedDivergenceError, match="'z'.*latent_divergence"):
        LocalKD(["x"]).loss(student, teacher)
    loss = LocalKD(["x"], latent_divergence=cross_entropy)
    assert loss.terms(student, teacher)["z"].divergence == "cross_entropy"


def test_cross_entropy_fits_a_density_to_values():
    x = torch.tensor([0.3, -0.2])
    loc = torch.tensor(0.1, requires_grad=True)

    def model(fn):
        def run():
            with pyro.plate("rows", 2):
                pyro.sample("x", fn())

        return run

    student, teacher = model(lambda: dist.Normal(loc, 0.5)), model(lambda: dist.Delta(x))
    term = SurrogateKD(["x"], divergence=cross_entropy).terms(student, teacher)["x"]
    assert (term.divergence, term.analytic) == ("cross_entropy", True)
    assert term.value.item() == pytest.approx(-float(dist.Normal(0.1, 0.5).log_prob(x).sum()))
    (gradient,) = torch.autograd.grad(term.value, loc)
    assert gradient.item() == pytest.approx(float((0.1 - x).sum()) / 0.25)


@pytest.mark.parametrize(
    "q", [dist.Gamma(2.0, 1.0), dist.Poisson(torch.tensor(2.0)), dist.Categorical(torch.tensor([0.2, 0.3, 0.5]))], ids=repr
)
def test_cross_entropy_takes_values_in_any_support(q):
    value = torch.tensor(2.0)
    loss = SurrogateKD(["x"], divergence=cross_entropy)
    assert loss.loss(program(q), program(dist.Delta(value))) == pytest.approx(-q.log_prob(value).item())


def test_the_kl_of_a_certain_value_to_a_discrete_law_is_finite():
    q = dist.Poisson(torch.tensor(2.0))
    assert kl(dist.Delta(torch.tensor(3.0)), q, torch.tensor(3.0)).item() == pytest.approx(
        -q.log_prob(torch.tensor(3.0)).item()
    )


def test_cross_entropy_of_an_image_has_its_jacobian():
    p, q = (dist.TransformedDistribution(dist.Normal(loc, 1.0), [dist.transforms.ExpTransform()]) for loc in (0.0, 1.0))
    value = torch.tensor(1.7)
    assert cross_entropy(p, q, value).item() == pytest.approx(-q.log_prob(value).item())


def test_a_value_outside_of_the_students_support_names_the_site():
    with pytest.raises(PyroKDError, match="'x'"):
        SurrogateKD(["x"], divergence=cross_entropy).loss(
            program(dist.Gamma(2.0, 1.0)), program(dist.Delta(torch.tensor(-1.0)))
        )


def test_point_masses_are_compared_by_distance_even_under_transforms():
    p, q = (dist.TransformedDistribution(dist.Delta(torch.tensor(v)), [AffineTransform(1.0, 2.0)]) for v in (0.0, 3.0))
    assert wasserstein2(p, q, None) == 36.0
    assert SurrogateKD(["x"]).loss(program(q), program(p)) == 36.0


def test_equal_mixtures_of_points_have_divergence_0():
    fn = ATOMS["mixture of Deltas"]()
    assert kl(fn, ATOMS["mixture of Deltas"](), fn.sample()).item() == 0


def test_bound_report_has_no_bound_for_a_point_mass():
    with pytest.raises(PyroKDError, match="'x'"):
        bound_report(program(dist.Normal(0.0, 1.0)), program(dist.Delta(ZERO)), ["x"])
