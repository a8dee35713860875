"""Files that are written as a whole or not at all: under a temporary name first. Knows paths, and nothing about their contents."""

import math
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from pyro_kd.errors import CheckpointError

__all__ = ["replace_file", "require_regular", "share_as_usual", "write_text"]


def require_regular(file: Path, *, most_bytes: float = math.inf, links: bool = False) -> None:
    """Raise OSError for a pipe, a device or a folder, which must not be opened: a read might never end.

    Args:
        file: the file.
        most_bytes: how large it may be.
        links: whether it may be a symbolic link to a regular file.
    """
    found = file.stat() if links else file.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{file.name} is no regular file")
    if found.st_size > most_bytes:
        raise OSError(f"{file.name} is too large")


def replace_file(path: str | Path, write: Callable[[Path], object], what: str) -> None:
    """Write a file under a temporary name, and rename it to ``path`` when it is complete.

    Two processes that write to one path do not disturb each other: the last one wins. The file has the permissions of the
    umask, whatever ``write`` does. A symbolic link stays a link: what it points to is replaced.

    Args:
        path: of the file.
        write: ``write(aside)`` writes the file to the path that it is given, where an empty file exists.
        what: what the file is, for errors: ``"the student"``.

    Raises:
        CheckpointError: the file could not be written; ``path`` is as it was, and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{what} could not be written to {path}: there is no folder {target.parent}. Make it first: "
            f"Path({str(target.parent)!r}).mkdir(parents=True)."
        )
    if target.is_dir():
        raise CheckpointError(f"{what} could not be written to {path}: it is a folder. Name a file in it.")
    aside = target.parent / f".pyro_kd-writing-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        aside.touch(exist_ok=False)
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)
        with aside.open("rb+") as file:  # a rename may reach the disk before what is in the file
            os.fsync(file.fileno())
        aside.replace(target)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} could not be written to {path} ({error})") from error


def write_text(path: str | Path, text: str, what: str) -> None:
    """Write a text to a file, in UTF-8 and with its line ends unchanged; see :func:`replace_file`."""
    replace_file(path, lambda aside: aside.write_bytes(text.encode()), what)


def share_as_usual(folder: Path) -> None:
    """Give the files of a folder the permissions of the umask: some libraries write files that only the owner can read."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.iterdir():
        file.chmod(mode)
