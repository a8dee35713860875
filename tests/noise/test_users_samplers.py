"""The samplers of users' distributions: registered, direct, or left to the tape, and refused where noise cannot be shared."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import record_noise, register_sampler, replay_noise
from pyro_kd.errors import UnsupportedNoiseError
from pyro_kd.noise.samplers import DIRECT
from pyro_kd.noise.tape import NoiseTape


@pytest.mark.parametrize("family", DIRECT, ids=lambda family: family.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_direct_samplers_equal_the_tape(family, dtype):
    """The two families that skip the dispatch mode give the tape's draws and values, bit for bit."""
    params = {
        dist.Normal: (torch.randn(50, dtype=dtype), torch.rand(50, dtype=dtype)),
        dist.Bernoulli: (torch.rand(50, dtype=dtype),),
    }
    fn = family(*params[family])
    with record_noise() as noise:
        direct = pyro.sample("x", fn)
    with NoiseTape(noise["x"]) as tape:
        through_tape = fn()
    assert direct.dtype == through_tape.dtype == dtype
    assert torch.equal(direct, through_tape)
    pyro.set_rng_seed(5)
    with NoiseTape() as tape:
        fn()
    pyro.set_rng_seed(5)
    with record_noise() as noise:
        pyro.sample("x", fn)
    assert [d.law for d in tape.draws] == [d.law for d in noise["x"]]
    assert torch.equal(tape.draws[0].noise, noise["x"][0].noise)


def test_a_users_distribution_with_rsample_needs_no_registration():
    class Triangular(dist.TorchDistribution):
        arg_constraints = {}
        has_rsample = True

        def __init__(self, width):
            self.width = width
            super().__init__(width.shape, torch.Size(), validate_args=False)

        def rsample(self, sample_shape=()):
            u, v = torch.rand(2, *sample_shape, *self.batch_shape)
            return self.width * (u - v)

    with record_noise() as noise:
        x = pyro.sample("x", Triangular(torch.ones(4)))
    with replay_noise(noise=noise):
        assert torch.allclose(pyro.sample("x", Triangular(torch.full((4,), 3.0))), 3 * x)


def test_a_sampler_that_changes_its_draw_in_place_leaves_the_record_alone():
    class InPlace(dist.TorchDistribution):
        arg_constraints = {}

        def sample(self, sample_shape=()):
            return torch.rand(4).mul_(2.0).add_(1.0)

    fn = InPlace(torch.Size([4]), torch.Size(), validate_args=False)
    with record_noise() as noise:
        x = pyro.sample("x", fn).clone()
    for _ in range(2):
        with replay_noise(noise=noise):
            assert torch.equal(pyro.sample("x", fn), x)


def test_register_sampler_replaces_a_rejection_loop():
    class Loop(dist.TorchDistribution):
        arg_constraints = {}
        has_rsample = True

        def __init__(self, top):
            self.top = top
            super().__init__(top.shape, torch.Size(), validate_args=False)

        def rsample(self, sample_shape=()):
            raise AssertionError("the registered sampler is used instead")

        def log_prob(self, value):
            return -self.top.log()

    @register_sampler(Loop)
    def sample_loop(fn, sample_shape):
        return fn.top * torch.rand(sample_shape + fn.batch_shape)

    with record_noise() as noise:
        x = pyro.sample("x", Loop(torch.ones(4)))
    with replay_noise(noise=noise):
        y = pyro.sample("x", Loop(torch.full((4,), 2.0, requires_grad=True)))
    assert torch.allclose(y, 2 * x)
    assert y.requires_grad


def test_switching_has_rsample_off_stops_gradients():
    loc = torch.zeros(3, requires_grad=True)
    with record_noise():
        assert pyro.sample("x", dist.Normal(loc, 1.0)).requires_grad
        assert not pyro.sample("y", dist.Normal(loc, 1.0).has_rsample_(False)).requires_grad
        assert not pyro.sample("z", dist.Gamma(loc.exp(), 1.0).has_rsample_(False)).requires_grad


def test_the_registry_comes_before_the_direct_samplers():
    from pyro_kd.noise import samplers

    saved = dict(samplers.DIRECT), dict(samplers._SAMPLERS)
    try:
        register_sampler(dist.Normal)(
            lambda fn, sample_shape: torch.zeros(sample_shape + fn.batch_shape) + 7 * torch.rand(()).ceil()
        )
        with record_noise():
            assert pyro.sample("x", dist.Normal(0.0, 1.0)) == 7
    finally:
        for table, entries in zip((samplers.DIRECT, samplers._SAMPLERS), saved, strict=True):
            table.clear()
            table.update(entries)


class HoldsADirichlet(dist.TorchDistribution):
    """A user's family with torch's Dirichlet inside: as an attribute in a list, or made on the fly."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, concentration, as_attribute):
        self.concentration = concentration
        self.parts = [dist.Dirichlet(concentration)] if as_attribute else []
        super().__init__(torch.Size(), concentration.shape, validate_args=False)

    def rsample(self, sample_shape=()):
        fn = self.parts[0] if self.parts else torch.distributions.Dirichlet(self.concentration)
        return fn.rsample(sample_shape)


def test_a_dirichlet_inside_a_users_family_shares_noise_or_is_refused(float64):
    """Found in a list of its attributes, and given the right derivative; else its derivative would be wrong, and it says so."""
    weights, direction = torch.tensor([2.0, 0.7, 1.5], requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    with record_noise() as noise:
        pyro.sample("x", HoldsADirichlet(weights.detach(), as_attribute=True))

    def value(w):
        with replay_noise(noise=noise):
            return (pyro.sample("x", HoldsADirichlet(w, as_attribute=True)) * direction).sum()

    (gradient,) = torch.autograd.grad(value(weights), weights)
    steps = 1e-5 * torch.eye(3)
    with torch.no_grad():
        numerical = torch.stack([(value(weights + step) - value(weights - step)) / 2e-5 for step in steps])
    assert torch.allclose(gradient, numerical, atol=1e-3)
    with record_noise(), pytest.raises(UnsupportedNoiseError, match="site 'x': HoldsADirichlet.*different map"):
        pyro.sample("x", HoldsADirichlet(weights, as_attribute=False))
    with record_noise(), torch.no_grad():
        pyro.sample("x", HoldsADirichlet(weights, as_attribute=False))


def test_a_sampler_that_torch_cannot_see_is_refused():
    class FromNumpy(dist.TorchDistribution):
        arg_constraints = {}

        def sample(self, sample_shape=()):
            import random

            return torch.tensor(random.random())

    with record_noise(), pytest.raises(UnsupportedNoiseError, match="site 'z': FromNumpy draws nothing.*random or numpy"):
        pyro.sample("z", FromNumpy(torch.Size(), torch.Size(), validate_args=False))


def test_an_operation_without_a_map_is_refused():
    class Odd(dist.TorchDistribution):
        arg_constraints = {}

        def sample(self, sample_shape=()):
            return torch.ops.aten.exponential(torch.ones(3))  # no public function of torch calls it

    with record_noise(), pytest.raises(UnsupportedNoiseError, match="site 'z': Odd cannot share noise.*exponential"):
        pyro.sample("z", Odd(torch.Size(), torch.Size([3]), validate_args=False))
