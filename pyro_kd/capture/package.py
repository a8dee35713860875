"""A graph as a package of AOTInductor: compiled code in a file, which any process of this machine loads in milliseconds.

    job, a file  -->  python -c "..." job package  (a process of its own)  -->  package, a file  -->  load(package)(*inputs)

Knows a graph and the forms of its inputs, but not who runs it. Random numbers are torch's own, in the order of the graph, so that the
package draws what the uncompiled graph draws.
"""

import contextlib
import hashlib
import importlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from filelock import FileLock  # which torch itself needs
from torch import Tensor, fx, nn

from pyro_kd.utils.torch_internals import compile_package, inductor_cache, load_package

__all__ = ["command", "folder", "key_of", "load", "log_of", "make", "unfinished", "write_job"]

_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_NICENESS = 10  # whoever trains meanwhile goes first
_MAIN = (  # the parent is asked for at once, since torch takes seconds to be imported
    "import os, sys; parent = os.getppid(); sys.path[:] = sys.argv[3:]; from pyro_kd.capture.package import make; "
    "make(sys.argv[1], sys.argv[2], parent)"
)
_OPTIONS = {"freezing": True, "reorder_for_locality": False, "fallback_random": True}  # see pyro_kd/capture/compile.py


class _ModuleName(NamedTuple):
    """A Python module, which cannot be pickled."""

    name: str


class _Job(NamedTuple):
    """A graph as source code, which a process compiles.

    A pickled ``GraphModule`` would trace its code anew when it is read, and draw its random numbers once, for good.

    Attributes:
        source: of the function ``forward(self, *inputs)``.
        globals: what the source names.
        constants: the tensors that it holds, by name.
        inputs: shape, strides and dtype of each input.
        threads: the number of threads to compile for.
    """

    source: str
    globals: dict[str, Any]
    constants: dict[str, Tensor]
    inputs: list[_Form]
    threads: int

    def module(self) -> nn.Module:
        """The graph as a module."""
        names = {k: importlib.import_module(v.name) if isinstance(v, _ModuleName) else v for k, v in self.globals.items()}
        exec(self.source, names)
        module = type("Graph", (nn.Module,), {"forward": names["forward"]})()
        for name, tensor in self.constants.items():
            module.register_buffer(name, tensor)
        return module


def folder() -> Path:
    """Where packages stay: in inductor's own cache, see ``TORCHINDUCTOR_CACHE_DIR``."""
    return Path(inductor_cache()) / "pyro_kd"


def key_of(module: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """A name of the package of a graph: equal only where the compiled code would be.

    Args:
        module: the graph.
        inputs: its inputs, of any shapes.
    """
    found = hashlib.sha256()
    constants = _constants(module)
    said = [
        module.code,
        _forms(inputs),
        {name: (_form(tensor), str(tensor.device)) for name, tensor in constants.items()},
        [torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), _OPTIONS],
    ]
    found.update(repr(said).encode())
    for tensor in constants.values():
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:40]


def write_job(path: Path, module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Write what :func:`make` reads: the graph with its constants, and the forms of its inputs.

    Args:
        path: the file.
        module: the graph.
        inputs: its inputs, of any shapes.
    """
    code = module.graph.python_code("self")
    used = {
        name: _ModuleName(value.__name__) if isinstance(value, ModuleType) else value for name, value in code.globals.items()
    }
    constants = {name: tensor.detach() for name, tensor in _constants(module).items()}
    torch.save(_Job(code.src, used, constants, _forms(inputs), torch.get_num_threads()), path)


def command(job: Path, package: Path) -> list[str]:
    """The command line of a process that calls :func:`make`, with the modules of this process."""
    return [sys.executable, "-c", _MAIN, str(job), str(package), *sys.path]


def make(job: str, package: str, parent: int) -> None:
    """Compile the graph of a job, and put the package in its place when it is complete.

    Of several processes that want the same package, such as the ranks of a machine, one compiles it, and the others wait for it. If
    the process that has started this one is killed, this one ends as well, and removes the job.

    Args:
        job, package: the files.
        parent: the process that has started this one.
    """
    left = (unfinished(Path(package), os.getpid()), Path(job), log_of(Path(job)))
    threading.Thread(target=_end_with, args=(parent, left), daemon=True).start()
    with FileLock(Path(package).with_suffix(".lock")):
        if not Path(package).exists():
            _make(job, package)


def _end_with(parent: int, left: Sequence[Path]) -> None:
    """Wait until the parent is gone, remove the files that it cannot remove, and end the process."""
    while os.getppid() == parent:
        time.sleep(1)
    with contextlib.suppress(OSError):
        for path in left:
            path.unlink(missing_ok=True)
        left[-1].parent.rmdir()
    os._exit(1)


def _make(job: str, package: str) -> None:
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICENESS)
    # This process reads what its parent wrote a moment ago, in a folder that is the user's own.
    read: _Job = torch.load(job, weights_only=False)
    torch.set_num_threads(read.threads)
    inputs = tuple(torch.empty_strided(shape, stride, dtype=dtype).zero_() for shape, stride, dtype in read.inputs)
    path = unfinished(Path(package), os.getpid())
    with torch.no_grad():
        compile_package(torch.export.export(read.module(), inputs, strict=False), path, _OPTIONS)
    path.replace(package)


def unfinished(package: Path, process: int) -> Path:
    """What a process writes before the package is complete."""
    return package.with_suffix(f".{process}.pt2")


def log_of(job: Path) -> Path:
    """What the process of a job says."""
    return job.with_suffix(".log")


def load(package: Path) -> Callable[..., Sequence[Tensor]]:
    """``f(*inputs)`` runs a package on its inputs, of the shapes that it was made for."""
    run = load_package(package)

    def on_list(*inputs: Tensor) -> Sequence[Tensor]:
        return run(list(inputs))

    return on_list


def _constants(module: fx.GraphModule) -> dict[str, Tensor]:
    names = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    return {name: getattr(module, name) for name in names}


def _form(tensor: Tensor) -> _Form:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _forms(inputs: Sequence[Tensor]) -> list[_Form]:
    return [_form(tensor) for tensor in inputs]
