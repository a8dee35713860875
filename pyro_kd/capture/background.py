"""Runs a graph as it is, while a process of its own compiles it, and takes the compiled graph once it is ready.

    call --> the graph as it is
    call --> the graph as it is               (the process has ended)
    call --> both, on the same random numbers: are they equal?
    call --> the compiled graph

Knows a graph of tensors, but no programs.
"""

import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from pyro_kd.capture.package import command, folder, key_of, load, log_of, unfinished, write_job
from pyro_kd.utils.display import first_line

__all__ = ["BackgroundGraph", "is_compiling"]

logger = logging.getLogger("pyro_kd.capture")

_MAX_TRIES = 3
"""How often the two may differ. Rounding may turn over a discrete draw, and then all that follows differs."""

_RTOL = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}
"""How far two tensors may differ, relative to their norm: in a deep network with batch norm, rounding was seen to reach 1e-3."""

_ATOL = 1e-6
"""The same, relative to the largest output: some gradients are rounding only, such as that of a bias before batch norm."""

_PREFIX = "pyro_kd-job-"
"""Of the names of folders for jobs, before the number of the process."""

_OLD = 3600.0
"""The age in seconds from which the folder of a process that is gone is removed: one in a different container only looks gone."""

_LEFT_ALONE = 50
"""A graph that others have been called so often since its own last call lets them compile first."""


class _Turn:
    """Which graph compiles: one at a time in this process, so that training keeps the other cores."""

    def __init__(self) -> None:
        self.graph: weakref.ref[BackgroundGraph] | None = None
        self.num_waiting = 0

    def take(self, graph: "BackgroundGraph") -> bool:
        """Whether it is the graph's turn now."""
        other = None if self.graph is None else self.graph()
        if other is not None and other is not graph and other.is_compiling:
            self.num_waiting += 1
            if self.num_waiting < _LEFT_ALONE:
                return False
            other.stop()
        self.graph, self.num_waiting = weakref.ref(graph), 0
        return True


_turn = _Turn()


def is_compiling() -> bool:
    """Whether a process compiles a graph of this process."""
    graph = None if _turn.graph is None else _turn.graph()
    return graph is not None and graph.is_compiling


