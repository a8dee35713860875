"""Files of every format that the loaders read, damaged at random, as a process of its own: some damage can end the interpreter.

    python -m tests.support.damaged_files [COUNT] [SEED]

Each of COUNT damaged files a format is refused with a typed error, or loads as what was written. A format without checksums may give
other numbers, which its class has validated. Memory is limited, so that a damaged number cannot ask for gigabytes.
"""

import pickle
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from scipy import io as scipy_io

from pyro_kd.datasets import Images, celeba, cifar10, iam_ondb, idx, images_npz, stroke3, svhn
from pyro_kd.errors import CorruptDataError, MissingDataError
from tests.support.data_files import write_idx

ROOM = 1 << 30  # bytes beside what the libraries have taken


@dataclass(frozen=True)
class Format:
    """How to write small files into a folder and to load them, which of them to damage, and whether they have checksums."""

    write: Callable[[Path], None]
    load: Callable[[Path], Any]
    files: tuple[str, ...]
    checksums: bool


def images(**options: Any) -> dict[str, Any]:
    draw = numpy.random.default_rng(0).integers
    return {
        "train_images": draw(0, 256, (20, 4, 4, 3), dtype="u1"),
        "train_labels": draw(0, 5, 20),
        "test_images": draw(0, 256, (10, 4, 4, 3), dtype="u1"),
        "test_labels": draw(0, 5, 10),
    } | options


def drawings() -> list[Any]:
    draw = numpy.random.default_rng(0).integers
    return [numpy.stack([*draw(-50, 50, (2, n)), draw(0, 2, n)], -1).astype("i2") for n in draw(1, 9, 10)]


def end_to_end() -> dict[str, Any]:
    return {"train_strokes": numpy.concatenate(drawings()), "train_lengths": [len(drawing) for drawing in drawings()]}


def sketch_rnn() -> dict[str, Any]:
    found = numpy.empty(10, object)
    found[:] = drawings()
    return {"train": found}


def house_numbers() -> dict[str, Any]:
    draw = numpy.random.default_rng(0).integers
    return {"X": draw(0, 256, (32, 32, 3, 3), dtype="u1"), "y": draw(1, 11, (3, 1), dtype="u1")}


def write_cifar10(folder: Path) -> None:
    draw = numpy.random.default_rng(0).integers
    batch = {b"labels": draw(0, 3, 2).tolist(), b"data": draw(0, 256, (2, 3072), dtype="u1"), b"filenames": [b"a", b"b"]}
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog", b"owl"]}, 2))
    (folder / "test_batch").write_bytes(pickle.dumps(batch, 2))


def write_celeba(folder: Path) -> None:
    names = [f"{number:06d}.jpg" for number in range(1, 7)]
    (folder / "img_align_celeba").mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (178, 218)).save(folder / "img_align_celeba" / name)
    rows = [f"{name}  {' '.join(numpy.random.default_rng(0).choice(['-1', '1'], 5))}" for name in names]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["6", "Bald Bangs Male Smiling Young", *rows]) + "\n")
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, "000122", strict=True)))


def write_iam_ondb(folder: Path) -> None:
    place = folder / "lineStrokes" / "a01" / "a01-000"
    place.mkdir(parents=True, exist_ok=True)
    points = "".join(f'<Point x="{3 * i % 50}" y="{7 * i % 40}" time="{i}"/>\n' for i in range(8))
    text = f'<?xml version="1.0"?>\n<W><StrokeSet><Stroke>{points}</Stroke><Stroke>{points}</Stroke></StrokeSet></W>'
    (place / "a01-000u-01.xml").write_text(text)


