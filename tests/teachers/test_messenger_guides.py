"""Pyro's messenger guides, which run the model inside of themselves, as posteriors and as programs."""

import warnings

import pyro
import pyro.distributions as dist
import pyro.infer.inspect
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoHierarchicalNormalMessenger, AutoNormalMessenger, AutoRegressiveMessenger

from pyro_kd import SurrogateKD, freeze, mixture_of, posterior_predictive, stored_draws
from pyro_kd.errors import InvalidProgramError
from pyro_kd.isolation.programs import require_callable

X = torch.linspace(-1.0, 1.0, 5)
Y = 2 * X
KINDS = [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger]


def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def student(x, y=None):
    slope, width = pyro.param("slope", torch.tensor(0.0)), pyro.param("width", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, width), obs=y)


def trained(kind):
    pyro.set_rng_seed(0)
    guide = kind(model)
    guide(X, Y)
    return guide


@pytest.mark.parametrize("kind", KINDS)
def test_a_messenger_guide_is_a_program(kind):
    guide = trained(kind)
    for program in (guide, guide.call):
        require_callable(program, "the guide")
    pyro.set_rng_seed(1)
    expected = guide(X, Y)["slope"]
    pyro.set_rng_seed(1)
    assert torch.equal(freeze(guide)(X, Y)["slope"], expected)


@pytest.mark.parametrize("wrap", [lambda guide: guide, freeze, lambda guide: lambda *args: guide(*args)])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_drawn_by_the_model_where_the_call_has_the_data(kind, wrap):
    teacher = posterior_predictive(model, wrap(trained(kind)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the rows of 'y' share")
        warnings.filterwarnings("error", "the teacher's targets")
        assert SurrogateKD(["y"], fresh="*").loss(student, teacher, X, Y) > 0
    drawn = poutine.trace(poutine.uncondition(teacher)).get_trace(X, Y)
    torch.testing.assert_close(drawn.nodes["y"]["fn"].mean, drawn.nodes["slope"]["value"] * X)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_the_data_is_an_error_or_a_warning(kind):
    """Pyro gives a posterior to all that a call does not observe: the data would be drawn from a new one."""
    guide = trained(kind)
    teacher = posterior_predictive(model, guide)
    for _ in range(2):
        with pytest.raises(
            InvalidProgramError, match=f"{kind.__name__} has made the parameters .*Call the teacher with the data"
        ):
            teacher(X)
    Predictive(model, guide=guide, num_samples=2)(X)  # the guide now has a posterior of the data
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the rows of 'y' share")
        with pytest.warns(UserWarning, match="the teacher's targets 'y' are drawn by its guide"):
            SurrogateKD(["y"], fresh="*").loss(student, posterior_predictive(model, guide), X)


def test_an_untrained_messenger_guide_is_an_error():
    with pytest.raises(InvalidProgramError, match="AutoNormalMessenger has not been trained"):
        posterior_predictive(model, AutoNormalMessenger(model))


def test_a_frozen_predictive_takes_a_messenger_guide():
    teacher = freeze(Predictive(model, guide=trained(AutoNormalMessenger), num_samples=1))
    assert SurrogateKD(["y"], fresh="*").loss(student, teacher, X, Y) > 0


TEACHERS = {
    "draws": lambda: posterior_predictive(model, {"slope": torch.randn(50)}),
    "draws, in rows": lambda: posterior_predictive(model, {"slope": torch.randn(50)}, rows=len),
    "predictive": lambda: freeze(Predictive(model, {"slope": torch.randn(50)})),
    "stored": lambda: stored_draws({"y": torch.randn(20, 5)}),
    "mixture": lambda: mixture_of([model, model]),
    "mixture of rows": lambda: mixture_of([model, model], sites=["y"], rows=len),
}


@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_pyro_draws_the_structure_of_a_teacher(make):
    """As for ``pyro.render_model``, whose tensors have a shape of their own type."""
    found = pyro.infer.inspect.get_model_relations(make(), (X,))
    assert "y" in found["sample_sample"]
