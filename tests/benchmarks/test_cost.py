"""What an eager step of the library costs beside one written by hand, see tests/benchmarks/step_time.py.

Seconds depend on what else the machine does, so the test that always runs counts: the torch operations of a step, forward and
backward, and its calls of functions. The test of seconds is slow.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pyro
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.applications import APPLICATIONS, Application
from tests.benchmarks.step_time import VARIANTS, measure


class CountOperations(TorchDispatchMode):
    """Counts the torch operations inside the context."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_calls():
    """Counts the calls of Python and C functions inside the context."""
    count, before = [0], sys.getprofile()

    def on_event(frame: Any, event: str, argument: Any) -> None:
        count[0] += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        yield count
    finally:
        sys.setprofile(before)


def counts(build: Callable[[], Application], variant: str) -> tuple[int, int]:
    """Operations and calls of a step, after the first ones, which also check the programs."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    step = VARIANTS[variant](build())
    for _ in range(3):
        step()
    with CountOperations() as operations:
        step()
    with counting_calls() as calls:
        step()
    return operations.count, calls[0]


@pytest.mark.parametrize(
    ("build", "most_operations", "most_calls"),
    [
        (APPLICATIONS["helmholtz"], 0.9, 3.9),  # fewer operations: similar sites are computed in one stack
        (lambda: APPLICATIONS["hierarchical_vae"](4), 1.1, 3.95),
    ],
    ids=["helmholtz", "hierarchical_vae"],
)
def test_an_eager_step_has_little_more_operations_than_one_by_hand(build, most_operations, most_calls):
    operations, calls = counts(build, "library")
    operations_by_hand, calls_by_hand = counts(build, "by hand")
    assert operations <= most_operations * operations_by_hand
    assert calls <= most_calls * calls_by_hand


@pytest.mark.slow
@pytest.mark.xdist_group("timing")
@pytest.mark.parametrize(
    ("build", "limit"),
    [
        (APPLICATIONS["helmholtz"], 2.0),  # networks of two units: nearly all of it is Pyro
        (lambda: APPLICATIONS["hierarchical_vae"](4), 1.25),
    ],
    ids=["helmholtz", "hierarchical_vae"],
)
def test_an_eager_step_takes_little_longer_than_one_by_hand(build, limit):
    """Medians of alternating blocks; the machine may be busy, so the best of three measurements counts."""
    ratios = []
    for _ in range(3):
        _, library = measure(build, ["by hand", "library"], seconds=2.0, memory=False)
        ratios.append(library.ratio)
        if min(ratios) <= limit:
            break
    assert min(ratios) <= limit, ratios
