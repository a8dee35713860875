"""A run in a process of its own, with one thread and a cache of the compiler that no other program uses."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

__all__ = ["alone"]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""The compiler's work is done in the process that is measured, and not in others, whose processor time nobody would count."""


def alone(function: Callable[..., Any], *args: Any, cache: str | None = None) -> Any:
    """The function's result, from a new process. Its cache is empty, unless a folder is given."""
    with tempfile.TemporaryDirectory() as folder:
        environment = ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": cache or folder}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(function, *args).result()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
