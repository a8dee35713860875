"""A small checkpoint, damaged and forged at random.

    python -m tests.support.damaged_checkpoints [COUNT] [SEED]

Each file is changed COUNT times. A damaged checkpoint is refused with a typed error, or holds what was written. A forged one, whose
checksums are right, is refused, or a fit resumes from it, which ends or has a typed error. Nothing waits, no program is started, and
nothing is written outside of the folder. Memory is limited, so that a damaged number cannot ask for gigabytes.
"""

import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import load, save
from torch.utils.data import DataLoader, TensorDataset

from pyro_kd import Distiller, SurrogateKD, freeze
from pyro_kd.errors import CheckpointError, PyroKDError
from pyro_kd.training import Checkpoints, Validation
from pyro_kd.training.checkpoints import CheckpointFolder, _checksum, _crc32
from tests.support.damaged_files import damaged, limit_memory

FILES = ("checkpoint.json", "student.safetensors", "state.safetensors", "optimiser.pt")
NAME = "step-00000004"
SECONDS = 20
NUMBERS = [0, 1, -1, 2, 10**6, 2**63, 2**70, 0.5, float("nan"), float("inf"), True, None, "", "x", "../x", [], {}, [[]]]
PLACES = ["delete", "empty", "folder", "pipe", "link to itself", "link to zero", "link to a pipe", "link to a copy", "swap"]


class Net(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(self.layer(x).squeeze(-1), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5))


def fit(folder, steps=4, **options):
    """Train with everything that a checkpoint holds: moments, a schedule, a best student, kept draws, and an order of batches."""
    pyro.clear_param_store()
    student = Net(1)
    distiller = Distiller(
        student,
        freeze(Net(0)),
        lambda params: torch.optim.Adam(params, lr=0.01),
        SurrogateKD(["y"], reuse=2, teacher_forcing=0.0),
        scheduler=lambda optim: torch.optim.lr_scheduler.ReduceLROnPlateau(optim),
    )
    data = TensorDataset(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    loader = DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(0))
    validation = Validation(loader, every=2)
    checkpoints = Checkpoints(folder, every=2)
    options = {"seed": 0, "progress": False, "validation": validation, "checkpoints": checkpoints} | options
    distiller.fit(batches=loader, steps=steps, **options)
    return [param.detach().clone() for param in student.parameters()]


def seal(folder, header=None):
    """Give a checkpoint the checksums that it should have."""
    file = folder / "checkpoint.json"
    header = json.loads(file.read_text()) if header is None else header
    if isinstance(header, dict) and isinstance(header.get("files"), dict):
        for name in FILES[1:]:
            if isinstance(header["files"].get(name), dict):
                header["files"][name] = {"bytes": (folder / name).stat().st_size, "crc32": _crc32(folder / name)}
    if isinstance(header, dict):
        header["crc32"] = _checksum(header)
    file.write_text(json.dumps(header))


