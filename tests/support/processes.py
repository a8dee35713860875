"""Several processes on one machine, as torchrun starts them: forked from a server that has imported everything already."""

import multiprocessing
import os
import socket
import time
import traceback
from typing import Any, NamedTuple

import pyro
import torch

__all__ = ["Failure", "in_processes", "start"]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pyro_kd.training", "torch.distributed", "torch.utils.data", "torch._dynamo", __name__])


class Failure(NamedTuple):
    """The error that ended a process."""

    kind: str
    text: str


def in_processes(function, *args, size=2, timeout=60.0) -> list[Any]:
    """Call ``function(*args)`` of a module in each of several processes: what it returns by rank, or a :class:`Failure`.

    A process that was killed, or has not ended in time, gives None.
    """
    processes, pipes = start(function, *args, size=size)
    found, end = [], time.monotonic() + timeout
    for pipe in pipes:
        try:
            found.append(pipe.recv() if pipe.poll(max(end - time.monotonic(), 0)) else None)
        except EOFError:  # killed
            found.append(None)
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    return found


def start(function, *args, size=2):
    """The same without waiting: the processes, and the pipes from which they can be asked what they have returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(size):
        mine, theirs = _CONTEXT.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
        }
        process = _CONTEXT.Process(target=_run, args=(theirs, environment, function, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    return processes, pipes


def _run(pipe, environment, function, args):
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    try:
        found = function(*args)
    except BaseException as error:
        if os.environ.get("SHOW_ERRORS"):
            traceback.print_exc()
        found = Failure(type(error).__name__, str(error))
    pipe.send(found)
    pipe.close()
