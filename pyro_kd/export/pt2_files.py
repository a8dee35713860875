"""Files of torch.export with the description of inputs and outputs. :mod:`pyro_kd.export.loading` reads them."""

import io
from pathlib import Path

import torch
from torch.export import ExportedProgram

from pyro_kd.export.description import Description
from pyro_kd.export.graph import quietly
from pyro_kd.training.files import replace_file

__all__ = ["DESCRIPTION", "save_pt2"]

DESCRIPTION = "pyro_kd.json"
"""The part of the archive, below ``extra/``, that holds the description."""


def save_pt2(program: ExportedProgram, description: Description, path: str | Path) -> None:
    """Write a program with its description.

    Args:
        program, description: of the export.
        path: of the file, which ends in ``.pt2``.

    Raises:
        CheckpointError: the file cannot be written.
    """
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer, extra_files={DESCRIPTION: description.to_json()})
    replace_file(path, lambda aside: aside.write_bytes(buffer.getvalue()), f"the {description.kind}")
