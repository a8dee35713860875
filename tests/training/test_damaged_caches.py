"""Damaged, foreign and hostile caches of a teacher: a typed error or a correct load, and no code runs."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from pyro_kd import TeacherCache
from pyro_kd.errors import TeacherCacheError
from pyro_kd.losses.teacher_draws import TeacherDraw
from pyro_kd.training import cache_files
from tests.support import damaged_caches
from tests.support.damaged_caches import seal, write
from tests.support.odd_files import put_in_place
from tests.support.package_files import ROOT

SHARD = "draws-00000.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original.path, tmp_path / "cache")


def header_of(folder):
    return json.loads((folder / "cache.json").read_text())


def read(folder):
    """All draws of a cache, within a few seconds."""
    signal.alarm(20)
    try:
        return list(TeacherCache(folder))
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("name", ["cache.json", SHARD])
@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "folder", "pipe", "link", "link to zero", "unreadable"])
def test_a_file_that_is_not_as_it_was_written(folder, name, kind):
    file = folder / name
    if kind in ("folder", "pipe", "link", "link to zero"):
        put_in_place(file, kind)
    else:
        content = file.read_bytes()
        file.unlink()
        if kind == "unreadable":
            if os.getuid() == 0:
                pytest.skip("this user reads everything")
            file.write_bytes(content)
            file.chmod(0)
        elif kind != "missing":
            file.write_bytes(content[:-1] if kind == "truncated" else b"")
    with pytest.raises(TeacherCacheError, match="no cache of a teacher|truncated or damaged: draw 0"):
        read(folder)


@pytest.mark.parametrize(
    "name", ["../kept/draws-00000.safetensors", "/dev/zero", "draws-00000.safetensors/../x", "draws-1.pt", "x" * 5000, ""]
)
def test_files_outside_of_the_folder_are_not_opened(folder, name):
    header = header_of(folder)
    header["files"] = {name: 1}
    header["draws"] = [[name, *rest] for _, *rest in header["draws"]]
    seal(folder, header)
    with pytest.raises(TeacherCacheError, match="lacks an entry, or has a wrong one"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "does not say format"),
        (
            {"format_version": 2},
            "by a newer pyro_kd: format version 2, and this version reads 1. .*pip install --upgrade pyro-kd",
        ),
        ({"format_version": 0}, "a different version of pyro_kd: format version 0"),
        ({"versions": {"torch": "1.0", "pyro": "1.0"}}, "was written with.*Write it again"),
        ({"draws": []}, "there is no draw"),
        ({"teacher": {"x": 1}}, "about the teacher"),
    ],
)
def test_a_header_of_something_else(folder, change, message):
    seal(folder, header_of(folder) | change)
    with pytest.raises(TeacherCacheError, match=message):
        read(folder)


def test_a_header_that_was_changed(folder):
    (folder / "cache.json").write_text(json.dumps(header_of(folder) | {"about": {"seed": "1"}}))
    with pytest.raises(TeacherCacheError, match="is not as it was written"):
        read(folder)
    (folder / "cache.json").write_text("[" * 100_000)
    with pytest.raises(TeacherCacheError, match="cannot be read"):
        read(folder)


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.nn.modules.linear.Linear", "subprocess.Popen", "__main__.x"]
)
def test_only_classes_of_distributions_are_made(folder, name):
    header = header_of(folder)
    text = json.dumps(header["kinds"]).replace("pyro.distributions.torch.Poisson", name)
    assert name in text
    seal(folder, header | {"kinds": json.loads(text)})
    with pytest.raises(TeacherCacheError, match="has a wrong one"):
        read(folder)


def test_a_large_tensor_of_few_bytes_is_not_made(folder):
    header = header_of(folder)
    for kind in header["kinds"]:
        kind[2] = {"0": [10**6, 10**6]}
    seal(folder, header)
    with pytest.raises(TeacherCacheError, match="a tensor is larger than the others"):
        read(folder)


def test_a_value_that_its_noise_does_not_make(folder):
    tensors = safetensors.torch.load_file(folder / SHARD)
    header = header_of(folder)
    file, count = folder / SHARD, header["kinds"][0][1]
    refused = 0
    for number in range(count):
        name = f"0.{number}"
        if not tensors[name].is_floating_point() or not tensors[name].numel():
            continue
        safetensors.torch.save_file(tensors | {name: tensors[name] + 1.0}, file)
        changed = tensors | {name: tensors[name] + 1.0}
        header["files"][SHARD] = file.stat().st_size
        header["draws"][0][2] = cache_files._crc32([changed[f"0.{k}"] for k in range(count)])
        seal(folder, header)
        try:
            TeacherCache(folder)[0]
        except TeacherCacheError as error:
            refused += "is not as a teacher's run leaves it" in str(error)
    assert refused >= 5  # noise, values and parameters of three latents


def test_a_distribution_whose_dimensions_are_no_number(folder, monkeypatch):
    unpacked = TeacherCache(folder)[0].unpacked
    (run,) = unpacked[2]
    fn = next(site.fn for site in run.nodes if isinstance(site.fn, torch.distributions.Independent))
    fn.reinterpreted_batch_ndims = torch.ones(2)
    monkeypatch.setattr(TeacherDraw, "unpacked", unpacked)
    with pytest.raises(
        TeacherCacheError, match="draw 0: site 'z': the dimensions of its distribution is not as a teacher's run"
    ):
        TeacherCache(folder)[0]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(TeacherCacheError, match="could not be written.*No space left.*Nothing was left"):
        write(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_no_cache(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_files.CacheWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_random_damage_is_noticed():
    found = damaged_caches.check(24, 1)
    assert found["refused"] >= 12


@pytest.mark.slow
def test_two_thousand_damaged_and_forged_caches():
    """In a process of its own, which damage could end."""
    command = [sys.executable, "-m", "tests.support.damaged_caches", "2000", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
