"""Every test starts from a clear parameter store and a fixed seed, with validation on, and must not change torch's state."""

import os
import signal

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

pytest.register_assert_rewrite("tests.support")  # its checks are tests' bodies: a failure shows both sides

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a shell's background, where Ctrl-C would do nothing in any test
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _global_state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients enabled": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "argument validation": torch.distributions.Distribution._validate_args,
        "Pyro's handler stack": list(_PYRO_STACK),
        "forward hooks": dict(torch.nn.modules.module._global_forward_pre_hooks),
    }


@pytest.fixture(autouse=True)
def clean_state():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    before = _global_state()
    yield
    assert _global_state() == before, "the test changed global state"


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def one_thread():
    """For tensors so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
