"""The class of divergences: what an instance knows about itself, copies and pickles, and plain functions in a loss."""

import copy
import inspect
import pickle
import pydoc
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD, divergences, freeze, site_report
from pyro_kd.divergences import Divergence, cross_entropy, jensen_shannon, kl, reverse_kl, wasserstein2
from pyro_kd.errors import SupportMismatchError
from tests.support.losses import SurrogateKD

DIVERGENCES = [kl, reverse_kl, cross_entropy, jensen_shannon, wasserstein2]
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.name)


def absolute_error(p, q, value):
    """The distance of the means."""
    return (p.mean - q.mean).abs()


exact_error = Divergence(absolute_error, exact=True, name="exact error")


@partial(Divergence, exact=True, needs_support=True)
def decorated(p, q, value):
    """A divergence of the user's own."""
    return 2 * absolute_error(p, q, value)


@each_divergence
def test_every_public_divergence_is_an_instance_that_documents_itself(divergence):
    assert isinstance(divergence, Divergence)
    assert divergence.name == divergence.__name__ == divergence.__qualname__
    assert getattr(divergences, divergence.name) is divergence
    assert repr(divergence) == f"<divergence {divergence.name}>"
    assert list(inspect.signature(divergence).parameters) == ["p", "q", "value"]
    assert ".. math::" in pydoc.plain(pydoc.render_doc(divergence))


@pytest.mark.parametrize("divergence", [*DIVERGENCES, decorated], ids=lambda d: d.name)
def test_copies_and_pickles_of_a_named_divergence_are_the_same_object(divergence):
    for again in (copy.copy(divergence), copy.deepcopy(divergence), pickle.loads(pickle.dumps(divergence))):
        assert again is divergence


def test_copies_and_pickles_of_a_wrapped_function_are_equal():
    for again in (copy.copy(exact_error), copy.deepcopy(exact_error), pickle.loads(pickle.dumps(exact_error))):
        assert again == exact_error
        assert hash(again) == hash(exact_error)
        assert (again.name, again.exact) == ("exact error", True)


def test_divergences_are_equal_if_function_and_options_are():
    assert Divergence.of(absolute_error) == Divergence.of(absolute_error)
    assert Divergence.of(absolute_error) != exact_error
    assert Divergence.of(absolute_error) != absolute_error
    assert kl != reverse_kl
    assert Divergence.of(kl) is kl


def test_a_loss_with_divergences_is_pickled_and_copied():
    loss = SurrogateKD(["x"], divergence=decorated, latent_divergence=exact_error)
    for again in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert (again.divergence, again.latent_divergence) == (decorated, exact_error)


def test_is_exact_tells_a_closed_form_from_an_estimate():
    normal, folded = dist.Normal(0.0, 1.0), dist.FoldedDistribution(dist.Normal(0.0, 1.0))
    assert kl.is_exact(normal, normal)
    assert not kl.is_exact(folded, folded)
    assert reverse_kl.is_exact(normal, normal)
    assert wasserstein2.is_exact(normal, normal)
    assert cross_entropy.is_exact(dist.Delta(torch.tensor(0.0)), normal)
    assert not cross_entropy.is_exact(normal, normal)
    assert not jensen_shannon.is_exact(normal, normal)
    assert Divergence.of(absolute_error).is_exact(normal, normal) is None
    assert decorated.is_exact(normal, normal) is True


def test_kl_of_two_points_is_replaced_by_wasserstein2():
    point, normal = dist.Delta(torch.tensor(0.0)), dist.Normal(0.0, 1.0)
    for divergence in (kl, reverse_kl):
        assert divergence.at(point, point) is wasserstein2
        assert divergence.at(point, normal) is divergence
        assert divergence.at(normal, normal) is divergence
    assert jensen_shannon.at(point, point) is jensen_shannon


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d.stackable], ids=lambda d: d.name)
def test_stackable_families_need_no_draw(divergence):
    for family in divergence.stackable:
        p, q = (family(torch.tensor([0.3, 0.6]) + x, *[1.0] * (family is dist.Normal)) for x in (0.0, 0.1))
        assert divergence.is_exact(p, q)
        torch.testing.assert_close(divergence(p, q, torch.empty(0)), divergence(p, q, p.sample()))


def program(loc):
    def model():
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    return model


@pytest.mark.parametrize("function", [absolute_error, exact_error, lambda p, q, value: absolute_error(p, q, value)])
def test_a_function_and_its_divergence_have_one_value(function):
    """At the latent and at the target: the means differ by 1 in both."""
    loss = SurrogateKD(["x"], latent_weight=1.0, divergence=function, latent_divergence=function)
    assert loss.loss(program(1.0), program(0.0)) == pytest.approx(2.0)
    assert loss.divergence is function


def test_reports_show_name_and_exactness():
    loss = LocalKD(["x"], divergence=absolute_error, latent_divergence=exact_error)
    shown = str(site_report(loss, program(torch.tensor(1.0, requires_grad=True)), freeze(program(0.0)), num_samples=2))
    rows = {line.split()[0]: line for line in shown.splitlines() if line}
    assert "exact error" in rows["z"]
    assert "closed form" in rows["z"]
    assert "absolute_error" in rows["x"]
    assert "closed form" not in rows["x"]


def test_a_divergence_that_needs_support_refuses_a_student_without_it():
    def positive():
        pyro.sample("x", dist.Exponential(1.0))

    def real():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(SupportMismatchError, match="'x'"):
        SurrogateKD(["x"], divergence=decorated).loss(positive, real)
    assert SurrogateKD(["x"], divergence=absolute_error).loss(positive, real) == pytest.approx(1.0)


@each_divergence
def test_laws_of_different_event_shapes_are_refused(divergence):
    """Else one term of a vector stands where the sum belongs: a forgotten to_event(1)."""
    vector, numbers = dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.Normal(torch.ones(3), 2.0)
    for p, q in ((vector, numbers), (numbers, vector)):
        with pytest.raises(SupportMismatchError, match=rf"{divergence.name} of events of shape .*to_event\(1\)"):
            divergence(p, q, torch.zeros(3))
    assert divergence(vector, numbers.to_event(1), torch.zeros(3)).shape == ()


def test_a_divergence_of_ones_own_may_know_both_forms():
    """Of a category as an index and as a one-hot vector."""
    total_variation = Divergence(lambda p, q, value: (p.probs - q.probs).abs().sum(-1) / 2, exact=True)
    p, q = dist.Categorical(torch.tensor([0.5, 0.5])), dist.OneHotCategorical(torch.tensor([0.9, 0.1]))
    assert total_variation(p, q, torch.tensor(0)) == pytest.approx(0.4)
