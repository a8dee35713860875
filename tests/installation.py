"""Whether it can be installed: builds wheel and source distribution, and uses them in a new environment outside of the checkout.

    python -m tests.installation        # or: make test-installation

Twice: with the lowest versions that pyproject.toml declares, and what pip picks beside them, and with those of constraints.txt. Each time
every module is imported, and the README's Python runs. Then an example runs from the source distribution, with the wheel as its pyro_kd.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.package_files import build, copy_project, requirements, unpack

IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import pyro_kd

for module in pkgutil.walk_packages(pyro_kd.__path__, "pyro_kd."):
    importlib.import_module(module.name)
assert pathlib.Path(pyro_kd.__file__).is_relative_to(sys.prefix), pyro_kd.__file__
"""
EXTRAS = ("examples", "metrics", "training")


def main() -> None:
    """Run the check, and say what it does."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("building the wheel from the source distribution")
        wheel, archive = build(copy_project(folder / "project"), folder / "built")
        source = unpack(archive, folder / "source")
        shutil.rmtree(source / "pyro_kd")  # what is used from here on is the wheel's
        environment = Environment(folder / "environment")

        say(f"the lowest versions declared: {', '.join(lowest(wheel))}")
        environment.install(str(wheel), *lowest(wheel))
        environment.run("-I", "-c", IMPORT_ALL)
        environment.run_readme(source, "1")

        say(f"the lowest versions declared, with the extras: {', '.join(lowest(wheel, *EXTRAS))}")
        environment.install(f"{wheel}[{','.join(EXTRAS)}]", *lowest(wheel, *EXTRAS))
        environment.run_readme(source)

        say("the versions of constraints.txt")
        environment.install(f"{wheel}[{','.join(EXTRAS)}]", "--upgrade", "--constraint", str(source / "constraints.txt"))
        environment.run("-I", "-c", IMPORT_ALL)
        environment.run_readme(source)

        say("an example of the source distribution")
        environment.run("-m", "examples.helmholtz", "--preset", "smoke", "--out", str(folder / "results"), cwd=source)
        assert (folder / "results" / "results.json").exists(), sorted((folder / "results").rglob("*"))
    say("the installation works")


def lowest(wheel: Path, *extras: str) -> list[str]:
    """The lower bounds of what the wheel declares, each as the one version to install."""
    found = set()
    for requirement in requirements(wheel, *extras):
        (bound,) = requirement.specifier
        assert bound.operator == ">=", f"{requirement} has no lower bound"
        found.add(f"{requirement.name}=={bound.version}")
    return sorted(found)


class Environment:
    """A new virtual environment that sees neither the checkout nor the environment that runs this."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)

    def install(self, *arguments: str) -> None:
        """With pip, which then checks that nothing contradicts."""
        quiet = ("--quiet", "--disable-pip-version-check")
        self.run("-m", "pip", "install", *quiet, *arguments)
        self.run("-m", "pip", "check", "--disable-pip-version-check")

    def run_readme(self, source: Path, *number: str) -> None:
        """Run the README's first blocks, or all of them, in an empty folder."""
        with tempfile.TemporaryDirectory() as empty:
            self.run(
                "-I", str(source / "tests" / "support" / "readme.py"), str(source / "README.md"), *number, cwd=Path(empty)
            )

    def run(self, *arguments: str, cwd: Path | None = None) -> None:
        """Run its Python, by default in its own folder; the output is shown."""
        python = self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        subprocess.run([str(python), *arguments], cwd=cwd or self.folder, env=variables, check=True)


def say(text: str) -> None:
    """Print at once, also into a log."""
    print(f"installation: {text}", flush=True)


if __name__ == "__main__":
    main()
