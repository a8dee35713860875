"""Fixtures of the tests of captures."""

import logging
import re
import sys

import pytest

from pyro_kd.capture import background


@pytest.fixture
def num_graphs(caplog):
    """How many graphs were made so far, as the log has it."""
    caplog.set_level(logging.INFO, "pyro_kd.capture")
    return lambda: sum(bool(re.search(r": graph \d+, of \d+ operations", message)) for message in caplog.messages)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of compiled graphs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "pyro_kd"


@pytest.fixture
def compiler(monkeypatch):
    """Puts a small program in place of the compiler: ``compiler("raise SystemExit(3)")``. Its arguments are the job and the package."""

    def put(code):
        monkeypatch.setattr(background, "command", lambda job, made: [sys.executable, "-c", code, str(job), str(made)])

    return put
