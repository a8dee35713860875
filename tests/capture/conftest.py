"""Fixtures of the tests of captures."""

import logging
import re

import pytest


@pytest.fixture
def num_graphs(caplog):
    """How many graphs were made so far, as the log has it."""
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    return lambda: sum(bool(re.search(r": graph \d+, of \d+ operations", message)) for message in caplog.messages)
