"""Descriptions of exported programs, and the noise that NumPy draws for them."""

import json

import numpy as np
import pytest

from pyro_kd.errors import CorruptExportError
from pyro_kd.export import Description, NoiseInput, Value, draw_noise
from pyro_kd.noise.laws import NoiseLaw

LAWS = {"normal": (0.0, 1.0), "uniform": (0.5, 12**-0.5), "exponential": (1.0, 1.0)}


def description(law="normal", shape=("rows", 3), dtype="float32"):
    return Description(
        "sampler",
        "model",
        (NoiseInput("z/a", shape, dtype, "z", law),),
        (Value("x", ("rows",), "float64"),),
        (Value("y", (), "int64"),),
    )


def test_a_description_survives_json():
    assert Description.from_json(description().to_json()) == description()
    assert description().has_rows


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_has_its_law_shape_and_type(law, dtype):
    noise = draw_noise(description(law, dtype=dtype), 20_000, np.random.default_rng(0))["z/a"]
    assert noise.shape == (20_000, 3)
    assert noise.dtype == dtype
    mean, deviation = LAWS[law]
    assert abs(noise.mean() - mean) < 4.5 * deviation / 60_000**0.5
    if law == "uniform":
        assert noise.min() > 0
        assert noise.max() < 1


def test_every_law_can_be_drawn():
    for law in NoiseLaw:
        name = law.name.lower()
        dtype = "int64" if law is NoiseLaw.PERMUTATION else "float64"
        noise = draw_noise(description(name, (7,), dtype), 3, np.random.default_rng(0))["z/a"]
        assert noise.shape == (7,)
    assert sorted(noise) == list(range(7))


def test_a_uniform_is_never_rounded_to_an_end():
    class Ends:
        def random(self, shape):
            return np.array([0.0, 1 - 2.0**-53])

    noise = draw_noise(description("uniform", (2,)), 1, Ends())["z/a"]
    assert noise[0] > 0
    assert noise[1] < 1


@pytest.mark.parametrize(
    "change",
    [
        {"format": "pyro_kd export 0"},
        {"kind": "program"},
        {"noise": 3},
        {"noise": [{"name": "z"}]},
        {"program": None},
        {"inputs": [{"name": "z/a", "shape": [1], "dtype": "float32"}]},
        {"inputs": [{"name": "x", "shape": ["columns"], "dtype": "float32"}]},
        {"inputs": [{"name": "x", "shape": [-1], "dtype": "float32"}]},
        {"inputs": [{"name": "x", "shape": [1.5], "dtype": "float32"}]},
        {"inputs": [{"name": "x", "shape": [1], "dtype": "object"}]},
    ],
)
def test_a_damaged_description_is_refused(change):
    text = json.dumps({**json.loads(description().to_json()), **change})
    with pytest.raises(CorruptExportError, match="the description of the exported program is damaged"):
        Description.from_json(text)


def test_what_is_no_description_is_refused():
    for text in ("", "[]", "{}", "null", "[" * 100_000, b"\xff"):
        with pytest.raises(CorruptExportError):
            Description.from_json(text)
