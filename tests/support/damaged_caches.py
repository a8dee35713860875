"""A small cache of a teacher, damaged and forged at random.

    python -m tests.support.damaged_caches [COUNT] [SEED]

A damaged cache is refused with a typed error, or gives the draws that were written. A forged one, whose checksums are right, is refused
or loads, and then a loss has a value or a typed error, if the arguments are some that the program takes.
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import load_file, save_file

from pyro_kd import SurrogateKD, TeacherCache, cache_teacher
from pyro_kd.errors import PyroKDError, TeacherCacheError
from pyro_kd.training import cache_files

NUMBERS = [0, 1, -1, 2, 3, 10**6, 2**63, 2**70, 0.5, float("nan"), float("inf"), True, None, "", "x", "../x", [], {}, [[]]]


def teacher(rows, shift):
    """Sites of several families, a mask, a scale and an observed input."""
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        n = pyro.sample("n", dist.Poisson(z.sum(-1).exp()).mask(torch.arange(rows) > 0))
        c = pyro.sample("c", dist.Categorical(logits=torch.zeros(3)))
        pyro.sample("shift", dist.Normal(0.0, 1.0), obs=shift)
        pyro.sample("x", dist.LogNormal(z[..., 0] + shift + n / 10 + c, 0.5))


def write(folder):
    """Write the cache: three draws in one file."""
    pyro.set_rng_seed(0)
    batches = [{"rows": 3, "shift": torch.full((3,), float(k))} for k in range(3)]
    return cache_teacher(teacher, path=folder, batches=batches, targets=["x"])


def outcome(folder, written):
    """Read a cache that may be damaged: "refused", "equal" to what was written, or "different"."""
    try:
        cache = TeacherCache(folder)
        draws = [cache[index] for index in range(len(cache))]
    except TeacherCacheError:
        return "refused"
    is_equal = len(draws) == len(written) and all(map(same, draws, written))
    if not is_equal:
        for draw in draws:
            if not has_arguments(draw):
                continue  # on which the programs may fail in ways of their own
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    SurrogateKD(["x"], latent_weight=0.1).loss(teacher, cache.teacher, draw)
            except PyroKDError:
                pass
    return "equal" if is_equal else "different"


def has_arguments(draw):
    """Whether the program can be called with what a draw holds as its arguments."""
    args, kwargs = draw.call
    shift = kwargs.get("shift")
    return not args and set(kwargs) == {"rows", "shift"} and kwargs["rows"] == 3 and getattr(shift, "shape", None) == (3,)


def same(one, two):
    """Whether two draws are equal bit for bit."""
    return one.structure == two.structure and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True)
    )


def damage(folder, random_):
    """Change the bytes of a file."""
    file = folder / random_.choice(["cache.json", "draws-00000.safetensors"])
    data = bytearray(file.read_bytes())
    place = random_.randrange(len(data))
    kind = random_.choice(["flip", "flip", "cut", "zero", "insert", "remove", "head", "empty", "delete"])
    if kind == "flip":
        data[place] ^= 1 << random_.randrange(8)
    elif kind == "head":
        data[random_.randrange(16)] = random_.randrange(256)
    elif kind == "cut":
        data = data[:place]
    elif kind == "zero":
        data[place : place + 8] = bytes(min(8, len(data) - place))
    elif kind == "insert":
        data[place:place] = bytes(random_.randrange(256) for _ in range(random_.randrange(1, 9)))
    elif kind == "remove":
        del data[place : place + random_.randrange(1, 9)]
    elif kind == "empty":
        data = bytearray()
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(data)


def forge(folder, random_):
    """Change an entry of the header, or a tensor, and make all checksums fit."""
    header = json.loads((folder / "cache.json").read_text())
    if random_.random() < 0.3:
        change_tensor(folder, header, random_)
    else:
        places = list(leaves(header))
        holder, key = random_.choice(places)
        kind = random_.choice(["replace", "replace", "delete", "swap", "add"])
        if kind == "replace":
            holder[key] = copy.deepcopy(random_.choice(NUMBERS))
        elif kind == "delete":
            del holder[key]
        elif kind == "add" and type(holder[key]) in (int, float):
            holder[key] += random_.choice([-1, 1, 1000])
        else:
            other, name = random_.choice(places)
            holder[key], other[name] = other[name], holder[key]
    seal(folder, header)


def leaves(value):
    """Each entry in nested lists and mappings, as its holder and its key."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from leaves(item)


def change_tensor(folder, header, random_):
    """Change one number, the shape or the type of a tensor."""
    file = folder / "draws-00000.safetensors"
    tensors = load_file(file)
    name = random_.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = random_.choice(["number", "number", "shape", "type"])
    if kind == "number" and tensor.numel():
        value = random_.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf"), 7.0])
        tensor.reshape(-1)[random_.randrange(tensor.numel())] = (
            value if tensor.is_floating_point() else int(random_.random() * 9)
        )
    elif kind == "shape":
        tensor = random_.choice(
            [tensor[None], tensor.reshape(-1)[:1], tensor.reshape(-1)[:0], tensor.expand(2, *tensor.shape)]
        )
    else:
        tensor = tensor.to(random_.choice([torch.int64, torch.float64, torch.bool, torch.float16]))
    tensors[name] = tensor.contiguous()
    save_file(tensors, file)
    header["files"][file.name] = file.stat().st_size
    for index, draw in enumerate(header["draws"]):
        count = header["kinds"][draw[1]][1]
        draw[2] = cache_files._crc32([tensors[f"{index}.{k}"] for k in range(count)])


def seal(folder, header):
    """Write a header with the checksum that it should have."""
    if isinstance(header, dict):
        header["crc32"] = cache_files._checksum(header)
    (folder / "cache.json").write_text(json.dumps(header))


def check(count, seed):
    """Damage and forge a cache this many times. Returns how many were refused, equal, and loaded as something else."""
    random_ = random.Random(seed)
    found = dict.fromkeys(["refused", "equal", "different"], 0)
    with tempfile.TemporaryDirectory() as folder:
        cache = write(Path(folder) / "cache")
        written = [cache[index] for index in range(len(cache))]
        for number in range(count):
            copied = Path(folder) / "copy"
            shutil.copytree(cache.path, copied)
            is_forged = number % 2 == 1
            (forge if is_forged else damage)(copied, random_)
            result = outcome(copied, written)
            assert is_forged or result != "different", f"damage {number} of seed {seed} was not noticed"
            found[result] += 1
            shutil.rmtree(copied)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = [*map(int, sys.argv[1:]), *(200, 0)[len(sys.argv) - 1 :]]
    print(check(*numbers))
