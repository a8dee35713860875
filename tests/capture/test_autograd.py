"""Gradients of a captured loss: sums, arguments, hooks and memory."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_kd import freeze
from tests.support.captured import MARKS, Means, Net, Pair, both, outcome, rows
from tests.support.losses import SurrogateKD

pytestmark = MARKS


def test_a_second_backward_is_refused():
    pair, x = Pair(), rows()
    loss = pair.captured(x)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="captured loss can only be differentiated once"):
        loss.backward()


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda loss, params: torch.autograd.grad(loss, params, create_graph=True, allow_unused=True),
        lambda loss, params: torch.autograd.grad(loss.square(), params, create_graph=True, allow_unused=True),
        lambda loss, params: loss.backward(create_graph=True),
    ],
)
@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_a_gradient_that_is_to_be_differentiated_again_is_refused(differentiate):
    """As for a penalty on gradients, which would have no gradient itself."""
    pair = Pair()
    with pytest.raises(RuntimeError, match="captured loss can only be differentiated once"):
        differentiate(pair.captured(rows()), list(pair.student.parameters()))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, params: torch.func.grad(f)(params),
        lambda f, params: torch.func.jvp(f, (params,), (params,)),
        lambda f, params: torch.vmap(lambda _: f(params), randomness="different")(torch.zeros(3)),
    ],
    ids=["grad", "jvp", "vmap"],
)
def test_a_transform_of_torch_func_is_refused(transform):
    pair, x = Pair(), rows()
    pair.captured(x)
    params = {name: param.detach() for name, param in pair.captured.named_parameters()}
    with pytest.raises(RuntimeError, match="cannot transform a captured loss.* use loss.backward"):
        transform(lambda params: torch.func.functional_call(pair.captured, params, (x,)), params)


def test_a_weighted_sum_of_losses_has_the_sum_of_gradients():
    pair, other = Pair(), Pair(teacher=freeze(Net(5)))
    other.student, x = pair.student, rows()
    grads = []
    for kind in ("captured", "eager"):
        torch.manual_seed(1)
        pair.student.zero_grad()
        one, two = getattr(pair, kind), SurrogateKD(["x"])(pair.student, other.teacher)
        if kind == "captured":
            two.compile(backend=None)
        (0.3 * one(x) + 2.0 * two(x).square()).backward()
        grads.append([param.grad.clone() for param in pair.student.parameters()])
    assert_close(*grads)


def test_gradients_of_two_calls_add_up():
    pair, x = Pair(), rows()
    once = outcome(pair.captured, x)[1:]
    torch.manual_seed(3)
    pair.captured(x).backward()
    assert_close([param.grad for param in pair.student.parameters()], [2 * grad for grad in once])


@pytest.mark.parametrize("is_leaf", [True, False])
def test_an_argument_gets_its_gradient(is_leaf, num_graphs):
    pair, grads = Pair(), []
    for module in (pair.captured, pair.captured, pair.eager):
        x = rows().requires_grad_()
        torch.manual_seed(3)
        module(x if is_leaf else 2 * x).backward()
        grads.append(x.grad)
    assert_close(grads[0], grads[2])
    assert_close(grads[1], grads[2])
    assert grads[2].abs().sum() > 0
    assert num_graphs() == 1


def test_gradients_share_no_memory():
    student = Means()
    for module in both(student):
        student.zero_grad()
        module().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        torch.testing.assert_close(student.a.grad.norm(), torch.tensor(0.5**0.5))


def test_hooks_of_parameters_act_once():
    student = Means()
    student.a.register_hook(lambda grad: 0.1 * grad)
    grads = []
    for module in both(student):
        student.zero_grad()
        module().backward()
        grads.append(student.a.grad)
    torch.testing.assert_close(*grads)
