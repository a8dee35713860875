"""The project's files, and the wheel and source distribution that are made of them.

Both are built from a copy: building writes beside the sources, and reads what an earlier build has left there.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def project_files() -> list[str]:
    """Paths in the checkout, of what git does not ignore; in an unpacked source distribution, of what it lists."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    else:
        listed = (ROOT / "pyro_kd.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return sorted(name for name in listed if name and (ROOT / name).is_file() and ".egg-info/" not in name)


def copy_project(folder: Path) -> Path:
    """The project's files in another folder, which is returned."""
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, folder: Path, *options: str) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it; both are returned, the wheel first."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), *options, str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a source distribution, and return the folder in it."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def requirements(wheel: Path, *extras: str) -> list[Requirement]:
    """What the wheel declares that it needs, with some of its extras."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        lines = message_from_bytes(opened.read(name)).get_all("Requires-Dist", [])
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)]
