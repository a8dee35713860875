"""Error accumulation: exact laws of chains, and the smoke preset."""

import functools
import json
import math

import pyro
import pytest
import torch
from torch import distributions as D

from examples import error_accumulation as example
from models.chains import BinomialChain, BinomialStudent, BitChain, NormalChain, NormalStudent
from pyro_kd import LocalKD, freeze
from pyro_kd.divergences import wasserstein2
from tests.support.losses import SurrogateKD

SMALL = [
    "--preset",
    "smoke",
    "--normal-layers",
    "2",
    "--binomial-layers",
    "2",
    "--bit-layers",
    "2",
    "--steps",
    "4",
    "--sample-rows",
    "200",
]


@pytest.fixture(autouse=True)
def no_parameters():
    pyro.clear_param_store()


class Linear(NormalChain):
    """z_{i+1} ~ N(a z_i + b, scale^2)."""

    def __init__(self, layers, a, b, scale):
        super().__init__(layers, scale=scale)
        self.a, self.b = a, b

    def transition(self, layer, z):
        return D.Normal(self.a * z + self.b, self.scale)


def uniform_plus_normal(grid, half_width, mean, scale):
    """Density of U[-w, w] + N(mean, scale^2)."""
    normal = D.Normal(torch.tensor(mean, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    return (normal.cdf(grid + half_width) - normal.cdf(grid - half_width)) / (2 * half_width)


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_law_of_a_linear_chain(layers):
    """A uniform variable plus a normal one, in closed form."""
    a, b, scale = 0.9, 0.05, 0.1
    law = example.normal_law(Linear(layers, a, b, scale), points=601, reach=3.0)
    grid, spacing = torch.linspace(-3, 3, 601, dtype=torch.float64), 6 / 600
    mean = b * sum(a**i for i in range(layers))
    deviation = scale * math.sqrt(sum(a ** (2 * i) for i in range(layers)))
    exact = uniform_plus_normal(grid, a**layers, mean, deviation) * spacing
    assert torch.allclose(law, exact, rtol=1e-8, atol=1e-12)


def test_kl_of_linear_chains():
    """Two chains whose last states are close to N(m, s^2): the uniform start is forgotten."""
    p, q = Linear(30, 0.5, 0.0, 0.1), Linear(30, 0.5, 0.02, 0.12)
    found = example.kl_of_laws(*(example.normal_law(chain, points=601, reach=3.0) for chain in (p, q)))
    variance = sum(0.25**i for i in range(30))
    normal = [D.Normal(0.0, 0.1 * variance**0.5), D.Normal(0.02 * sum(0.5**i for i in range(30)), 0.12 * variance**0.5)]
    assert found == pytest.approx(D.kl_divergence(*normal).item(), rel=1e-5)


@pytest.mark.parametrize("layers", [1, 20])
def test_the_grid_of_the_cpu_preset_is_fine_enough(layers):
    """Half the points give the same KL, and hardly any probability lies beyond the grid."""
    torch.manual_seed(0)
    settings = example.PRESETS["cpu"]
    teacher = NormalChain(layers, settings.power, settings.scale)
    student = NormalStudent(layers, settings.width, settings.scale, identity=True)
    found = []
    for points in (settings.grid, settings.grid // 2 + 1):
        p, q = (example.normal_law(chain, points, settings.reach) for chain in (teacher, student))
        assert float(p.sum()) == pytest.approx(1, abs=1e-4)
        assert float(q.sum()) == pytest.approx(1, abs=1e-4)
        found.append(example.kl_of_laws(p, q))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (functools.partial(NormalChain, 4), functools.partial(example.normal_law, points=801, reach=4.0)),
        (
            functools.partial(NormalStudent, 4, learn_scale=True),
            functools.partial(example.normal_law, points=801, reach=4.0),
        ),
        (functools.partial(BinomialChain, 3, count=20), example.binomial_law),
        (functools.partial(BinomialStudent, 3, count=20), example.binomial_law),
    ],
    ids=["normal teacher", "normal student", "binomial teacher", "binomial student"],
)
def test_the_law_is_that_of_samples(make, law):
    """Counts in 20 intervals of the states, within 5 standard errors."""
    rows = 50_000
    chain = make()
    probs = law(chain)
    with torch.no_grad():
        y = chain.model(rows).double()
    index = (y + 4.0) / (8.0 / 800) if len(probs) == 801 else y
    index = index.round().long().clamp(0, len(probs) - 1)
    size = len(probs) // 20
    expected = torch.stack([part.sum() for part in probs.split(size)])
    found = torch.bincount(index // size, minlength=len(expected)).double() / rows
    error = (expected * (1 - expected) / rows).sqrt()
    assert ((found - expected).abs() <= 5 * error + 2 / rows).all()


def test_equal_chains_have_no_divergence():
    for law, chain in ((example.normal_law, NormalStudent(3)), (example.binomial_law, BinomialStudent(3, count=50))):
        p = law(chain)
        assert example.kl_of_laws(p, law(chain)) == pytest.approx(0, abs=1e-12)
        assert float(p.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", example.FAMILIES)
def test_both_bounds_are_above_the_exact_kl(family):
    settings, rows = example.PRESETS["smoke"], 20_000
    case = example.families(settings)[family]
    teacher, student = freeze(case.teacher(3).model), case.student(3)
    exact = example.kl_of_laws(case.law(case.teacher(3)), case.law(student))
    for loss in (SurrogateKD(["y"], latent_weight=0.0), LocalKD(["y"])):
        parts = torch.tensor([loss.loss(student.model, teacher, rows // 20) / (rows // 20) for _ in range(20)])
        assert parts.mean() + 5 * parts.std() / 20**0.5 > exact


def test_the_local_loss_is_the_same_for_kl_and_squared_distance():
    """At equal scales s the KL of a transition is the squared 2-Wasserstein distance over 2 s^2."""
    teacher, student = freeze(NormalChain(3).model), NormalStudent(3)
    values = []
    for options in ({}, {"divergence": wasserstein2, "latent_divergence": wasserstein2}):
        pyro.set_rng_seed(0)
        values.append(LocalKD(["y"], **options).loss(student.model, teacher, 10))
    assert values[0] == pytest.approx(values[1] / (2 * 0.1**2), rel=1e-4)


def test_depth_passes_no_gradient_through_counts():
    """On counts every lambda but 0 is the same: each layer has only the gradient of its own term."""
    teacher, student = freeze(BinomialChain(3, count=50).model), BinomialStudent(3, count=50)
    gradients = []
    for weight in (1.0, 0.1, 0.0):
        student.zero_grad()
        pyro.set_rng_seed(0)
        SurrogateKD(["y"], latent_weight=weight).loss_and_grads(student.model, teacher, 10)
        gradients.append([0 if p.grad is None else p.grad.clone() for net in student.networks for p in net.parameters()])
    for one, tenth, none in list(zip(*gradients, strict=True))[:8]:
        assert torch.allclose(one, 10 * tenth)
        assert torch.equal(torch.as_tensor(none), torch.zeros_like(torch.as_tensor(none)))
    for one, tenth, none in list(zip(*gradients, strict=True))[8:]:
        assert torch.equal(one, tenth)
        assert torch.equal(one, none)


def test_the_smoke_preset_runs(tmp_path, capsys):
    results = example.main([*SMALL, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    picture = (tmp_path / "out" / "error_accumulation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000
    run = results["runs"][0]
    for family in example.FAMILIES:
        assert family in printed
        assert run[family]["layers"] == [2]
        for figures in run[family]["models"].values():
            sampled = {"ratio", "counted"} if family != "bits" else set()  # samples of bits are not samples of numbers
            keys = {key for key in example.MEASURES if key not in {"ratio", "counted"} or key in sampled}
            assert set(figures) == {f"{key} 2" for key in keys}
            assert all(math.isfinite(value) for value in figures.values())
            assert min(figures["kl 2"], figures["surrogate 2"], figures["local 2"]) > -1e-3


def test_the_law_of_a_chain_of_bits_is_that_of_its_samples():
    torch.manual_seed(0)
    chain = BitChain(3, bits=3, width=4, gain=2.0)
    law = example.bit_law(chain)
    assert float(law.sum()) == pytest.approx(1.0)
    with torch.no_grad():
        y = chain.model(100_000)
    counts = torch.bincount((y @ torch.tensor([4.0, 2.0, 1.0])).long(), minlength=8)
    assert ((counts / 100_000 - law).abs() < 5 * (law * (1 - law) / 100_000).sqrt()).all()


def test_a_learned_scale_adds_the_squared_distance():
    settings = example.ErrorAccumulationSettings(learn_scale=True)
    assert "local, W2" in example.families(settings)["continuous"].methods
    assert "local, W2" not in example.families(example.PRESETS["cpu"])["continuous"].methods


def test_the_demo_runs_three_students_of_one_chain():
    found = example.families(example.PRESETS["demo"])
    assert {title: list(family.methods) for title, family in found.items()} == {
        "continuous": ["local", "surrogate (ours), lambda 1", "local first (ours), 1/4"]
    }


@pytest.mark.parametrize("wrong", [{"families": ("reals",)}, {"methods": ("reals",)}])
def test_an_unknown_chain_or_method_is_an_error(wrong):
    with pytest.raises(ValueError, match="no such chain or method: reals"):
        example.families(example.ErrorAccumulationSettings(**wrong))
