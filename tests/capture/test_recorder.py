"""A recorded graph does what the run did, on any values of its inputs, as often as it is called."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import return_and_correct_aliasing

from pyro_kd.capture.passes.batch_norm import DECLARED
from pyro_kd.capture.recorder import record

aten = torch.ops.aten


def recorded(run, *inputs):
    return record(lambda *given: [*run(*given)], inputs, {})


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
LAYER = nn.Linear(2, 3)


def in_place(x):
    y = x.clone()
    y[0] += 1
    y.mul_(2)
    return y, y.sum()


def through_a_view(x):
    y = x.clone()
    row = y[1]
    y.zero_()
    row.add_(x[0])
    return y, row


def through_a_detached(x):
    y = x * 2
    other = y.detach()
    other.add_(1)
    return y, other


def own_numbers(x):
    y = torch.tensor([1.0, 2.0])
    y += x[0]  # must not reach the next call
    return y, torch.tensor(3.0) * x


def own_tensors(x):
    return (x @ WEIGHT, x + WEIGHT[0])


def several_results(x):
    first, second = x.split(1)
    values, indices = x.max(0)
    return first, second, values, indices, *torch._foreach_mul([x, x[0]], 2.0)


def foreach_in_place(x):
    parts = [x.clone(), x[0].clone()]
    torch._foreach_add_(parts, 1.0)
    return parts


def given_out(x):
    out = torch.empty_like(x)
    torch.exp(x, out=out)
    return out, x


def shapes(x):
    return x.reshape(-1), x.t(), x[None].expand(3, 2, 2), x.new_zeros(x.shape), torch.arange(len(x))


def a_network(x):
    return (LAYER(x).relu(),)


def a_constant_read(x):
    half = torch.tensor(0.5) * 2
    return (x * half.item(), x if half > 0 else -x)


def higher_derivatives(x):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(x.sin().sum(), x, create_graph=True)
    return grad, torch.autograd.grad(grad.square().sum(), x)[0]


def vectorised(x):
    return (torch.func.vmap(torch.func.grad(lambda row: (row @ WEIGHT).square().sum()))(x),)


RUNS = [
    *(in_place, through_a_view, through_a_detached, own_numbers, own_tensors, several_results, foreach_in_place, given_out),
    *(shapes, a_network, a_constant_read, higher_derivatives, vectorised),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_a_graph_equals_its_run_in_every_call(run):
    graph = recorded(run, torch.randn(2, 2))
    for _ in range(3):
        x = torch.randn(2, 2)
        before = x.clone()
        assert_close(graph(x), [*run(x)], rtol=0, atol=0)
        assert torch.equal(x, before)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_each_node_has_the_form_of_its_result(run):
    graph, x = recorded(run, torch.randn(2, 2)), torch.randn(2, 2)

    class Forms(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and node.op != "output":
                form = node.meta["val"]
                assert (form.shape, form.stride(), form.dtype, form.device) == (
                    result.shape,
                    result.stride(),
                    result.dtype,
                    result.device,
                )
            return result

    Forms(graph).run(x)


def test_draws_are_made_anew_and_are_those_of_the_run():
    def run(x):
        return x + torch.randn(2), torch.bernoulli(torch.sigmoid(x)), nn.functional.dropout(x, 0.5), x.clone().normal_()

    graph, x = recorded(run, torch.randn(2, 2)), torch.randn(2, 2)
    torch.manual_seed(0)
    found = [graph(x), graph(x)]
    torch.manual_seed(0)
    assert_close(found, [[*run(x)], [*run(x)]], rtol=0, atol=0)
    assert not torch.equal(found[0][0], found[1][0])


def test_gradients_are_part_of_the_graph():
    layer = nn.Linear(2, 1)

    def run(x):
        return torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])

    graph = recorded(run, torch.randn(2, 2))
    with torch.no_grad():
        layer.weight.fill_(2.0)
    x = torch.randn(2, 2)
    assert_close(graph(x), [*run(x)], rtol=0, atol=0)


def test_what_a_run_reaches_by_itself_is_an_attribute_and_the_same_object():
    graph = recorded(a_network, torch.randn(2, 2))
    held = [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in LAYER.parameters()}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: (torch.tensor(1.0) * x.sum()).item(),
        lambda x: torch.rand(()).item(),
        lambda x: torch.tensor(1.0).copy_(x[0, 0]).item(),
    ],
)
def test_a_read_of_a_value_raises(read):
    with pytest.raises(RuntimeError, match="would get value out of a tracing tensor"):
        recorded(lambda x: (x * read(x),), torch.randn(2, 2))


def test_a_constant_that_was_written_to_through_a_view_is_none():
    def run(x):
        number = torch.tensor(1.0)
        view = number.view(())
        assert view.item() == 1.0
        number.add_(x[0, 0])
        return (x * view.item(),)

    with pytest.raises(RuntimeError, match="would get value out of a tracing tensor"):
        recorded(run, torch.randn(2, 2))


def test_a_constant_may_be_written_to_with_constants():
    def run(x):
        number = torch.tensor(1.0)
        number.add_(2.0)
        return (x * number.item(),)

    x = torch.randn(2, 2)
    assert torch.equal(recorded(run, x)(x)[0], 3 * x)


def test_operations_that_consist_of_others_are_taken_apart_without_autograd_too():
    def run(x):
        with torch.inference_mode():
            return (nn.functional.linear(x, WEIGHT).clone(),)

    found = targets(recorded(run, torch.randn(2, 2)))
    assert aten.linear.default not in found
    assert found == targets(recorded(lambda x: (nn.functional.linear(x, WEIGHT).clone(),), torch.randn(2, 2)))


def test_rewritten_operations():
    norm = nn.BatchNorm1d(2)
    graph = record(lambda x: [norm(x)], [torch.randn(5, 2)], DECLARED)
    assert aten._native_batch_norm_legit.default in targets(graph)
    x, before = torch.randn(5, 2), norm.running_mean.clone()
    found = graph(x)[0]
    assert not torch.equal(norm.running_mean, before)
    assert_close(found, norm(x))


def test_a_cast_of_autocast_is_not_kept_for_a_later_call():
    def run(x):
        return (LAYER(x).sum(),)

    with torch.autocast("cpu", torch.bfloat16):
        graph = recorded(run, torch.randn(2, 2))
        x = torch.randn(2, 2)
        assert torch.equal(graph(x)[0], run(x)[0])


class Wrapped(torch.Tensor):
    """A tensor that says itself which operations it consists of."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(value):
            return value.inner if isinstance(value, Wrapped) else value

        out = func(*map(plain, args), **(kwargs or {}))
        return return_and_correct_aliasing(func, args, kwargs or {}, Wrapped(out))


def test_a_subclass_is_recorded_by_what_it_consists_of():
    graph = recorded(lambda x: ((Wrapped(x) * 2 + 1).inner,), torch.randn(2, 2))
    x = torch.randn(2, 2)
    assert torch.equal(graph(x)[0], x * 2 + 1)
    assert targets(graph) == [aten.mul.Tensor, aten.add.Tensor]


def test_a_run_keeps_no_memory_of_what_is_gone():
    seen = []

    def run(x):
        y = x * 2
        seen.append(weakref.ref(y))
        y = y + 1
        gc.collect()
        seen.append(seen[0]() is None)
        return (y,)

    recorded(run, torch.randn(2, 2))
    assert seen[1]
