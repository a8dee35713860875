"""Scripts of other projects that pages run in the browser, taken from npm when the site is built, so that it needs no network later.

A package is fetched once, into build/npm. Without npm or a network the site is built all the same: mathematics then needs the
network in the browser, drawings are shown as their text, and the exported student does not run.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from sphinx.application import Sphinx

FOLDER = Path(__file__).parents[2] / "build" / "npm"


class Script(NamedTuple):
    """A file of an npm package: the package with its version, the file's path in it, and its SHA-256."""

    package: str
    path: str
    sha256: str


_ONNX = "onnxruntime-web@1.30.0"
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
    "ort.wasm.min.js": Script(
        _ONNX,
        "package/dist/ort.wasm.min.js",
        "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    ),
    "ort-wasm-simd-threaded.mjs": Script(
        _ONNX,
        "package/dist/ort-wasm-simd-threaded.mjs",
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    ),
    "ort-wasm-simd-threaded.wasm": Script(
        _ONNX,
        "package/dist/ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}


def fetch(app: Sphinx) -> None:
    """Put the scripts among the site's static files, and tell Sphinx which of them there are."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        for package in dict.fromkeys(script.package for script in SCRIPTS.values()):
            wanted = {name: script for name, script in SCRIPTS.items() if script.package == package}
            if not all((FOLDER / name).exists() for name in wanted):
                _fetch(package, wanted)
    except (OSError, subprocess.SubprocessError) as error:
        # shown by `make docs`, but no warning, which would be an error
        print(f"note: scripts of pages are not taken from npm: {error}", file=sys.stderr)
    if (FOLDER / "mathjax.js").exists():
        app.config.mathjax_path = "npm/mathjax.js"
    copied = Path(app.outdir) / "_static" / "npm"
    copied.mkdir(parents=True, exist_ok=True)
    for name in SCRIPTS:
        if (FOLDER / name).exists():
            shutil.copyfile(FOLDER / name, copied / name)


def _fetch(package: str, scripts: dict[str, Script]) -> None:
    command = ["npm", "pack", "--silent", "--pack-destination", str(FOLDER), package]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    archive = FOLDER / done.stdout.split()[-1]
    with tarfile.open(archive) as opened:
        contents = {name: opened.extractfile(script.path).read() for name, script in scripts.items()}  # type: ignore[union-attr]
    archive.unlink()
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != scripts[name].sha256:
            raise OSError(f"{scripts[name].path} of {package} is not the file that was expected")
        (FOLDER / name).write_bytes(content)
