"""Files in a checkpoint's folder that somebody has put there: a typed error or a correct load, and nothing waits or fills the memory."""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyro_kd import errors
from pyro_kd.training.checkpoints import CheckpointFolder
from pyro_kd.training.optimiser_files import read_optimiser
from tests.support import damaged_checkpoints
from tests.support.damaged_checkpoints import FILES, NAME, seal
from tests.support.odd_files import put_in_place
from tests.support.package_files import ROOT
from tests.support.training_programs import fit, header_of


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    damaged_checkpoints.fit(folder)
    return folder / NAME


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run" / NAME)


@pytest.fixture(autouse=True)
def limited_time():
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe", "link to itself", "link to zero"])
def test_what_is_no_file_is_not_read(folder, name, kind):
    put_in_place(folder / name, kind)
    with pytest.raises(errors.CheckpointError, match=f"{name} cannot be read"):
        CheckpointFolder.read(folder)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(errors.CheckpointError):
        CheckpointFolder(folder.parent).newest()


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_the_file_that_was_written_is_read(folder, original, name):
    """As where large files are kept elsewhere. Their checksums are compared all the same."""
    put_in_place(folder / name, "link by way of the folder above")
    assert CheckpointFolder.read(folder).values == CheckpointFolder.read(original).values


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read_is_an_error(folder, name, monkeypatch):
    opened = io.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith(f"{NAME}/{name}"):
            raise PermissionError(13, "Permission denied")
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(errors.CheckpointError, match=f"{name} cannot be read .*Permission denied"):
        CheckpointFolder.read(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0", "a/../" * 1000])
def test_names_that_no_folder_can_have(name, tmp_path):
    with pytest.raises(errors.CheckpointError, match="cannot be written"):
        fit(tmp_path / name, steps=1)
    with pytest.raises(errors.CheckpointError, match="is no checkpoint of pyro_kd"):
        CheckpointFolder.read(tmp_path / name)


def test_what_lies_in_the_folder_leads_nowhere_else(tmp_path):
    """A pipe or link of the lock's name is refused, and the folder's own files are made anew."""
    outside = tmp_path / "outside"
    for kind in ("pipe", "link"):
        run = tmp_path / kind
        run.mkdir()
        if kind == "pipe":
            os.mkfifo(run / ".pyro_kd-lock")
        else:
            (run / ".pyro_kd-lock").symlink_to(outside)
        with pytest.raises(errors.CheckpointError, match="cannot be locked.*Nothing was trained"):
            fit(run, steps=1)
    assert not outside.exists()


def sealed(folder, state):
    """A checkpoint with a different state of its optimiser, and checksums that fit."""
    if isinstance(state, bytes):
        (folder / "optimiser.pt").write_bytes(state)
    else:
        torch.save(state, folder / "optimiser.pt")
    seal(folder)
    return folder


def laughs(depth=40):
    value = [0.0]
    for _ in range(depth):
        value = [value, value]
    return value


def nested(depth):
    value = 0.0
    for _ in range(depth):
        value = [value]
    return value


BOMBS = {
    "lists of one list": (lambda: {"optimiser": laughs()}, "larger than the file"),
    "lists in lists": (lambda: {"optimiser": nested(200)}, "larger than the file"),
    "one number a trillion times": (lambda: {"optimiser": torch.zeros(1).expand(10**6, 10**6)}, "larger than the file"),
    "a sparse tensor": (lambda: {"optimiser": torch.zeros(3).to_sparse()}, "an unusual kind"),
    "a tensor without values": (lambda: {"optimiser": torch.zeros(10**9, device="meta")}, "without values"),
    "many bytes": (lambda: {"optimiser": bytearray(4)}, "holds a bytearray"),
    "no mapping": (lambda: [1], "no mapping"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_state_that_is_larger_than_its_file_is_not_used(folder, name):
    make, message = BOMBS[name]
    with pytest.raises(errors.CheckpointError, match=f"not trusted: optimiser.pt .*{message}"):
        CheckpointFolder.read(sealed(folder, make()))


def test_compressed_parts_are_not_unpacked(folder):
    written, packed = io.BytesIO(), io.BytesIO()
    torch.save({"optimiser": torch.zeros(10**6)}, written)
    with zipfile.ZipFile(written) as parts, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for part in parts.infolist():
            file.writestr(part.filename, parts.read(part))
    assert len(packed.getvalue()) < len(written.getvalue()) / 100
    with pytest.raises(errors.CheckpointError, match="not trusted: optimiser.pt .*it is compressed"):
        CheckpointFolder.read(sealed(folder, packed.getvalue()))


def test_an_old_pickle_is_not_read(folder):
    with pytest.raises(errors.CheckpointError, match="not trusted: optimiser.pt .*not a zip file"):
        CheckpointFolder.read(sealed(folder, pickle.dumps({"optimiser": {}})))


def test_what_optimisers_hold_is_read(tmp_path):
    """The states of torch's and Pyro's optimisers and schedulers: counters, ordered mappings, nested states and parameters."""
    net = torch.nn.Linear(2, 2)
    optim = torch.optim.Adam(net.parameters())
    net(torch.zeros(2)).sum().backward()
    optim.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optim, [2, 3])
    state = {
        "optimiser": optim.state_dict(),
        "scheduler": scheduler.state_dict(),
        "more": OrderedDict(net.named_parameters()),
    }
    torch.save(state, tmp_path / "optimiser.pt")
    assert repr(read_optimiser(tmp_path / "optimiser.pt")) == repr(state)


WRONG_STATES = {
    "no rate": lambda state: state["optimiser"]["param_groups"][0].pop("lr"),
    "a rate that is none": lambda state: state["optimiser"]["param_groups"][0].update(lr="x"),
    "no moments": lambda state: state["optimiser"]["state"][0].pop("exp_avg"),
    "moments of a different shape": lambda state: state["optimiser"]["state"][0].update(exp_avg=torch.zeros(7, 7)),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_with_which_no_step_can_be_taken_is_an_error(folder, name):
    state = torch.load(folder / "optimiser.pt", weights_only=True)
    WRONG_STATES[name](state)
    with pytest.raises(
        errors.CheckpointError, match="optimiser's state .*its first step has failed|belongs to different parameters"
    ):
        damaged_checkpoints.fit(folder.parent, steps=6, resume=sealed(folder, state))


def test_an_error_of_an_optimiser_that_was_not_loaded_is_its_own():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(steps=2, optim=lambda params: Broken(params, lr=0.1))


def change(folder, **values):
    """Change entries of the header's values, and make the checksums fit."""
    header = header_of(folder)
    header["values"] |= values
    seal(folder, header)


@pytest.mark.parametrize("position", [-1, 625, 2**31, 2**62])
def test_a_position_beyond_the_numbers_of_a_generator_is_refused(folder, position):
    """NumPy would read whatever lies there in memory."""
    state = header_of(folder)["values"]["random"]
    state["numpy"][2] = position
    change(folder, random=state)
    with pytest.raises(errors.CheckpointError, match="random state is no state of a random generator"):
        CheckpointFolder.read(folder)


def test_more_batches_than_there_can_be_are_not_skipped(folder):
    others = {"processes": 2, "process 1 random": None, "process 1 epoch": None}
    for entries in ({"batches_taken": 10**12}, {**others, "process 1 batches_taken": 10**12}):
        change(folder, **entries)
        with pytest.raises(errors.CheckpointError, match="more batches than its steps can"):
            CheckpointFolder.read(folder)
        change(folder, batches_taken=0)
    change(folder, **{"process 1 batches_taken": 0, "process 1 order": [1]})
    with pytest.raises(errors.CheckpointError, match="its order is none"):
        CheckpointFolder.read(folder)


@pytest.mark.parametrize("name", ["random/cuda x", "random/generator sampler", "random/x"])
def test_states_of_generators_that_are_none(folder, name):
    file = folder / "state.safetensors"
    save_file(load_file(file) | {name: torch.zeros(3)}, file)
    seal(folder)
    with pytest.raises(errors.CheckpointError, match="random state is no state of a random generator"):
        CheckpointFolder.read(folder)


def test_a_gpu_that_this_machine_lacks_is_passed_over(folder):
    """A checkpoint of a machine with more GPUs."""
    file = folder / "state.safetensors"
    save_file(load_file(file) | {"random/cuda 99": torch.zeros(16, dtype=torch.uint8)}, file)
    seal(folder)
    damaged_checkpoints.fit(folder.parent, steps=6, resume=folder)


def test_a_best_student_of_a_different_shape_is_noticed_before_training(folder):
    file = folder / "state.safetensors"
    tensors = load_file(file)
    (name, *_) = [name for name in tensors if name.startswith("best/")]
    save_file(tensors | {name: torch.zeros(5)}, file)
    seal(folder)
    with pytest.raises(errors.ArchitectureMismatchError, match="the best student in .*of a different architecture"):
        damaged_checkpoints.fit(folder.parent, steps=6, resume=folder)


@pytest.mark.parametrize("devices", [[], [None], ["meta"], 7])
def test_devices_of_a_kept_draw_that_are_none(folder, devices):
    draws = header_of(folder)["values"]["draws"]
    next(place for place in draws["distillation"]["places"] if place is not None)[4] = devices
    change(folder, draws=draws)
    with pytest.raises(errors.CheckpointError, match="draws of the teacher are not as they were written"):
        damaged_checkpoints.fit(folder.parent, steps=6, resume=folder)


def test_a_kept_draw_whose_arguments_the_teacher_does_not_take(folder):
    file = folder / "state.safetensors"
    tensors = load_file(file)
    changed = {name: torch.zeros(2, 7) for name in tensors if name.startswith("draws/")}
    save_file(tensors | changed, file)
    seal(folder)
    with pytest.raises(errors.CheckpointError, match="a draw of the teacher that the checkpoint holds cannot be made again"):
        damaged_checkpoints.fit(folder.parent, steps=12, resume=folder)


def damage_at_random(count, seed):
    command = [sys.executable, "-m", "tests.support.damaged_checkpoints", str(count), str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    signal.alarm(0)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("refused") == len(FILES)


def test_damaged_and_forged_at_random():
    damage_at_random(40, 0)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_damaged_and_forged_two_thousand_times():
    damage_at_random(2000, 1)
