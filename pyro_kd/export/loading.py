"""A loader of exported programs that runs no code from their files.

``torch.export.load`` trusts a file: it unpickles tensors, evaluates expressions of sizes and guards, and looks up operations by any
name. So :func:`load` reads the archive itself, checks everything in it that torch would look up or evaluate
(:mod:`pyro_kd.export.inspection`), and hands torch a new archive that holds what was checked and nothing more.
"""

import io
import json
import os
import stat
import zipfile
import zlib
from pathlib import Path

import torch
from torch.export.pt2_archive import PT2ArchiveWriter

from pyro_kd.errors import CorruptExportError
from pyro_kd.export.description import Description, refuse_newer
from pyro_kd.export.exported import Exported
from pyro_kd.export.graph import quietly, random_operations
from pyro_kd.export.inspection import MEMBERS, check_program, check_weights
from pyro_kd.export.pt2_files import DESCRIPTION
from pyro_kd.utils.display import first_line

__all__ = ["load"]

_PROGRAM = "models/model.json"
_WEIGHTS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_EXTRA = f"extra/{DESCRIPTION}"


def load(path: str | Path) -> Exported:
    """Load a program that :meth:`~pyro_kd.export.exported.Exported.save` wrote as ``.pt2``.

    No code from the file is run: pickles, operations outside of torch's tensor operations, and expressions that are more than
    arithmetic of sizes are refused. A checksum of every part is compared, so that a damaged file is refused too.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptExportError: the file is truncated, damaged or foreign, was written by a newer version, or holds what could run code.
    """
    path = Path(path)
    members = _read(path)
    try:
        description = Description.from_json(members[_EXTRA])
        program = json.loads(members[_PROGRAM])
        check_program(program)
        for name in _WEIGHTS:
            check_weights(json.loads(members[name]), members, name.rpartition("/")[0])
        program["guards_code"] = []
        members[_PROGRAM] = json.dumps(program).encode()
        with quietly():
            loaded = torch.export.load(_packed(members))
    except CorruptExportError as error:
        raise CorruptExportError(f"{path}: {error}") from error
    except Exception as error:  # whatever torch raises for a program that it cannot read
        raise CorruptExportError(
            f"{path} is damaged, or was written by another version of torch: {type(error).__name__}: {first_line(error):.200}. "
            "Export the program again."
        ) from error
    if random_operations(loaded):
        raise CorruptExportError(f"{path} holds random operations, which pyro_kd does not export")
    signature = loaded.graph_signature
    found = len(signature.user_inputs), len(signature.user_outputs)
    if found != (len(description.noise) + len(description.inputs), len(description.outputs)):
        raise CorruptExportError(f"{path}: its description does not fit its program. Export the program again.")
    return Exported(loaded, description, None)


def _read(path: Path) -> dict[str, bytes]:
    """The parts of an archive by name, without the folder around them, all with the right checksum."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise CorruptExportError(f"{path} is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            members: dict[str, bytes] = {}
            size = path.stat().st_size
            _refuse_newer(archive, path)
            for info in archive.infolist():
                _, _, name = info.filename.partition("/")
                if name in members:
                    raise CorruptExportError(f"{path} holds {name!r} twice")
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                    raise CorruptExportError(f"{path} holds {name!r} compressed, which pyro_kd never writes")
                if MEMBERS.fullmatch(name):
                    members[name] = archive.read(info)
                elif name != "data/sample_inputs/model.pt":
                    raise CorruptExportError(f"{path} holds {name!r:.80}, which pyro_kd never writes")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, CorruptExportError):
            raise
        raise CorruptExportError(
            f"{path} is truncated or damaged, or no .pt2 file ({type(error).__name__}: {error}). Export the program again."
        ) from error
    missing = {_EXTRA, _PROGRAM, *_WEIGHTS, "archive_format"} - members.keys()
    if missing:
        raise CorruptExportError(
            f"{path} lacks {', '.join(sorted(missing))}: it was not written by pyro_kd. torch.export.load reads files that you trust."
        )
    return members


def _refuse_newer(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise CorruptExportError for an archive of a newer version, whatever else it holds."""
    for info in archive.infolist():
        if info.filename.partition("/")[2] == _EXTRA and info.file_size < 1 << 24:
            refuse_newer(archive.read(info), path)


def _packed(members: dict[str, bytes]) -> io.BytesIO:
    """A new archive of these parts."""
    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in members.items():
            if not name.startswith((".data/", "archive_", "byteorder")):
                writer.write_bytes(name, content)
        writer.write_bytes("data/sample_inputs/model.pt", b"")
    buffer.seek(0)
    return buffer
