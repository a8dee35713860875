"""ArviZ objects of teacher and student: shared noise, names of sites, samplers, both versions of ArviZ."""

import functools
import sys
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import LocalKD, freeze
from pyro_kd.diagnosis.arviz_adapter import import_arviz, to_arviz
from pyro_kd.diagnosis.inference_data import to_inference_data
from pyro_kd.errors import PlateMismatchError, UnsupportedNoiseError
from tests.support import gaussian_programs
from tests.support.losses import SurrogateKD

arviz = import_arviz()


gaussian = functools.partial(gaussian_programs.gaussian, rows=4)


# Shared noise.


def test_draws_differ_only_by_the_shift(float64):
    """Holds for latents and for the student's own targets, whose noise is shared too."""
    pair = to_inference_data(SurrogateKD(["x"]), gaussian(2.0), gaussian(0.0), num_samples=30)
    for group, site in (("prior", "z"), ("prior_predictive", "x")):
        teacher, student = pair.teacher[group][site], pair.student[group][site]
        assert teacher.shape == (1, 30, 4)
        assert np.abs(student - teacher - 2.0).max() < 1e-12
        assert teacher.std() > 0.5, "draws must vary"
    # The part of x that comes from its own noise: N(0, 0.5^2).
    own = pair.teacher["prior_predictive"]["x"] - pair.teacher["prior"]["z"]
    assert float(own.std()) == pytest.approx(0.5, abs=5 * 0.5 / (2 * own.size) ** 0.5)


def test_the_terms_of_each_draw():
    """The terms are delta^2 / 2 nats per row at z and delta^2 / (2 s^2) at x, before their weights, in the student's object."""
    pair = to_inference_data(SurrogateKD(["x"], num_particles=3), gaussian(2.0), gaussian(0.0), num_samples=5)
    stats = pair.student["sample_stats"]
    assert stats["z"].dims == stats["x"].dims == ("chain", "draw")
    assert np.allclose(stats["z"], 4 * 2.0)
    assert np.allclose(stats["x"], 4 * 8.0)
    assert "sample_stats" not in pair.teacher


def test_terms_belong_to_the_draws():
    """With d(p, q, value) = value, the term is the sum of the teacher's target in the same draw."""
    loss = SurrogateKD(["x"], divergence=lambda p, q, value: value)
    pair = to_inference_data(loss, gaussian(2.0), gaussian(0.0), num_samples=8)
    total = pair.teacher["prior_predictive"]["x"].sum("rows")
    assert np.allclose(pair.student["sample_stats"]["x"], total, atol=1e-5)


def test_the_local_loss_has_the_same_draws_of_the_student():
    """The values that the loss gives the student affect the terms, not the draws."""
    pair = to_inference_data(LocalKD(["x"]), gaussian(2.0), gaussian(0.0), num_samples=5)
    assert np.allclose(pair.student["prior"]["z"] - pair.teacher["prior"]["z"], 2.0, atol=1e-5)
    assert np.allclose(pair.student["sample_stats"]["x"], 0.0)


def test_a_target_whose_noise_cannot_be_shared_is_drawn_anew():
    def program(fn):
        def model():
            with pyro.plate("rows", 2000):
                pyro.sample("x", fn)

        return model

    class Coin(dist.Bernoulli):  # draws with NumPy, so no noise can be recorded, which a loss does not need at a target
        def sample(self, sample_shape=()):
            rng = np.random.default_rng(0)
            return torch.as_tensor(rng.random(tuple(sample_shape) + self.batch_shape) < 0.5).float()

    pair = to_inference_data(SurrogateKD(["x"]), program(dist.Bernoulli(0.9)), program(Coin(0.5)), num_samples=1)
    assert float(pair.teacher["prior_predictive"]["x"].mean()) == pytest.approx(0.5, abs=0.06)
    assert float(pair.student["prior_predictive"]["x"].mean()) == pytest.approx(0.9, abs=0.04)


def test_a_path_that_depends_on_the_students_targets():
    """A site that only some draws have is NaN in all others. The student's own target determines its path."""

    def program(heads):
        def model():
            coin = pyro.sample("coin", dist.Bernoulli(heads))
            if coin:
                pyro.sample("z", dist.Normal(0.0, 1.0))

        return model

    pair = to_inference_data(SurrogateKD(["coin"]), program(0.8), program(0.4), num_samples=60)
    for data in pair:
        coins, z = data["prior_predictive"]["coin"].values, data["prior"]["z"].values
        assert np.array_equal(np.isnan(z), coins == 0)
    student, teacher = (data["prior_predictive"]["coin"].values for data in pair)
    assert (student >= teacher).all(), "on shared noise, more probable heads are heads wherever the others are"
    assert student.mean() > teacher.mean()
    assert np.array_equal(np.isnan(pair.student["sample_stats"]["z"].values), teacher == 0)


def test_inputs_remain_inputs():
    def program(loc):
        def model(covariate):
            with pyro.plate("rows", 3):
                c = pyro.sample("c", dist.Normal(0.0, 1.0), obs=covariate)
                pyro.sample("x", dist.Normal(loc + c, 1.0))

        return model

    covariate = torch.tensor([1.0, 10.0, 100.0])
    pair = to_inference_data(SurrogateKD(["x"]), program(1.0), program(0.0), covariate, num_samples=3)
    for data in pair:
        assert data["observed_data"]["c"].values.tolist() == [1.0, 10.0, 100.0]
        assert "prior" not in data
        assert np.abs(data["prior_predictive"]["x"] - covariate.numpy()).max() < 10


