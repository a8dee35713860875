"""The distribution that an index chooses: families with and without parameters to choose."""

import pyro.distributions as dist
import pytest
import torch

from pyro_kd.divergences.closed_forms import closed_form_kl
from pyro_kd.teachers.chosen import Chosen, choose, pick

INDEX = torch.tensor([0, 1, 1, 0, 2])


def positive(*shape):
    return torch.rand(*shape) + 0.5


FAMILIES = {
    "Normal": lambda: dist.Normal(torch.randn(5), positive(5)),
    "LogNormal": lambda: dist.LogNormal(torch.randn(5), positive(5)),
    "Laplace": lambda: dist.Laplace(torch.randn(5), positive(5)),
    "Gamma": lambda: dist.Gamma(positive(5), positive(5)),
    "Poisson": lambda: dist.Poisson(positive(5)),
    "Bernoulli": lambda: dist.Bernoulli(logits=torch.randn(5)),
    "Categorical": lambda: dist.Categorical(positive(5, 4)),
    "Independent": lambda: dist.Normal(torch.randn(5, 3, 2), 1.0).to_event(2),
    "StudentT": lambda: dist.StudentT(positive(5)),
    "Dirichlet": lambda: dist.Dirichlet(positive(5, 3)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.randn(5, 2), torch.eye(2)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_the_density_and_the_draws_of_its_component(family):
    components = [FAMILIES[family]() for _ in range(3)]
    chosen = choose(INDEX, components)
    value = chosen.sample()
    assert (chosen.batch_shape, chosen.event_shape) == (components[0].batch_shape, components[0].event_shape)
    assert value.shape == components[0].sample().shape
    truth = torch.stack([components[k].log_prob(value)[row] for row, k in enumerate(INDEX)])
    torch.testing.assert_close(chosen.log_prob(value), truth)
    assert isinstance(chosen, Chosen) is (family in ("StudentT", "Dirichlet", "MultivariateNormal"))
    if family not in ("StudentT", "Dirichlet", "MultivariateNormal"):
        exact = torch.stack([closed_form_kl(fn, components[0]) for fn in components])
        torch.testing.assert_close(closed_form_kl(chosen, components[0]), exact[INDEX, torch.arange(5)])


def test_components_of_different_families():
    components = [
        dist.Normal(torch.zeros(5), 1e-6),
        dist.Laplace(torch.full((5,), 9.0), 1e-6),
        dist.StudentT(1.0).expand([5]),
    ]
    chosen = choose(INDEX, components).expand([2, 5])
    assert chosen.sample((3,)).shape == (3, 2, 5)
    torch.testing.assert_close(chosen.sample()[:, :4], torch.tensor([0.0, 9.0, 9.0, 0.0]).expand(2, 4), atol=1e-3, rtol=0)
    assert chosen.support is components[0].support


def test_categories_of_different_numbers_are_not_mixed_up():
    chosen = choose(torch.tensor([0, 1]), [dist.Categorical(torch.ones(2, 3)), dist.Categorical(torch.ones(2, 4))])
    torch.testing.assert_close(chosen.log_prob(torch.tensor([0, 0])).exp(), torch.tensor([1 / 3, 1 / 4]))


def test_an_index_with_a_dimension_more_chooses_for_all_rows():
    index = torch.arange(3)[:, None]  # as an enumerated index
    values = [torch.full((5, 2), float(k)) for k in range(3)]
    torch.testing.assert_close(pick(index, values, 1), torch.arange(3.0)[:, None, None].expand(3, 5, 2))
