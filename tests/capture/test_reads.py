"""Who reads a tensor's value: this package and libraries at guards, and user programs at none."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd.capture.guards import NewGuardError, ObservedGuards, TracedGuards
from pyro_kd.errors import PlateMismatchError
from pyro_kd.utils import guards
from tests.support.losses import SurrogateKD


def observed(ask):
    with ObservedGuards() as watching:
        ask()
    return watching.answers


def test_answers_are_noted_by_name_and_given_with_their_conditions():
    first = lambda: guards.holds(torch.tensor([True, False]), "a") or guards.number(torch.tensor(2.0), "b")  # noqa: E731
    answers = observed(first)
    assert dict(answers) == {"a": [False], "b": [2.0]}
    with TracedGuards(answers) as watching:
        assert guards.holds(torch.tensor([True, True]), "a") is False
        assert guards.number(torch.tensor(2.0), "b") == 2.0
    assert [condition.item() for condition in watching.conditions] == [False, True]


def test_equality_is_verified_as_a_whole():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    with TracedGuards(observed(lambda: guards.equal(one, two, "same"))) as watching:
        assert not guards.equal(one, one.clone(), "same")
    assert [condition.item() for condition in watching.conditions] == [False]


def test_a_guard_that_was_not_observed_ends_the_trace():
    with TracedGuards({}), pytest.raises(NewGuardError, match="guard 'a' did not occur"):
        guards.holds(torch.tensor(True), "a")


def test_a_read_inside_a_library_is_a_guard_with_the_name_of_its_line():
    answers = observed(lambda: list(pyro.plate("rows", 2)))
    (name,) = answers
    assert name.startswith("pyro.poutine.indep_messenger:")
    assert answers[name] == [0, 1]


def test_a_scalar_index_inside_a_library_is_a_guard():
    def index():
        flow = dist.transforms.affine_autoregressive(2, hidden_dims=[3])
        flow.inv(torch.zeros(2))

    assert any(name.startswith("pyro.distributions.transforms") for name in observed(index))


def test_a_read_in_a_user_program_is_no_guard():
    def read():
        value = torch.tensor([1.0, 2.0])
        if (value > 0).all() and value.sum().item() > float(value[torch.tensor(0)]):
            torch.equal(value, value.clone())

    assert observed(read) == {}


def one_hot_of(classes):
    return torch.nn.functional.one_hot(torch.tensor([0, 2, 1]), classes)


def test_one_hot_is_a_comparison_whose_range_is_a_guard():
    with ObservedGuards() as watching:
        found = one_hot_of(4)
    assert torch.equal(found, one_hot_of(4))
    assert found.dtype == one_hot_of(4).dtype
    ((name, answers),) = watching.answers.items()
    assert name.startswith(f"{__name__}:")
    assert answers == [True]
    with ObservedGuards() as watching, pytest.raises(RuntimeError, match="Class values must be smaller"):
        one_hot_of(2)


def test_one_hot_inside_a_library_has_no_guard():
    law = dist.OneHotCategorical(torch.tensor([0.0, 1.0]))
    with ObservedGuards() as watching:
        found = law.sample()
    assert found.tolist() == [0.0, 1.0]
    assert watching.answers == {}


def program(loc, **options):
    def run():
        with pyro.plate("rows", 3, **options):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return run


def captured_guards(student, teacher):
    """Whether a captured loss has guards left."""
    module = SurrogateKD(["x"])(student, teacher)
    module.compile(backend=None)
    module()
    (entry,) = module.loss._pairs._pairs[0].captured._capture._cache._entries()
    return entry.graph._has_conditions


def test_plates_that_take_all_rows_have_no_guard():
    loc = torch.zeros((), requires_grad=True)
    assert not captured_guards(program(loc), program(1.0))


def test_rows_that_a_program_chooses_are_compared():
    loc, turned = torch.zeros((), requires_grad=True), torch.tensor([2, 1, 0])
    assert captured_guards(program(loc, subsample=turned), program(1.0, subsample=turned.clone()))
    with pytest.raises(PlateMismatchError, match="takes different rows"):
        SurrogateKD(["x"])(program(loc), program(1.0, subsample=turned))()
    with pytest.raises(PlateMismatchError, match="takes different rows"):
        SurrogateKD(["x"])(program(loc, subsample=turned), program(1.0))()


def classes_of(loc, write):
    def run():
        labels = torch.full((3,), 1)
        write(labels)
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(loc + torch.nn.functional.one_hot(labels, 2).float().sum(-1), 1.0))

    return run


@pytest.mark.parametrize(
    ("write", "has_guards"),
    [(lambda labels: None, False), (lambda labels: labels[:1].copy_(torch.bernoulli(torch.ones(1))), True)],
    ids=["constant", "drawn"],
)
@pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from|the student draws these)")
def test_labels_that_are_constants_have_no_guard(write, has_guards):
    loc = torch.zeros((), requires_grad=True)
    assert captured_guards(classes_of(loc, write), classes_of(1.0, lambda labels: None)) == has_guards
