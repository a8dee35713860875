"""One training run per folder: a lock that the operating system releases when its process ends, however it ends."""

import errno
import functools
import os
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from pyro_kd.errors import CheckpointError, FolderInUseError

__all__ = ["LOCK_NAME", "locked"]

LOCK_NAME = ".pyro_kd-lock"
"""The file that is locked. It stays in the folder; its existence means nothing."""

_HELD = set[FileIO]()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, against all other processes and against the other fits of this process.

    Yields:
        Whether the lock is held. On a file system without locks it is not, and there is a warning.

    Raises:
        FolderInUseError: the lock is held already.
        CheckpointError: the lock file cannot be made.
    """
    _close_in_forks()
    try:
        file = _opened(folder / LOCK_NAME)
    except OSError as error:
        raise CheckpointError(
            f"the folder {folder} cannot be locked ({error.strerror or error}). Nothing was trained."
        ) from error
    try:
        is_held = _lock(file, folder)
        _HELD.add(file)
        yield is_held
    finally:
        _HELD.discard(file)
        file.close()


def _opened(path: Path) -> FileIO:
    """Open a lock file, or make it. Raises OSError for a link, a pipe or a device, of which opening some waits without an end."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):  # not every system has all
        flags |= getattr(os, name, 0)
    file = FileIO(os.open(path, flags, 0o666), "r+b")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path.name} is no regular file")
    return file


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
                f"a different training run writes checkpoints into {folder}, and two runs would destroy each other's. Nothing was "
                "trained. Wait until it ends, or use a different folder: fit(..., checkpoints='runs/second')."
            ) from error
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}): make sure that no second run writes there.",
            stacklevel=4,
        )
        return False
    return True


@functools.cache
def _close_in_forks() -> None:
    """Make sure that a worker process, such as a DataLoader's, does not keep the lock after its parent was killed."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for file in _HELD:
        file.close()
    _HELD.clear()