def write_emnist(folder: Path, packed: bool = False) -> None:
    draw = numpy.random.default_rng(0).integers
    images, labels = draw(0, 256, (4, 5, 6), dtype="u1"), draw(1, 4, 4, dtype="u1")
    write_idx(folder, images, labels, prefix="emnist-letters-", packed=packed)
    (folder / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n3 67 99\n")


def npz(content: dict[str, Any], load: Callable[..., Any], save: Callable[..., None] = numpy.savez) -> Format:
    return Format(
        lambda folder: save(folder / "file.npz", **content), lambda folder: load(folder / "file.npz"), ("file.npz",), True
    )


def mat(compressed: bool) -> Format:
    def write(folder: Path) -> None:
        scipy_io.savemat(folder / "train_32x32.mat", house_numbers(), do_compression=compressed)

    return Format(write, svhn, ("train_32x32.mat",), compressed)


FORMATS = {
    "images": npz(images(), images_npz),
    "images with names, compressed": npz(images(classes=list("abcde")), images_npz, numpy.savez_compressed),
    "drawings end to end": npz(end_to_end(), stroke3),
    "drawings of sketch-rnn": npz(sketch_rnn(), stroke3, numpy.savez_compressed),
    "SVHN": mat(compressed=False),
    "SVHN, compressed": mat(compressed=True),
    "CIFAR-10": Format(write_cifar10, lambda folder: cifar10(folder, train=False), ("batches.meta", "test_batch"), False),
    "CelebA": Format(
        write_celeba,
        lambda folder: celeba(folder, "all", size=1),
        ("list_attr_celeba.txt", "list_eval_partition.txt"),
        False,
    ),
    "IDX": Format(
        write_emnist,
        idx,
        ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte", "emnist-letters-mapping.txt"),
        False,
    ),
    "IDX, packed": Format(
        lambda folder: write_emnist(folder, packed=True),
        idx,
        ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte.gz"),
        True,
    ),
    "IAM-OnDB": Format(write_iam_ondb, iam_ondb, ("lineStrokes/a01/a01-000/a01-000u-01.xml",), False),
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """With a bit flipped, a byte replaced, a piece left out, put twice or moved to zero, or the end cut off."""
    start = chance.choice([chance.randrange(len(content)), chance.randrange(min(400, len(content)))])
    end = min(start + chance.choice([1, 2, 4, 8, 50]), len(content))
    return chance.choice(
        [
            content[:start] + bytes([content[start] ^ 1 << chance.randrange(8)]) + content[start + 1 :],
            content[:start] + bytes([content[start] ^ 1 << chance.randrange(8)]) + content[start + 1 :],
            content[:start] + bytes([chance.choice([0, 255, chance.randrange(256)])]) + content[start + 1 :],
            content[:start] + content[end:],
            content[:end] + content[start:],
            content[:start] + bytes(end - start) + content[end:],
            content[:start],
        ]
    )


def tensors(loaded: Any) -> tuple[Any, ...]:
    return (loaded.images, loaded.labels, loaded.classes) if isinstance(loaded, Images) else (loaded.points, loaded.lengths)


def same(first: Any, second: Any) -> bool:
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def check(name: str, count: int, seed: int) -> dict[str, int]:
    """How many damaged files of a format were refused, loaded as written, and loaded with other numbers."""
    format, chance, found = FORMATS[name], random.Random(f"{name} {seed}"), {"refused": 0, "same": 0, "other": 0}
    with tempfile.TemporaryDirectory() as folder:
        format.write(Path(folder))
        written = format.load(Path(folder))
        for index in range(count):
            path = Path(folder) / format.files[index % len(format.files)]
            whole = path.read_bytes()
            path.write_bytes(damaged(whole, chance))
            try:
                loaded = format.load(Path(folder))
            except (CorruptDataError, MissingDataError):
                found["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{name}: {path.read_bytes()!r} raises {type(error).__name__}") from error
            else:
                kind = "same" if same(loaded, written) else "other"
                found[kind] += 1
                assert kind == "same" or not format.checksums, f"{name}: {path.read_bytes()!r} loads as something else"
            path.write_bytes(whole)
    return found


def limit_memory() -> None:
    """Where the system knows how."""
    try:
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))


if __name__ == "__main__":
    torch.set_num_threads(1)
    limit_memory()
    count, seed = (int(argument) for argument in [*sys.argv[1:], *("300", "0")[len(sys.argv) - 1 :]])
    for name in FORMATS:
        print(f"{name}: {check(name, count, seed)}", flush=True)
