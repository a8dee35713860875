"""Scripts of other projects that pages run in the browser, taken from npm when the site is built, so that it needs no network later.

A package is fetched once, into build/npm. Without npm or a network the site is built all the same: mathematics then needs the
network in the browser, and drawings are shown as their text.
"""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

from sphinx.application import Sphinx
from sphinx.util import logging

FOLDER = Path(__file__).parents[2] / "build" / "npm"


class Script(NamedTuple):
    """A file of an npm package: the package with its version, the file's path in it, and its SHA-256."""

    package: str
    path: str
    sha256: str


SCRIPTS = {
    "mathjax.js": Script(
        "mathjax@3.2.2",
        "package/es5/tex-svg.js",
        "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882",
    ),
    "mermaid.js": Script(
        "@mermaid-js/tiny@12.0.0",
        "package/dist/mermaid.tiny.js",
        "9f2807e402479d2864bfd9a95052076fc69d0ff45a0b25148b84b70fc33425b9",
    ),
}


def fetch(app: Sphinx) -> None:
    """Put the scripts among the site's static files, and tell Sphinx which of them there are."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        for name, script in SCRIPTS.items():
            if not (FOLDER / name).exists():
                _fetch(name, script)
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).info("scripts are not taken from npm (%s)", error)
    if (FOLDER / "mathjax.js").exists():
        app.config.mathjax_path = "npm/mathjax.js"
    copied = Path(app.outdir) / "_static" / "npm"
    copied.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        if (FOLDER / name).exists():
            shutil.copyfile(FOLDER / name, copied / name)


def _fetch(name: str, script: Script) -> None:
    command = ["npm", "pack", "--silent", "--pack-destination", str(FOLDER), script.package]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    archive = FOLDER / done.stdout.split()[-1]
    with tarfile.open(archive) as opened:
        content = opened.extractfile(script.path).read()  # type: ignore[union-attr]
    archive.unlink()
    if hashlib.sha256(content).hexdigest() != script.sha256:
        raise OSError(f"{script.path} of {script.package} is not the file that was expected")
    (FOLDER / name).write_bytes(content)
