"""Wheel and source distribution hold everything, and what is declared of versions is what is tested.

The installation itself, in a new environment, is `python -m tests.installation`.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.installation import EXTRAS, IMPORT_ALL, lowest
from tests.support.package_files import ROOT, build, copy_project, project_files, requirements, unpack

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHONS = re.findall(r"Python :: (3\.\d+)", PYPROJECT)
ADDED = (
    "pyro_kd/added/__init__.py",
    "pyro_kd/added/deeper/__init__.py",
    "pyro_kd/added/deeper/table.txt",
    "models/added.txt",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source distribution of the project and of a few files that nobody has listed anywhere."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_project(folder / "project")
    for name in ADDED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    return build(source, folder, "--no-isolation")


def test_wheel_holds_exactly_the_files_of_the_package(built):
    with zipfile.ZipFile(built[0]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name for name in (*project_files(), *ADDED) if name.startswith("pyro_kd/")}


def test_source_distribution_holds_every_file_of_the_project(built, tmp_path):
    source = unpack(built[1], tmp_path)
    missing = [name for name in (*project_files(), *ADDED) if not (source / name).is_file()]
    assert not missing


def test_every_module_of_the_wheel_can_be_imported(built, tmp_path):
    """From the unpacked wheel alone, although the checkout is installed in place."""
    zipfile.ZipFile(built[0]).extractall(tmp_path)
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(tmp_path)!r})
sys.prefix = {str(tmp_path)!r}
{IMPORT_ALL}
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_versions_that_are_tested_are_those_declared(built):
    """constraints.txt has one version of each package that is declared, and it is one that the declaration allows."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {}
    for requirement in [Requirement(line) for line in lines if not line.startswith("#")]:
        if requirement.marker is None or requirement.marker.evaluate():
            tested[requirement.name.lower()] = str(requirement.specifier).removeprefix("==")
    for requirement in requirements(built[0], *EXTRAS, "networks", "test", "docs"):
        if requirement.name != "pyro-kd":
            assert tested[requirement.name.lower()] in requirement.specifier, requirement
    assert len(lowest(built[0], *EXTRAS)) > len(lowest(built[0])) >= 4


def test_readme_states_the_versions_that_are_declared(built):
    (torch,) = [one for one in requirements(built[0]) if one.name == "torch"]
    assert f"PyTorch {str(torch.specifier).removeprefix('>=').removesuffix('.0')} or newer" in README
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in README
    after = Version(PYTHONS[-1])
    assert f'requires-python = ">={PYTHONS[0]},<{after.major}.{after.minor + 1}"' in PYPROJECT


@pytest.mark.parametrize("version", PYTHONS)
def test_sources_compile_under_every_python_declared(version):
    """Where it is installed; mypy checks the types for each of them in `make lint`."""
    variables = os.environ | {"PYENV_VERSION": version}
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], env=variables, capture_output=True, check=False).returncode:
        pytest.skip(f"needs Python {version}")
    code = "import pathlib, sys\nfor name in sys.argv[1:]: compile(pathlib.Path(name).read_bytes(), name, 'exec')"
    sources = [name for name in project_files() if Path(name).suffix == ".py"]
    assert sources
    command = [python, "-I", "-W", "error", "-c", code, *sources]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_types_are_checked_for_every_python_declared():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"PYTHONS := {' '.join(PYTHONS)}\n" in makefile


def test_the_public_workflow_tests_every_python_declared():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert re.findall(r'"(3\.\d+)"', workflow) == PYTHONS