def damage(folder, name, random_):
    """Change the bytes of a file, or put something else in its place."""
    file = folder / name
    if random_.random() < 0.8:
        file.write_bytes(damaged(file.read_bytes(), random_))
        return
    kept, kind = folder / "kept", random_.choice(PLACES)
    if kind == "swap":
        file.write_bytes((folder / random_.choice(FILES)).read_bytes())
        return
    file.rename(kept)
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "link to zero":
        file.symlink_to("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        file.symlink_to("../../" + "/".join([*folder.parts[-2:], "pipe"]))
    elif kind == "link to a copy":
        file.symlink_to(Path("..") / folder.name / "kept")


def forge(folder, name, random_):
    """Change what a file holds, and make all checksums fit."""
    file = folder / name
    header = json.loads((folder / "checkpoint.json").read_text())
    if random_.random() < 0.2 and name != "checkpoint.json":
        file.write_bytes(damaged(file.read_bytes(), random_))
    elif name == "checkpoint.json":
        change_entry(header, random_)
    elif name == "optimiser.pt":
        state = torch.load(file, weights_only=True)
        change_entry(state, random_)
        torch.save(state, file)
    else:
        change_tensor(file, random_)
    seal(folder, header)


def change_entry(value, random_):
    """Replace, delete or swap an entry of nested lists and mappings."""
    places = list(leaves(value))
    holder, key = random_.choice(places)
    kind = random_.choice(["replace", "replace", "delete", "swap", "add", "tensor"])
    if kind == "delete":
        del holder[key]
    elif kind == "add" and type(holder[key]) in (int, float):
        holder[key] += random_.choice([-1, 1, 1000, 2**40])
    elif kind == "tensor" and isinstance(holder[key], torch.Tensor):
        holder[key] = changed(holder[key], random_)
    elif kind == "swap":
        other, name = random_.choice(places)
        holder[key], other[name] = other[name], holder[key]
    else:
        holder[key] = copy.deepcopy(random_.choice(NUMBERS))


def leaves(value, depth=0):
    """Each entry in nested lists and mappings, as its holder and its key."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list) and len(item) < 100 and depth < 10:
            yield from leaves(item, depth + 1)


def change_tensor(file, random_):
    """Change a tensor, its name, or leave it out."""
    tensors = load(file.read_bytes())
    name = random_.choice(sorted(tensors))
    kind = random_.choice(["change", "change", "change", "delete", "rename", "swap"])
    if kind == "change":
        tensors[name] = changed(tensors[name], random_)
    elif kind == "swap":
        other = random_.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        tensor = tensors.pop(name)
        if kind == "rename":
            tensors[random_.choice(["x", name + "x", "best/x", "history/x", "random/cuda 99", "random/cuda x"])] = tensor
    file.write_bytes(save({key: tensor.contiguous() for key, tensor in tensors.items()}))


def changed(tensor, random_):
    """A tensor with a different number, shape or type; one that is much larger where it is used."""
    kind = random_.choice(["number", "number", "shape", "type", "large"])
    if kind == "number" and tensor.numel():
        tensor = tensor.clone()
        value = random_.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf"), 7.0])
        tensor.reshape(-1)[random_.randrange(tensor.numel())] = (
            value if tensor.is_floating_point() else int(random_.random() * 256) % 128
        )
        return tensor
    if kind == "shape":
        return random_.choice(
            [tensor[None], tensor.reshape(-1)[:1], tensor.reshape(-1)[:0], tensor.expand(2, *tensor.shape)]
        )
    if kind == "large":
        return tensor.expand(1000, *tensor.shape)
    return tensor.to(random_.choice([torch.int64, torch.float64, torch.bool, torch.float16, torch.complex64]))


def outcome(folder, written, is_forged):
    """Read a checkpoint that may be damaged, and resume from it: "refused", "equal" to what was written, or "different"."""
    signal.alarm(SECONDS)
    try:
        found = CheckpointFolder.read(folder)
    except CheckpointError:
        return "refused"
    finally:
        signal.alarm(0)
    if not is_forged:
        return "equal" if same(found, written) else "different"
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(folder.parent / "resumed", steps=7, resume=folder)
    except PyroKDError:
        return "refused"
    finally:
        signal.alarm(0)
        shutil.rmtree(folder.parent / "resumed", ignore_errors=True)
    return "different"


def same(one, two):
    """Whether two checkpoints hold the same."""
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, checkpoint in zip(buffers, (one, two), strict=True):
        torch.save([checkpoint.step, checkpoint.student, checkpoint.tensors, checkpoint.optimiser], buffer)
    return buffers[0].getvalue() == buffers[1].getvalue() and (one.values, one.run) == (two.values, two.run)


def watch(root):
    """End the process where it starts another, or writes outside of a folder."""

    def hook(event, args):
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
            os._exit(98)
        is_writing = event == "open" and isinstance(args[0], str | Path) and set(str(args[1] or "")) & set("wax+")
        if is_writing and not str(args[0]).startswith((str(root), "/dev/null")):
            print("wrote", args[0], flush=True)
            os._exit(97)

    sys.addaudithook(hook)


def check(count, seed):
    """Damage and forge each file this many times. Returns how many checkpoints were refused, equal, and loaded as something else."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        fit(root / "run")
        original = root / "run" / NAME
        written = CheckpointFolder.read(original)
        fit(root / "again", steps=7, resume=original)  # whatever a first fit imports
        limit_memory()
        watch(root)
        for name in FILES:
            random_, found[name] = random.Random(f"{name} {seed}"), dict.fromkeys(["refused", "equal", "different"], 0)
            for number in range(count):
                folder, is_forged = shutil.copytree(original, root / "copy" / NAME), number % 2 == 1
                (forge if is_forged else damage)(folder, name, random_)
                result = outcome(folder, written, is_forged)
                assert is_forged or result != "different", f"damage {number} of {name}, seed {seed}, was not noticed"
                found[name][result] += 1
                shutil.rmtree(root / "copy")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a process that waits
    numbers = [*map(int, sys.argv[1:]), *(100, 0)[len(sys.argv) - 1 :]]
    for name, counts in check(*numbers).items():
        print(f"{name}: {counts}", flush=True)
