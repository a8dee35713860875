"""Numbers at the edge: float32 tails stay finite, and every dtype and device is kept."""

import pyro
import pytest
import torch

from pyro_kd import record_noise, replay_noise
from pyro_kd.noise.laws import Draw, NoiseLaw
from tests.support.families import FAMILIES

# The most extreme values that torch draws in float32 and float64: 2^-25 stands for 0, as NoiseLaw.UNIFORM has it.
EXTREMES = {
    (NoiseLaw.UNIFORM, torch.float32): [2.0**-25, 1 - 2.0**-24],
    (NoiseLaw.UNIFORM, torch.float64): [2.0**-54, 1 - 2.0**-53],
    (NoiseLaw.NORMAL, torch.float32): [-6.0, 6.0],
    (NoiseLaw.NORMAL, torch.float64): [-8.5, 8.5],
    (NoiseLaw.EXPONENTIAL, torch.float32): [2.0**-25, 17.0],
    (NoiseLaw.EXPONENTIAL, torch.float64): [2.0**-54, 37.0],
    (NoiseLaw.CAUCHY, torch.float32): [-1e7, 1e7],
}
NO_DENSITY = {
    "LinearHMM": "has none in Pyro",
    "GaussianScaleMixture": "takes one value at a time",
    "Empirical": "takes one value at a time",
    "SpanningTree": "takes one value at a time",
    "LKJ": "singular in float32 at such extremes",
    "Wishart": "singular in float32 at such extremes",
    "TruncatedPolyaGamma": "an alternating series, exact away from its tails",
    "RelaxedOneHotCategoricalStraightThrough": "its own clamp leaves the simplex by more than its check allows",
}


def in_type(family, dtype, device="cpu"):
    """The family in another floating point type, where it can be made in it."""
    return family.make(*[value.to(dtype).to(device) for value in family.tensors()])


def extreme(draw, share):
    values = EXTREMES.get((draw.law, draw.noise.dtype))
    if values is None:
        return draw
    values = torch.tensor(values, dtype=draw.noise.dtype)[torch.randint(2, draw.noise.shape)]
    return Draw(draw.law, torch.where(torch.rand(draw.noise.shape) < share, values, draw.noise), draw.op)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_tails_are_finite(name):
    family = FAMILIES[name]
    fn = in_type(family, torch.float32)
    size = torch.Size([256] if family.batched else [1])
    with record_noise() as noise:
        assert pyro.sample("x", fn, sample_shape=size).isfinite().all()
    for share in (0.05, 0.5, 1.0):
        with replay_noise(noise={"x": tuple(extreme(draw, share) for draw in noise["x"])}):
            value = pyro.sample("x", fn, sample_shape=size)
        assert value.isfinite().all()
        if name not in NO_DENSITY:
            assert fn.log_prob(value).isfinite().all()


def test_noise_has_no_exact_zero():
    """Once in 2^24 torch's uniform float32 is 0, where quantile functions are infinite."""
    noise = torch.cat([NoiseLaw.UNIFORM.sample([2**22], torch.bfloat16, torch.device("cpu")).float().unique()])
    assert noise.min() == 2.0**-9
    assert noise.max() < 1


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's own Wishart sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_dtype_is_kept(name, dtype):
    """Wherever the family's own sampler takes a type, ours does, and gives the same."""
    family = FAMILIES[name]
    try:
        fn = in_type(family, dtype)
        own = fn()
        usable = own.isfinite().all()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        pytest.skip(f"Pyro does not draw it in {dtype}")
    with record_noise() as noise:
        value = pyro.sample("x", fn)
    with replay_noise(noise=noise):
        again = pyro.sample("x", fn)
    assert value.dtype == own.dtype
    assert value.shape == own.shape
    assert torch.equal(value, again)
    assert not usable or value.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_device_is_kept(name, dtype):
    family = FAMILIES[name]
    try:
        fn = in_type(family, dtype, "cuda")
        own = fn()
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        pytest.skip("Pyro does not draw it on a GPU")
    with record_noise() as noise:
        value = pyro.sample("x", fn)
    with replay_noise(noise=noise):
        again = pyro.sample("x", fn)
    assert value.device == own.device  # the CPU for matchings, which Pyro draws there
    assert value.dtype == own.dtype
    assert torch.equal(value, again)
