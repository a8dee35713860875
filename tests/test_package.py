"""The package as a whole: the README runs as printed, imports are light, and nothing private leaks."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pyro
import pytest

import pyro_kd
from tests.support import readme
from tests.support.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_example_runs_as_printed():
    """The first Python block, and the output that the README shows for it."""
    readme.run(README, 1)
    pyro.clear_param_store()
    with pytest.raises(AssertionError, match="(?s)0.003 after 500 steps.*0.004 after 500 steps"):
        readme.run(README.replace("0.003 after 500", "0.004 after 500"), 1)


def test_readme_blocks_run_in_order(tmp_path, monkeypatch):
    """Every block of the README, in one namespace, as a reader would. The last is the method, which is what the loss computes."""
    monkeypatch.chdir(tmp_path)
    assert len(readme.blocks(README)) == README.count("```python")
    names = readme.run(README)
    assert (tmp_path / "runs" / "decoder.pt").exists()
    assert names["history"]["loss"][-1] < 0.02 * names["history"]["loss"][0]
    pyro.set_rng_seed(0)
    exec(readme.blocks(README)[-1].code, names)
    pyro.set_rng_seed(0)
    loss = pyro_kd.SurrogateKD(["x"], latent_weight=1.0, teacher_forcing=0.0).loss(names["student"], names["teacher"], 256)
    assert names["loss"].item() == pytest.approx(loss)


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{command}:", makefile, re.M), command
    for module in re.findall(r"python -m ((?:examples|tests)[\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_readme_counts_the_families():
    covered = {name.split("(")[0] for name in FAMILIES}
    assert f"covers {len(covered)} families" in README


def test_readme_names_the_public_interface():
    missing = [name for name in pyro_kd.__all__ if name not in README]
    assert not missing


@pytest.mark.slow
@pytest.mark.xdist_group("timing")
def test_import_adds_little_to_pyros(tmp_path):
    """Under 0.2 s of processor time, medians of alternating fresh processes; with cached bytecode, as an installation has it."""
    environment = dict(os.environ) | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    times = {"": [], "import pyro_kd": []}
    for _ in range(6):
        for extra, column in times.items():
            code = f"import pyro, time; start = time.process_time(); {extra or 'pass'}; print(time.process_time() - start)"
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
            column.append(float(run.stdout))
    cached = {name: column[1:] for name, column in times.items()}  # the first run has compiled
    assert statistics.median(cached["import pyro_kd"]) - statistics.median(cached[""]) < 0.2


@pytest.mark.parametrize("module", ["matplotlib", "scipy", "tqdm", "arviz", "sklearn"])
def test_import_needs_no_extra(module):
    code = f"import pyro, sys; before = set(sys.modules); import pyro_kd; sys.exit({module!r} in set(sys.modules) - before)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_import_changes_no_global_state():
    code = """
import torch, pyro
d = torch.distributions.Distribution
before = (torch.get_default_dtype(), d._validate_args, torch.is_grad_enabled(), torch.get_rng_state().tolist())
import pyro_kd
assert before == (torch.get_default_dtype(), d._validate_args, torch.is_grad_enabled(), torch.get_rng_state().tolist())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_import_nothing_of_pyro_kd():
    for path in (ROOT / "models").glob("*.py"):
        assert not re.search(r"^\s*(from|import) pyro_kd", path.read_text(encoding="utf-8"), re.M), path


def test_version_is_in_the_citation():
    assert f"version: {pyro_kd.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
