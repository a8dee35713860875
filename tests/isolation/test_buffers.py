"""No run of a loss changes the buffers or the modes of a teacher, however the teacher uses its modules."""

import functools
import itertools
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import batchnorm
from torch import nn
from torch.nn import functional

from pyro_kd import LocalKD, bound_report, freeze, site_report, to_inference_data
from pyro_kd.isolation.modes import evaluation_mode, in_mode, keeping_buffers
from tests.support.losses import SurrogateKD


class Centre(nn.Module):
    """Follows the mean of what it sees: in train mode, by writing to its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def normalise(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.mean


class Exchanges(Centre):
    """By another tensor in place of the buffer."""

    def normalise(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


class WritesToData(Centre):
    """Where autograd does not see it, and in eval mode too."""

    def normalise(self, x):
        self.mean.data.add_(0.1 * x.mean(0))
        return x - self.mean


class Counts(Centre):
    """In eval mode too."""

    def normalise(self, x):
        self.mean += 1
        return x - self.mean


class Norm(nn.BatchNorm1d):
    """By torch's function, on the buffers of a module that is never called."""

    def __init__(self):
        super().__init__(2)

    def normalise(self, x):
        return functional.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def program(normalise, rows=16):
    def model():
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(normalise(z), 1.0).to_event(1))

    return model


GLOBAL = Centre()


def by_global(z):
    return GLOBAL.normalise(z)


class ByClass:
    centre = Centre()

    def model(self):
        return program(self.centre.normalise)()


class ByProperty:
    def __init__(self, centre):
        self._held = {"centre": [centre]}

    @property
    def centre(self):
        return self._held["centre"][0]

    def model(self):
        return program(self.centre.normalise)()


HELPERS = types.ModuleType("helpers_of_the_user")
HELPERS.centre = Centre()


def by_python_module(z):
    return HELPERS.centre.normalise(z)


def with_centre(make):
    """A program, and the module whose buffers it would move."""

    def made(kind=Centre):
        centre = kind()
        return make(centre), centre

    return made


WAYS = {
    "closure": with_centre(lambda centre: program(lambda z: centre.normalise(z))),
    "bound method in the closure": with_centre(lambda centre: program(centre.normalise)),
    "partial": with_centre(lambda centre: program(functools.partial(type(centre).normalise, centre))),
    "default argument": with_centre(lambda centre: program(lambda z, held=(centre,): held[0].normalise(z))),
    "object": with_centre(lambda centre: ByProperty(centre).model),
    "handler": with_centre(lambda centre: poutine.scale(program(centre.normalise), scale=1.0)),
    "iterator": with_centre(lambda centre: _iterated(itertools.cycle([centre]))),
    "hook": with_centre(lambda centre: _hooked(centre)),
    "global": lambda kind=Centre: (program(by_global), GLOBAL),
    "class": lambda kind=Centre: (ByClass().model, ByClass.centre),
    "Python module": lambda kind=Centre: (program(by_python_module), HELPERS.centre),
}


def _iterated(held):
    return program(lambda z: next(held).normalise(z))


def _hooked(centre):
    net = nn.Identity()
    net.register_forward_hook(lambda module, args, out: centre.normalise(out))
    return program(net)


def of(centre):
    return {name: tensor.clone() for name, tensor in centre.named_buffers()}, [m.training for m in centre.modules()]


def assert_as_it_was(module, before, tensors):
    values, modes = before
    for name, tensor in module.named_buffers():
        assert torch.equal(tensor, values[name]), name
        assert tensor is tensors[name], f"another tensor is the buffer {name}"
    assert [m.training for m in module.modules()] == modes


def student():
    return program(nn.Linear(2, 2))


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_changes_no_module_that_the_teacher_uses_without_calling(way):
    teacher, module = WAYS[way]()
    module.train()
    before, tensors = of(module), dict(module.named_buffers())
    SurrogateKD(["x"])(student(), teacher)().backward()
    assert_as_it_was(module, before, tensors)


@pytest.mark.parametrize("kind", [Centre, Exchanges, WritesToData, Counts, Norm])
def test_buffers_are_restored_however_a_run_changes_them(kind):
    teacher, module = WAYS["closure"](kind)
    before, tensors = of(module), dict(module.named_buffers())
    teacher()
    assert any(not torch.equal(tensor, before[0][name]) for name, tensor in module.named_buffers())
    teacher, module = WAYS["closure"](kind)
    before, tensors = of(module), dict(module.named_buffers())
    loss = SurrogateKD(["x"])(student(), teacher)
    for _ in range(3):
        loss().backward()
    assert_as_it_was(module, before, tensors)