def test_the_students_draws_have_the_teachers_names():
    def student(loc=1.0):
        extra = pyro.sample("extra", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 10, subsample_size=4):
            w = pyro.sample("w", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(w + 0 * extra, 1.0))

    def teacher():
        with pyro.plate("rows", 10, subsample_size=4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    loss = SurrogateKD(["x"], site_map={"w": "z", "items": "rows"}, fresh=["extra"])
    pair = to_inference_data(loss, student, teacher, num_samples=3)
    assert set(pair.student["prior"].data_vars) == {"z", "extra"}
    assert pair.student["prior"]["z"].dims == ("chain", "draw", "rows")
    shift = pair.student["prior"]["z"] - pair.teacher["prior"]["z"]
    assert shift.shape == (1, 3, 4), "the same rows: xarray matches by index"
    assert np.allclose(shift, 1.0, atol=1e-5)


# What does not change, and errors.


def test_the_student_does_not_change():
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def program(n):
        pyro.module("net", net)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(z[:, None]).squeeze(-1), 1.0))

    program(8)  # gives batch norm some statistics
    teacher, before = freeze(program), {name: value.clone() for name, value in net.state_dict().items()}
    pair = to_inference_data(SurrogateKD(["x"]), program, teacher, 8, num_samples=3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(param.grad is None for param in net.parameters())
    assert np.array_equal(pair.student["prior_predictive"]["x"], pair.teacher["prior_predictive"]["x"]), "both in eval mode"


def test_a_shape_that_changes_between_draws_is_an_error():
    def program():
        n = int(pyro.sample("n", dist.Categorical(torch.ones(5)))) + 1
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(PlateMismatchError, match="site 'x' has shape .* in a later one"):
        to_inference_data(SurrogateKD(["n", "x"]), program, program, num_samples=20)


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        to_inference_data(SurrogateKD(["x"]), gaussian(0.0), gaussian(0.0), num_samples=0)
    with pytest.raises(TypeError, match="first argument must be a distillation loss"):
        to_inference_data(gaussian(0.0), gaussian(0.0), SurrogateKD(["x"]))


def test_missing_arviz_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ModuleNotFoundError, match="pip install arviz"):
        to_inference_data(SurrogateKD(["x"]), gaussian(0.0), gaussian(0.0))


# The adapter.

GROUPS = {
    "prior": {"z": np.zeros((1, 3, 2))},
    "prior_predictive": {},
    "observed_data": {"x": np.arange(2.0)},
    "sample_stats": {"z": np.ones((1, 3))},
}
DIMS = {"prior": {"z": ["rows"]}, "observed_data": {"x": ["rows"]}, "sample_stats": {"z": []}}
COORDS = {"rows": [7, 9], "unused": [1]}


def test_the_adapter_with_the_installed_arviz():
    data = to_arviz(GROUPS, DIMS, COORDS)
    assert data["prior"]["z"].sel(rows=9).shape == (1, 3)
    assert data["observed_data"]["x"].sel(rows=9) == 1.0
    assert data["sample_stats"]["z"].dims == ("chain", "draw")
    assert "prior_predictive" not in data


def test_the_adapter_with_arviz_1():
    """A stand-in for ArviZ 1.x, which needs Python 3.12: its from_dict takes one nested dictionary instead of keywords."""

    def from_dict(
        data, *, name=None, sample_dims=None, save_warmup=None, index_origin=None, coords=None, dims=None, pred_dims=None,
        pred_coords=None, check_conventions=True, attrs=None,
    ):  # fmt: skip
        return {group: (variables, dims, coords) for group, variables in data.items()}

    tree = to_arviz(GROUPS, DIMS, COORDS, arviz=SimpleNamespace(__version__="1.3.1", from_dict=from_dict))
    assert tree == {
        "prior": (GROUPS["prior"], {"z": ["rows"]}, {"rows": [7, 9]}),
        "observed_data": (GROUPS["observed_data"], {"x": ["rows"]}, {"rows": [7, 9]}),
        "sample_stats": (GROUPS["sample_stats"], {"z": []}, {}),
    }


# Families without a sampler.


class Likelihood(dist.Normal):
    """A density without a sampler."""

    def rsample(self, sample_shape=()):
        raise NotImplementedError

    sample = rsample


def test_a_target_without_a_sampler_in_the_student_gives_a_warning():
    def program(family, loc):
        def model():
            with pyro.plate("rows", 3):
                y = pyro.sample("y", family(loc, 1.0))
                pyro.sample("x", dist.Normal(y, 0.1))

        return model

    loss = SurrogateKD(["y", "x"])
    with pytest.warns(UserWarning, match=r"cannot draw 'y'.*register_sampler") as caught:
        pair = to_inference_data(loss, program(Likelihood, 1.0), program(dist.Normal, 0.0), num_samples=4)
    assert len(caught) == 1
    assert set(pair.student["prior_predictive"].data_vars) == {"x"}
    assert set(pair.teacher["prior_predictive"].data_vars) == {"y", "x"}
    assert np.allclose(pair.student["sample_stats"]["y"], 3 * 0.5)
    assert np.abs(pair.student["prior_predictive"]["x"] - pair.teacher["prior_predictive"]["y"]).max() < 1.0


def test_an_observed_input_needs_no_sampler():
    def program(loc):
        def model(y):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", Likelihood(0.0, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0))

        return model

    pair = to_inference_data(SurrogateKD(["x"]), program(1.0), program(0.0), torch.tensor(2.0), num_samples=2)
    assert pair.student["observed_data"]["y"].values.ravel().tolist() == [2.0]


def test_a_target_without_a_sampler_in_the_teacher_is_an_error():
    def program():
        pyro.sample("y", Likelihood(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(UnsupportedNoiseError, match=r"site 'y': Likelihood cannot be sampled"):
        to_inference_data(SurrogateKD(), program, program, num_samples=2)
