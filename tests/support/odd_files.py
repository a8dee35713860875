"""What may lie in the place of a file that is read."""

import os
from pathlib import Path

__all__ = ["put_in_place"]


def put_in_place(file: Path, kind: str) -> Path:
    """Put something else in the place of a file, which stays beside it under the name ``kept``: its path."""
    kept = file.with_name("kept")
    file.rename(kept)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to a pipe":
        pipe = file.with_name("pipe")
        os.mkfifo(pipe)
        file.symlink_to(pipe)
    elif kind == "link":
        file.symlink_to(kept)
    elif kind == "link by way of the folder above":
        file.symlink_to(Path("..") / file.parent.name / "kept")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "link to zero":
        file.symlink_to("/dev/zero")
    else:
        raise ValueError(kind)
    return kept
