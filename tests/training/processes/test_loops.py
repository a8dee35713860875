"""The loops of docs/several_processes.md, as they stand there, in two processes under torchrun."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.support.package_files import ROOT

BLOCKS = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", (ROOT / "docs/several_processes.md").read_text("utf-8"), re.DOTALL)
NEEDS = {"fabric_loop": "lightning", "lightning_loop": "lightning", "accelerate_loop": "accelerate", "ddp_loop": "torch"}
PRINT = """
found = [param.detach().double().sum().item() for param in loss.parameters()]
import os
print(repr(found), not any("teacher" in name for name in loss.state_dict()), len(found), file=open("found-" + os.environ["RANK"], "w"))
"""


def torchrun(folder, script, size=2):
    """Run a script under torchrun: what its processes have written."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [(folder / f"found-{rank}").read_text() for rank in range(size)]


def test_every_loop_is_tested():
    assert {name for name, _ in BLOCKS} == NEEDS.keys() | {"distillation"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_a_loop_trains_equal_students(tmp_path, name):
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    for file, text in BLOCKS:
        (tmp_path / f"{file}.py").write_text(text + PRINT * (file == name))
    first, second = torchrun(tmp_path, tmp_path / f"{name}.py")
    assert first == second
    assert first.endswith("True 5\n")


TRAINS = """
import pyro, torch
from torch.utils.data import DataLoader, TensorDataset
from pyro_kd import Distiller, SurrogateKD, freeze
from distillation import decoder

torch.manual_seed(0)
x = torch.randn(64, 2)
teacher = decoder(8)
teacher(x)
teacher = freeze(teacher)
pyro.clear_param_store()
distiller = Distiller(decoder(4), teacher, lambda params: torch.optim.Adam(params, lr=1e-2), SurrogateKD(["y"]))
distiller.fit(batches=DataLoader(TensorDataset(x), 16, shuffle=True), steps=6, checkpoints="run", progress=False)
import os
found = [param.detach().double().sum().item() for param in distiller.parameters.values()], distiller.history.losses
print(*found, file=open("found-" + os.environ["RANK"], "w"))
"""


@pytest.mark.slow
def test_a_script_trains_under_torchrun_as_it_is(tmp_path):
    (tmp_path / "distillation.py").write_text(dict(BLOCKS)["distillation"])
    (tmp_path / "train.py").write_text(TRAINS)
    first, second = torchrun(tmp_path, tmp_path / "train.py")
    assert first == second
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name[0] != "."] == ["step-00000006"]
