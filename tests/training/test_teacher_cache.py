"""A cache of a teacher's draws: what a loss computes on them, how training reads them, and what is refused."""

import pickle
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader

from pyro_kd import (
    Distiller,
    LocalKD,
    MarginalKD,
    MultiSampleKD,
    OnPolicyKD,
    SurrogateKD,
    TeacherCache,
    cache_teacher,
    freeze,
)
from pyro_kd.errors import (
    CheckpointError,
    InvalidProgramError,
    RunMismatchError,
    TeacherCacheError,
    UnknownTargetError,
)
from pyro_kd.losses.reuse import seeded
from pyro_kd.training import Checkpoints, cache_files
from pyro_kd.training.structures import decoded, encoded
from pyro_kd.training.teacher_cache import _seed
from tests.support.families import FAMILIES
from tests.support.second_device import SECOND, two_devices
from tests.support.training_programs import adam


def teacher(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        n = pyro.sample("n", dist.Poisson(z.exp()))
        pyro.sample("y", dist.LogNormal(z + 0.1 * n, 0.5))


def student(x):
    a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x + b, 1.0))
        n = pyro.sample("n", dist.Poisson((a * z).exp()))
        pyro.sample("y", dist.LogNormal(a * z + 0.1 * n, 0.5))


def rows(count=24, size=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def written(folder, batches=None, **options):
    return cache_teacher(
        freeze(teacher), path=folder, batches=rows(6) if batches is None else batches, targets=["y"], **options
    )


LOSSES = {
    "surrogate": partial(SurrogateKD, ["y"]),
    "noise alone": partial(SurrogateKD, ["y"], teacher_forcing=0.0, latent_weight=0.1),
    "local": partial(LocalKD, ["y"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_on_a_draw_is_the_loss_on_the_teacher_with_its_seed(tmp_path, name):
    """Bit for bit: value and gradient."""
    cache, batches, loss = written(tmp_path / "cache"), rows(6), LOSSES[name]()
    for index in (3, 0):
        found = loss.loss_and_grads(student, cache.teacher, cache[index])
        params = [pyro.get_param_store()._params[name] for name in ("a", "b")]
        gradients = [param.grad.clone() for param in params]
        for param in params:
            param.grad = None
        live = LOSSES[name]()
        live.loss(student, teacher, batches[index])  # what a first call finds out
        with seeded(_seed(0, index)):
            assert live.loss_and_grads(student, teacher, batches[index]) == found
        assert all(torch.equal(param.grad, gradient) for param, gradient in zip(params, gradients, strict=True))
        for param in params:
            param.grad = None


def test_terms_of_a_draw(tmp_path):
    cache = written(tmp_path / "cache")
    assert set(SurrogateKD(["y"], latent_weight=0.1).terms(student, cache.teacher, cache[0])) == {"z", "n", "y"}


@pytest.mark.usefixtures("float64")
def test_every_family_without_a_function_is_written():
    from pyro_kd.losses.packing import pack, unpack
    from pyro_kd.training.structures import UnknownPartError

    for name, family in FAMILIES.items():
        structure, tensors = pack(family())
        if name == "Rejector":
            with pytest.raises(UnknownPartError, match="function"):
                encoded(structure)
            continue
        again = decoded(encoded(structure), len(tensors))
        assert again == structure, name
        assert type(unpack(again, tensors)) is type(family()), name


def train(cache, steps=30, *, compile=False, workers=0, **options):
    pyro.clear_param_store()
    distiller = Distiller(student, cache.teacher, adam, SurrogateKD(["y"], teacher_forcing=0.5), compile=compile)
    distiller.fit(batches=cache.loader(num_workers=workers, seed=3), steps=steps, seed=1, progress=False, **options)
    return distiller.history["loss"], pyro.param("a").item(), pyro.param("b").item()


def test_training_on_a_cache_brings_the_student_to_the_teacher(tmp_path):
    cache = written(tmp_path / "cache", rows(20, 16))
    _, a, b = train(cache, 200)
    assert abs(a - 1) < 0.1
    assert abs(b) < 0.1


def test_workers_and_graphs_give_the_same_training(tmp_path):
    cache = written(tmp_path / "cache")
    plain = train(cache)
    assert train(cache, workers=2) == plain
    torch.testing.assert_close(train(cache, compile={"backend": None}), plain)


@pytest.mark.parametrize("compile", [False, {"backend": None}], ids=["eager", "compiled"])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, compile):
    cache = written(tmp_path / "cache")
    whole = train(cache, compile=compile)
    train(cache, 13, compile=compile, checkpoints=Checkpoints(tmp_path / "run", every=5))
    assert train(cache, compile=compile, checkpoints=tmp_path / "run", resume=True) == whole


def test_a_run_does_not_resume_on_a_different_cache(tmp_path):
    train(written(tmp_path / "one"), 5, checkpoints=tmp_path / "run")
    with pytest.raises(RunMismatchError, match="distillation: teacher.identity"):
        train(written(tmp_path / "two", seed=1), 8, checkpoints=tmp_path / "run", resume=True)


def test_draws_have_seeds_of_their_own(tmp_path):
    one, other = written(tmp_path / "one", [rows(1)[0]] * 3), written(tmp_path / "two", [rows(1)[0]] * 3, seed=1)
    again = written(tmp_path / "three", [rows(1)[0]] * 3)
    draws = [tuple(map(tuple, (t.flatten().tolist() for t in draw.tensors))) for cache in (one, other) for draw in cache]
    assert len(set(draws)) == 6
    assert all(torch.equal(a, b) for x, y in zip(one, again, strict=True) for a, b in zip(x.tensors, y.tensors, strict=True))


def test_writing_leaves_the_random_state_and_holds_a_few_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_files, "_SHARD_DRAWS", 2)
    before = torch.get_rng_state()
    cache = written(tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)
    assert [file.name for file in sorted((tmp_path / "cache").glob("draws-*"))] == [
        f"draws-0000{k}.safetensors" for k in range(3)
    ]
    assert len(list(cache)) == 6


def test_ranks_share_the_draws(tmp_path, monkeypatch):
    cache, order = written(tmp_path / "cache"), {}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        loader = cache.loader()
        order[rank] = [number for _ in range(2) for number in loader.sampler]
        assert len(loader) == 1
    for epoch in range(2):
        assert len({numbers[epoch] for numbers in order.values()}) == 4
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 7)
    with pytest.raises(TeacherCacheError, match="6 draws cannot be shared by 7 processes"):
        len(cache.loader())


def test_a_data_loader_of_the_users_own(tmp_path):
    cache = written(tmp_path / "cache")
    pickle.loads(pickle.dumps(cache))
    draws = list(DataLoader(cache, batch_size=None, num_workers=1))
    assert len(draws) == 6
    assert torch.equal(draws[2].call[0][0], rows(6)[2])
    assert draws[0].to("cpu").structure == draws[0].structure
    with pytest.raises(IndexError):
        cache[6]


def test_evaluation_on_draws_that_training_has_not_seen(tmp_path):
    cache, fresh = written(tmp_path / "one"), written(tmp_path / "two", seed=1)
    distiller = Distiller(student, cache.teacher, adam, SurrogateKD(["y"]))
    with pytest.warns(UserWarning, match="each draw of the teacher serves about 20 steps.*6 draws: write more"):
        distiller.fit(batches=cache.loader(), steps=120, progress=False)
    assert distiller.evaluate(batches=fresh.loader()).loss.mean > 0


def test_too_much_reuse_brings_a_warning():
    pyro.clear_param_store()
    distiller = Distiller(student, freeze(teacher), adam, SurrogateKD(["y"]), reuse=32)
    with pytest.warns(UserWarning, match="serves about 32 steps.*Take a smaller reuse, such as 8"):
        distiller.fit(torch.zeros(2), steps=2, progress=False)


REFUSED = {
    "MarginalKD": (lambda: MarginalKD(["y"]), "runs the teacher on all states"),
    "MultiSampleKD": (lambda: MultiSampleKD(["y"]), "several samples of the teacher's noise"),
    "OnPolicyKD": (lambda: OnPolicyKD(["y"]), "histories that the student draws"),
    "particles": (lambda: SurrogateKD(["y"], num_particles=2), "num_particles=2 asks for further draws"),
    "boundary": (lambda: SurrogateKD(["y"], discrete_gradient="boundary"), "runs the teacher on changed noise"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_needs_the_teacher_says_so(tmp_path, name):
    cache = written(tmp_path / "cache", rows(1))
    make, message = REFUSED[name]
    for run in (make().loss, make().loss_and_grads, make().terms):
        with pytest.raises(InvalidProgramError, match=f"needs the teacher, which is not in memory: .*{message}"):
            run(student, cache.teacher, cache[0])


def test_other_arguments_than_a_draw(tmp_path):
    cache = written(tmp_path / "cache", rows(1))
    with pytest.raises(InvalidProgramError, match="the call has no draw of it.*cache.loader"):
        SurrogateKD(["y"]).loss(student, cache.teacher, rows(1)[0])
    with pytest.raises(TypeError, match="is the only argument of a loss"):
        SurrogateKD(["y"]).loss(student, teacher, cache[0], 3)
    with pytest.raises(UnknownTargetError, match="drawn from with targets 'y'.*loss has targets 'z'.*cache_teacher"):
        SurrogateKD(["z"]).loss(student, cache.teacher, cache[0])


def sample(fn):
    return lambda *args: pyro.sample("x", fn)


class Own(dist.Normal):
    pass


ONCE = dist.Normal(0.0, 1.0)
UNWRITABLE = {
    "own class": (sample(Own(0.0, 1.0)), {}, "site 'x': its distribution is or holds a .*Own.*reuse=m"),
    "module": (
        sample(dist.TransformedDistribution(ONCE.expand([2]).to_event(1), [dist.transforms.affine_autoregressive(2)])),
        {},
        "site 'x': its distribution is or holds a .*AffineAutoregressive",
    ),
    "no targets": (sample(ONCE), {"targets": None}, "no targets found.*targets="),
    "no batches": (sample(ONCE), {"batches": []}, "no batch to draw for"),
    "argument": (sample(ONCE), {"batches": [[{1, 2}]]}, "an argument of the teacher is or holds a builtins.set"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_cannot_be_written(tmp_path, name):
    program, options, message = UNWRITABLE[name]
    with pytest.raises(TeacherCacheError, match=message):
        cache_teacher(program, path=tmp_path / "cache", **({"batches": 2, "targets": ["x"]} | options))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(TeacherCacheError, match="exists, and nothing is written over it"):
        written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_arguments_and_batches():
    for options in ({"batches": rows(2)}, {"batches": True}, {"batches": 0}):
        with pytest.raises((TypeError, ValueError), match="batches"):
            cache_teacher(teacher, rows(1)[0], path="never", targets=["y"], **options)


def test_a_cache_of_another_teacher(tmp_path):
    written(tmp_path / "cache", rows(1))
    assert len(TeacherCache(tmp_path / "cache", teacher=freeze(teacher))) == 1
    with pytest.raises(TeacherCacheError, match="a cache of a different teacher. What differs: teacher"):
        TeacherCache(tmp_path / "cache", teacher=freeze(student))


class Line(torch.nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([slope]))

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(self.slope * x, 0.5))


@pytest.mark.parametrize("device", [SECOND, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
def test_draws_of_a_checkpoint_are_where_they_were(tmp_path, device):
    """A checkpoint has its tensors on the CPU, and the arguments of the draws return to the device of the fit."""

    def fit(steps, folder):
        loss = SurrogateKD(["y"], reuse=2, teacher_forcing=0.0)
        distiller = Distiller(Line(0.0), freeze(Line(1.0)), adam, loss, device=device)
        checkpoints = {"checkpoints": Checkpoints(folder, every=2), "resume": True}
        torch.manual_seed(0)
        distiller.fit(batches=list(torch.randn(4, 3)), steps=steps, seed=0, progress=False, **checkpoints)
        return distiller.history["loss"], distiller.objectives["distillation"].pool

    with two_devices() if device == SECOND else nullcontext():
        undisturbed, _ = fit(9, tmp_path / "one")
        fit(5, tmp_path / "two")
        resumed, pool = fit(9, tmp_path / "two")
        assert {place.call[0][0].device.type for place in pool.places} == {device.type}
    assert resumed == undisturbed


def test_a_checkpoint_with_reuse_says_what_it_cannot_hold(tmp_path):
    distiller = Distiller(
        lambda s: student(torch.zeros(2)), lambda s: teacher(torch.zeros(2)), adam, SurrogateKD(["y"]), reuse=2
    )
    with pytest.raises(CheckpointError, match="with reuse a checkpoint holds the arguments.*builtins.set"):
        distiller.fit({1}, steps=2, progress=False, checkpoints=tmp_path)


@pytest.mark.parametrize("compile", [False, {"backend": None}], ids=["eager", "compiled"])
def test_a_resumed_run_with_reuse_is_the_undisturbed_one(tmp_path, compile):
    def fit(steps, **options):
        pyro.clear_param_store()
        loss = SurrogateKD(["y"], teacher_forcing=0.5)
        distiller = Distiller(student, freeze(teacher), adam, loss, reuse=3, compile=compile, log_every=7)
        loader = DataLoader(torch.randn(40, generator=torch.Generator().manual_seed(0)), batch_size=4, shuffle=True)
        distiller.fit(batches=loader, steps=steps, seed=1, progress=False, **options)
        return distiller.history["loss"], pyro.param("a").item()

    whole = fit(40)
    fit(23, checkpoints=Checkpoints(tmp_path, every=7))
    assert fit(40, checkpoints=tmp_path, resume=True) == whole


def test_caches_of_one_teacher_on_different_arguments_are_different(tmp_path):
    first, again = written(tmp_path / "first"), written(tmp_path / "again")
    other = written(tmp_path / "other", [x + 1.0 for x in rows(6)])
    assert first.teacher.identity == again.teacher.identity
    assert first.teacher.identity != other.teacher.identity
