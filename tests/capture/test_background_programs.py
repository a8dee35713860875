"""Every program that can be captured is compiled in the background, and then does what it does without a graph."""

import logging
import time

import pytest
import torch
from torch.testing import assert_close

from pyro_kd.capture.background import is_compiling
from tests.support.captured import MARKS
from tests.support.losses import SurrogateKD
from tests.support.tutorial_programs import MODULES, NAMES, READ_VALUES, measured, parameters_of_student

pytestmark = [*MARKS, pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*isn't in the supported list.*")]

TOO_LONG: tuple[str, ...] = ()
"""Graphs that are not compiled, since it would take too long."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in READ_VALUES])
def test_a_program_is_compiled_in_the_background(name, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    program = MODULES[NAMES.index(name)].program()
    params = parameters_of_student(program)
    eager, captured = SurrogateKD(**program.options), SurrogateKD(**program.options).compile(background=True)
    measured(captured, program, params)
    while is_compiling():
        time.sleep(0.1)
    found = measured(captured, program, params)
    said = [record.getMessage() for record in caplog.records]
    assert any("operations: compiled after" in message for message in said) or name in TOO_LONG, said
    expected = measured(eager, program, params)
    is_double = any(param.dtype == torch.float64 for param in params.values())
    assert_close(found, expected, rtol=1e-6 if is_double else 1e-3, atol=1e-6 if is_double else 1e-3)
