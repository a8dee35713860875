"""Small graphs that a process of its own compiles."""

import time

import torch

from pyro_kd.capture.background import BackgroundGraph


def traced(run, *inputs):
    return torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="real")(*inputs)


def in_background(run, *inputs):
    module = traced(run, *inputs)
    return BackgroundGraph(module, traced(run, *inputs), inputs, written=())


def until(condition, *, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def doubled(x):
    return [x * 2 + torch.rand(3)]