USES = {
    "surrogate": lambda pair: SurrogateKD(["x"])(*pair)().backward(),
    "local": lambda pair: LocalKD(["x"])(*pair)().backward(),
    "particles": lambda pair: SurrogateKD(["x"], num_particles=2)(*pair)().backward(),
    "vectorized particles": lambda pair: SurrogateKD(["x"], num_particles=2, vectorize_particles=True)(*pair),
    "a number": lambda pair: SurrogateKD(["x"]).loss(*pair),
    "terms": lambda pair: SurrogateKD(["x"]).terms(*pair),
    "site_report": lambda pair: site_report(SurrogateKD(["x"]), *pair, num_samples=2),
    "bound_report": lambda pair: bound_report(*pair, ["x"], num_samples=2),
    "to_inference_data": lambda pair: to_inference_data(SurrogateKD(["x"]), *pair, num_samples=2),
}


@pytest.mark.parametrize("use", USES)
def test_buffers_are_restored_in_every_use_of_a_loss(use):
    teacher, module = WAYS["closure"](Counts)
    before, tensors = of(module), dict(module.named_buffers())
    USES[use]((student(), teacher))
    assert_as_it_was(module, before, tensors)


def flow_program(flow):
    def model():
        with pyro.plate("rows", 16):
            z = pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.ones(2), 1.0).to_event(1), [flow]))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    return model


@pytest.mark.parametrize("use", USES)
def test_a_batch_norm_in_the_teachers_flow_is_restored(use):
    """It moves when it draws and when its density is evaluated, by the divergence."""
    flow, other = batchnorm(2), batchnorm(2)
    before, tensors = of(flow), dict(flow.named_buffers())
    USES[use]((flow_program(other), flow_program(flow)))
    assert_as_it_was(flow, before, tensors)
    assert other.training


def test_the_students_flow_stays_in_train_mode():
    """Its statistics move as they do without a teacher; what is only looked at moves nothing."""
    flow, other = batchnorm(2), batchnorm(2)
    SurrogateKD(["x"])(flow_program(other), flow_program(flow))().backward()
    assert not torch.equal(other.moving_mean, torch.zeros(2))
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    SurrogateKD(["x"])(program(net), student())().backward()
    assert net[1].num_batches_tracked == 1


def test_a_frozen_teacher_in_train_mode_does_not_change():
    norm = nn.BatchNorm1d(2)
    frozen = freeze(program(lambda z: norm(z)), keep_modes=True)
    (copied,) = frozen.modules_held
    before, tensors = of(copied), dict(copied.named_buffers())
    for _ in range(3):
        SurrogateKD(["x"])(student(), frozen)().backward()
    assert copied.training
    assert_as_it_was(copied, before, tensors)
    flow = freeze(flow_program(batchnorm(2)), keep_modes=True)
    copied = flow.modules_held[0]
    before, tensors = of(copied), dict(copied.named_buffers())
    SurrogateKD(["x"])(flow_program(batchnorm(2)), flow)().backward()
    assert_as_it_was(copied, before, tensors)


def test_a_frozen_teacher_that_counts_in_eval_mode_starts_every_run_equally():
    centre = Counts()
    frozen = freeze(program(centre.normalise))
    draws = []
    for _ in range(3):
        pyro.set_rng_seed(0)
        draws.append(poutine.trace(frozen).get_trace().nodes["x"]["value"])
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_evaluation_mode_finds_modules_that_the_run_makes():
    def model():
        norm = nn.BatchNorm1d(2)
        norm(torch.randn(4, 2))
        return norm

    with evaluation_mode(model):
        norm = model()
        assert norm.num_batches_tracked == 0
    assert norm.training


def test_modes_and_buffers_return_after_an_error():
    centre = Counts()
    with pytest.raises(RuntimeError, match="mine"), in_mode(False, [centre]), keeping_buffers([centre]):
        centre.normalise(torch.ones(1, 2))
        assert not centre.training
        raise RuntimeError("mine")
    assert centre.training
    assert torch.equal(centre.mean, torch.zeros(2))