class BackgroundGraph:
    """A graph that compiles in the background: call it on all inputs.

    Args:
        module: the graph.
        plain: its code, which runs until then.
        inputs: inputs of any shapes, all on the CPU, such as those of the next call.
        written: which inputs the graph writes to, by their numbers.

    The compiled graph draws the same random numbers, and differs by rounding. The first call that has both compares them; if they
    differ by more, a warning says so, and the graph goes on as it is.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plain: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        written: Sequence[int],
    ) -> None:
        self._run = plain
        self._written = written
        types = {getattr(node.meta.get("val"), "dtype", None) for node in module.graph.nodes}
        self._rtol = max((tolerance for dtype, tolerance in _RTOL.items() if dtype in types), default=0.0)
        self._num_operations = len(module.graph.nodes)
        self._num_tries = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._stop: Callable[[], object] | None = None
        self._clean: Callable[[], object] = lambda: None
        self._begin = 0.0
        self._is_settled = False
        self._package, self._job = Path(), Path()
        try:
            self._prepare(module, inputs)
        except Exception as error:  # a full disk, or a graph that cannot be written
            self._give_up(f"{type(error).__name__}: {first_line(error)}")

    def _prepare(self, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        """Take the package if it is there already; otherwise write what the process needs."""
        self._package = folder() / f"{key_of(module, inputs)}.pt2"
        if self._is_there(inputs):
            return
        self._package.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind()
        work = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._clean = weakref.finalize(self, _remove, work, os.getpid())
        self._job = work / "job.pt"
        write_job(self._job, module, inputs)

    @property
    def is_compiling(self) -> bool:
        """Whether its process is running."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The outputs for these inputs."""
        if not self._is_settled:
            self._look(inputs)
        return self._run(*inputs)

    def stop(self) -> None:
        """End the process; it begins anew when it is this graph's turn."""
        if self._stop is not None:
            self._stop()
        self._process = None

    def _look(self, inputs: Sequence[Tensor]) -> None:
        """Start the process, or see whether it has ended."""
        if self._process is None:
            if not self._is_there(inputs) and _turn.take(self):
                try:
                    self._start()
                except (OSError, ValueError) as error:  # such as a job that is gone
                    self._give_up(f"{type(error).__name__}: {error}")
            return
        if self._owner != os.getpid():  # a forked process takes what the process of its parent makes
            self._is_there(inputs)
            return
        code = self._process.poll()
        if code is None:
            _turn.num_waiting = 0
            return
        if code != 0 or not self._is_there(inputs):
            self._give_up(f"the compiler's process ended with {code}: {_last_line(log_of(self._job))}")

    def _is_there(self, inputs: Sequence[Tensor]) -> bool:
        """Whether a process has made the package, which is then taken; a damaged file is removed."""
        if not self._package.exists():
            return False
        try:
            compiled = load(self._package)
        except Exception as error:
            logger.info("%s is removed: %s", self._package, first_line(error))
            self._package.unlink(missing_ok=True)
            return False
        self._take(compiled, inputs)
        return True

    def _start(self) -> None:
        with log_of(self._job).open("wb") as log:
            self._process = subprocess.Popen(
                command(self._job, self._package),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal is for this process alone
            )
        self._owner = os.getpid()
        self._stop = weakref.finalize(self, _end, self._process, self._package, os.getpid())
        self._begin = time.monotonic()
        logger.info("compiling %s operations in the background", f"{self._num_operations:,}")

    def _take(self, compiled: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        """Take what a package runs if it does what the graph does, on these inputs."""
        try:
            is_equal = self._agree(compiled, inputs)
        except Exception as error:  # whatever the compiler's code may raise
            self._give_up(f"{type(error).__name__}: {first_line(error)}")
            return
        if is_equal:
            self._run, self._is_settled = compiled, True
            took = f" after {time.monotonic() - self._begin:.0f} s" if self._begin else ", from the cache"
            logger.info("%s operations: compiled%s", f"{self._num_operations:,}", took)
            self._clean()
            return
        self._num_tries += 1
        if self._num_tries >= _MAX_TRIES:
            self._give_up("its results differ from those of the graph by more than rounding")

    def _agree(self, compiled: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> bool:
        """Whether both have the same outputs and write the same, on the same random numbers. Has no effects."""
        stream, before = torch.get_rng_state(), [inputs[index].clone() for index in self._written]

        @torch.no_grad()
        def outcome(run: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
            found = [*run(*inputs), *(inputs[index].clone() for index in self._written)]
            for index, value in zip(self._written, before, strict=True):
                inputs[index].copy_(value)
            found.append(torch.get_rng_state())  # whether both have drawn as many numbers
            torch.set_rng_state(stream)
            return found

        return _are_close(outcome(self._run), outcome(compiled), self._rtol)

    def _give_up(self, reason: str) -> None:
        self._is_settled = True
        self._clean()
        warnings.warn(f"a graph is not compiled in the background and goes on as it is: {reason}", stacklevel=2)


def _are_close(one: Sequence[Tensor], two: Sequence[Tensor], rtol: float) -> bool:
    """Whether two sequences of tensors are equal up to rounding; where a tensor is rounding only, up to that of the largest."""
    norms = [torch.linalg.vector_norm(x.double()).item() for x in one]
    largest = max((norm for norm in norms if norm < float("inf")), default=0.0)
    for a, b, norm in zip(one, two, norms, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif not torch.linalg.vector_norm(a.double() - b.double()) <= rtol * norm + _ATOL * largest:
            return False
    return True


def _end(process: "subprocess.Popen[bytes]", package: Path, owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:  # a forked process leaves it alone
        process.terminate()
        process.wait()
        unfinished(package, process.pid).unlink(missing_ok=True)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind() -> None:
    """Remove the folders of this user's processes that were killed before their compiler had started, which removes its own."""
    if not hasattr(os, "getuid"):  # elsewhere one cannot ask whether a process is there
        return
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        process = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            state = path.lstat()
            is_old = state.st_uid == os.getuid() and state.st_mtime < time.time() - _OLD
            if is_old and process.isdecimal() and not _is_alive(int(process)):
                shutil.rmtree(path)  # which refuses links


def _is_alive(process: int) -> bool:
    """Whether a process runs, of whichever user; True where that cannot be known."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].strip() if lines else "it said nothing"
