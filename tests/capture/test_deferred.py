"""Deferred reads and CUDA graphs, with stand-ins for ``torch.cuda``; :mod:`tests.capture.test_gpu` has them on a GPU."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pyro_kd.capture import cuda_graph, deferred
from pyro_kd.errors import NonFiniteLossError


class Events:
    """torch, as far as deferred reads need it, with events that are reached when the test says so."""

    def __init__(self):
        self.reached = 0
        self.made = 0
        self.cuda = SimpleNamespace(Event=self.event, current_stream=lambda device: "stream")

    def empty(self, shape, dtype, pin_memory):
        assert pin_memory
        return torch.empty(shape, dtype=dtype)

    def event(self):
        number = self.made
        self.made += 1
        return SimpleNamespace(record=lambda stream: None, query=lambda: number < self.reached)


def test_a_deferred_read_is_handed_over_when_it_has_arrived(monkeypatch):
    events = Events()
    monkeypatch.setattr(deferred, "torch", events)
    values, seen = deferred.DeferredReads(), []
    for number in (1.0, 2.0, 3.0):
        values.add(torch.tensor(number), seen.append)
    values.collect()
    assert seen == []
    events.reached = 2
    values.collect()
    assert seen == [1, 2]
    values.clear()
    events.reached = 3
    values.collect()
    assert seen == [1, 2]


def test_an_error_of_a_deferred_read_is_raised_once(monkeypatch):
    events = Events()
    monkeypatch.setattr(deferred, "torch", events)
    values, seen = deferred.DeferredReads(), []

    def complain(value):
        raise NonFiniteLossError("late")

    values.add(torch.tensor(math.nan), complain)
    values.add(torch.tensor(True), seen.append)
    events.reached = 2
    with pytest.raises(NonFiniteLossError):
        values.collect()
    values.collect()
    assert seen == [True]


class Graphs:
    """torch, as far as recording needs it: a graph that runs its function again, into the memory of its outputs."""

    def __init__(self):
        self.recordings = 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.cuda = SimpleNamespace(
            CUDAGraph=lambda: SimpleNamespace(replay=self.replay),
            graph=self.graph,
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda stream: contextlib.nullcontext(),
        )
        self._foreach_copy_ = torch._foreach_copy_

    @contextlib.contextmanager
    def graph(self, graph):
        self.recordings += 1
        yield

    def replay(self):
        it = self.recorded
        for output, new in zip(it._outputs, it._function(*self.fixed, *it._given), strict=True):
            output.copy_(new)


def test_a_cuda_graph_copies_arguments_and_follows_tensors_that_move(monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(cuda_graph, "torch", graphs)
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    graphs.recorded = it = cuda_graph.CUDAGraphFunction(lambda weight, x: [weight.detach() * x], 1)
    graphs.fixed = [weight]
    (first,) = it(weight, torch.tensor([1.0, 10.0]))
    assert first.tolist() == [2, 30]
    with torch.no_grad():
        weight.mul_(2)
    (second,) = it(weight, torch.tensor([1.0, 1.0]))
    assert second.tolist() == [4, 6]
    assert first is second  # overwritten
    assert graphs.recordings == 1
    weight.data = torch.tensor([7.0, 7.0])
    assert it(weight, torch.tensor([1.0, 1.0]))[0].tolist() == [7, 7]
    assert graphs.recordings == 2
