"""Noise is drawn in each call, and a capture leaves every random stream alone."""

import random

import numpy as np
import pyro
import pytest
import torch
from torch.testing import assert_close

from tests.support.captured import MARKS, Pair, rows

pytestmark = MARKS


def test_each_call_draws_new_noise():
    pair, x = Pair(), rows()
    assert len({pair.captured(x).item() for _ in range(6)}) == 6
    assert pair.student.runs == 3  # to set up, to look, and to trace


def test_a_seed_gives_the_same_sequence_of_losses_as_without_capture():
    pair, x = Pair(), rows()
    sequences = []
    for module in (pair.captured, pair.captured, pair.eager):
        torch.manual_seed(8)
        sequences.append([module(x).item() for _ in range(4)] + [torch.rand(()).item()])
    assert sequences[0] == sequences[1] == pytest.approx(sequences[2], rel=1e-6)


def test_the_first_call_has_the_effects_of_one_call():
    pair, x = Pair(), rows()
    state = {name: value.clone() for name, value in pair.student.state_dict().items()}
    found = []
    for _ in range(2):
        pair.student.load_state_dict(state)
        torch.manual_seed(4)
        found.append((pair.captured(x).detach(), torch.rand(()), [b.clone() for b in pair.student.buffers()]))
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_capture_leaves_the_streams_of_python_and_numpy_alone():
    def draw(*_):
        random.random()
        np.random.rand()

    pair, x = Pair(), rows()
    pair.student.register_forward_pre_hook(draw)
    pyro.set_rng_seed(0)
    expected = random.random(), np.random.rand()
    pyro.set_rng_seed(0)
    pair.captured(x)
    assert (random.random(), np.random.rand()) == expected
