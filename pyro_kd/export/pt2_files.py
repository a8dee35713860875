"""Files of torch.export with the description of inputs and outputs. :mod:`pyro_kd.export.loading` reads them."""

import io
import json
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from pyro_kd.errors import UnsupportedExportError
from pyro_kd.export.description import Description
from pyro_kd.export.graph import quietly
from pyro_kd.export.inspection import check_program
from pyro_kd.training.files import replace_file
from pyro_kd.utils.display import first_line

__all__ = ["DESCRIPTION", "save_pt2"]

DESCRIPTION = "pyro_kd.json"
"""The part of the archive, below ``extra/``, that holds the description."""


def save_pt2(program: ExportedProgram, description: Description, path: str | Path) -> None:
    """Write a program with its description.

    Args:
        program, description: of the export.
        path: of the file, which ends in ``.pt2``.

    Raises:
        UnsupportedExportError: the program holds what :func:`~pyro_kd.export.load` would refuse.
        CheckpointError: the file cannot be written.
    """
    buffer = io.BytesIO()
    try:
        with quietly():
            torch.export.save(program, buffer, extra_files={DESCRIPTION: description.to_json()})
        _check(buffer)
    except Exception as error:  # of torch, which has several, or what a loader would say
        raise UnsupportedExportError(
            f"the {description.kind} of {description.program} cannot be a .pt2 file: {first_line(error):.300}. Save it as .onnx, or "
            "compute what depends on the number of rows with tensors."
        ) from error
    replace_file(path, lambda aside: aside.write_bytes(buffer.getvalue()), f"the {description.kind}")


def _check(content: io.BytesIO) -> None:
    """Raise CorruptExportError where a loader would refuse the program."""
    with zipfile.ZipFile(content) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("models/model.json")]
        check_program(json.loads(archive.read(name)))
