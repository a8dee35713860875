"""One training run a folder: a lock that the operating system takes back when its process ends, however it ends."""

import errno
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from pyro_kd.errors import CheckpointError, FolderInUseError

__all__ = ["LOCK_NAME", "locked"]

LOCK_NAME = ".pyro_kd-lock"
"""The file that is locked. It stays in the folder, and means nothing by itself."""

_HELD = set[FileIO]()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, to which no other process, and no other fit of this one, has access meanwhile.

    Yields:
        Whether the lock is held. On a file system without locks it is not, and a warning says so.

    Raises:
        FolderInUseError: another one holds it.
        CheckpointError: the lock's file cannot be made.
    """
    _close_in_forks()
    try:
        file = (folder / LOCK_NAME).open("ab", buffering=0)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be locked ({error.strerror}). Nothing was trained.") from error
    try:
        is_held = _lock(file, folder)
        _HELD.add(file)
        yield is_held
    finally:
        _HELD.discard(file)
        file.close()


def _lock(file: FileIO, folder: Path) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK):
            raise FolderInUseError(
                f"another training run writes checkpoints into {folder}, and two would destroy each other's. Nothing was "
                "trained. Wait for its end, or use another folder: fit(..., checkpoint='runs/other')."
            ) from error
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}): see to it that no second run writes there.",
            stacklevel=4,
        )
        return False
    return True


@functools.cache
def _close_in_forks() -> None:
    """See to it that a worker process, of a DataLoader for instance, does not keep the lock when its parent was killed."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for file in _HELD:
        file.close()
    _HELD.clear()
