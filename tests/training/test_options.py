"""Options of a fit that check themselves."""

import math

import pytest

from pyro_kd import Distiller
from pyro_kd.training import (
    Checkpoints,
    Validation,
)
from tests.support.losses import SurrogateKD
from tests.support.training_programs import fast_sgd, gaussian, mean, quiet_fit


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (lambda: {"validation": Validation(iter([]))}, TypeError, "iterated only once"),
        (lambda: {"validation": iter([])}, TypeError, "iterated only once"),
        (lambda: {"validation": 3}, TypeError, "a function that returns a loss, or batches, not 3"),
        (lambda: {"validation": Validation([()], every=0)}, ValueError, "every=.* must be at least 1, not 0"),
        (
            lambda: {"validation": Validation([()], patience=0)},
            ValueError,
            "patience=.* must be at least 1, or None.*, not 0",
        ),
        (lambda: {"validation": Validation([()], min_delta=-0.1)}, ValueError, "min_delta=.* must be at least 0, not -0.1"),
        (
            lambda: {"validation": Validation([()], min_delta=math.nan)},
            ValueError,
            "min_delta=.* must be at least 0, not nan",
        ),
        (lambda: {"checkpoints": Checkpoints("runs", every=0)}, ValueError, "every=.* must be at least 1, not 0"),
        (lambda: {"checkpoints": Checkpoints("runs", keep=0)}, ValueError, "keep=.* must be at least 1, not 0"),
        (lambda: {"checkpoints": True}, TypeError, r"a folder, or Checkpoints\(folder, ...\), not True"),
        (
            lambda: {"patience": 3},
            TypeError,
            r"no option 'patience': write fit\(..., validation=Validation\(..., patience=3\)\)",
        ),
        (lambda: {"validate_every": 7}, TypeError, r"validation=Validation\(..., every=7\)"),
        (lambda: {"min_delta": 0.1}, TypeError, r"validation=Validation\(..., min_delta=0.1\)"),
        (lambda: {"restore_best": False}, TypeError, r"validation=Validation\(..., restore_best=False\)"),
        (lambda: {"checkpoint": "runs"}, TypeError, r"write fit\(..., checkpoints='runs'\)"),
        (lambda: {"checkpoint_every": 5}, TypeError, r"checkpoints=Checkpoints\(..., every=5\)"),
        (lambda: {"keep": 5}, TypeError, r"checkpoints=Checkpoints\(..., keep=5\)"),
    ],
)
def test_invalid_and_former_options_of_a_fit_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        quiet_fit(Distiller(mean, gaussian(3.0), fast_sgd, SurrogateKD(["x"])), steps=2, **options())
