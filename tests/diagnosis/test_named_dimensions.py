"""Dimensions of ArviZ objects are named after plates; the user's coordinates are kept."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD
from pyro_kd.diagnosis.inference_data import to_inference_data
from pyro_kd.errors import PlateMismatchError
from tests.support.losses import SurrogateKD


def plates(size=5, subsample=None):
    def program(data=None):
        pyro.sample("level", dist.Gamma(2.0, 1.0))
        outer = pyro.plate("groups", 3, dim=-2)
        rows = pyro.plate("rows", size, subsample_size=subsample, dim=-1)
        with outer:
            pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with outer, rows as index:
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            pyro.sample("x", dist.Normal(z.float(), 1.0), obs=None if data is None else data[:, index])

    return program


def test_dimensions_are_named_after_plates():
    pair = to_inference_data(SurrogateKD(["x"]), plates(), plates(), num_samples=2)
    for data in pair:
        prior = data["prior"]
        assert set(prior.data_vars) == {"level", "mean", "z"}
        assert set(data["prior_predictive"].data_vars) == {"x"}
        assert prior["level"].dims == ("chain", "draw")
        assert prior["mean"].dims == ("chain", "draw", "groups", "mean_dim_0"), "the plate of size 1 is dropped"
        assert prior["z"].dims == data["prior_predictive"]["x"].dims == ("chain", "draw", "groups", "rows")
        assert prior["z"].shape == (1, 2, 3, 5)
        assert prior["rows"].values.tolist() == [0, 1, 2, 3, 4]
        assert "observed_data" not in data


def test_a_users_coords_are_kept():
    pair = to_inference_data(SurrogateKD(["x"]), plates(), plates(), num_samples=2, coords={"groups": ["a", "b", "c"]})
    assert pair.student["prior"]["mean"].sel(groups="b").shape == (1, 2, 2)


def test_a_plate_that_subsamples_keeps_its_rows():
    data = torch.arange(60.0).reshape(3, 20) * 100
    pair = to_inference_data(SurrogateKD(), plates(20, 6), plates(20, 6), data, num_samples=4)
    rows = pair.teacher["prior"]["rows"].values
    assert len(set(rows)) == 6
    assert not np.array_equal(rows, np.arange(6))
    assert np.array_equal(rows, pair.student["prior"]["rows"].values)
    observed = pair.teacher["observed_data"]["x"]
    assert observed.dims == ("groups", "rows")
    assert np.array_equal(observed.values, data.numpy()[:, rows])
    # Observed targets are drawn too.
    assert pair.student["prior_predictive"]["x"].shape == (1, 4, 3, 6)
    assert float(np.abs(pair.student["prior_predictive"]["x"]).max()) < 20


def test_a_plate_with_a_name_that_arviz_reserves():
    def program():
        with pyro.plate("draw", 3):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    pair = to_inference_data(SurrogateKD(["x"]), program, program, num_samples=2)
    assert pair.teacher["prior_predictive"]["x"].dims == ("chain", "draw", "draw_plate")


def over_data(weight, whole):
    """``subsample=`` is the batch itself, or what a program computes from it, instead of row numbers."""

    def program(x):
        with pyro.plate("data", 40, subsample=x if whole else x @ weight) as rows:
            pyro.sample("y", dist.Normal(rows @ weight if whole else rows, 1.0))

    return program


@pytest.mark.parametrize("whole", [True, False], ids=["a matrix", "predictions"])
@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_a_plate_may_be_over_data(kind, whole):
    x, weight = torch.randn(10, 3), torch.randn(3)
    programs = over_data(weight, whole), over_data(torch.zeros(3), whole)
    assert kind(["y"]).loss(*programs, x) == pytest.approx(40 / 10 * float((x @ weight).square().sum() / 2), rel=1e-5)
    pair = to_inference_data(kind(["y"]), *programs, x, num_samples=3)
    assert pair.student["prior_predictive"]["y"].dims == ("chain", "draw", "data")
    assert pair.student["prior_predictive"]["y"].shape == (1, 3, 10)


def test_a_plate_may_be_over_counts():
    """Whole numbers that are not row numbers of the plate are data too; rows are compared all the same."""

    def program(rate):
        def model(counts):
            with pyro.plate("data", 5, subsample=counts + rate) as rows:
                pyro.sample("y", dist.Normal(rows.float(), 1.0))

        return model

    counts = torch.tensor([100, 200])
    assert SurrogateKD(["y"]).loss(program(1), program(0), counts) == pytest.approx(5 / 2 * 2 * 0.5)
    with pytest.raises(PlateMismatchError, match="plate 'data' takes different rows"):
        SurrogateKD(["y"]).loss(program(1), program(0), torch.tensor([0, 2]))


def test_a_plate_may_be_over_a_list_of_words():
    def program(loc):
        def model(words):
            with pyro.plate("words", 9, subsample=words):
                pyro.sample("y", dist.Normal(loc, 1.0))

        return model

    pair = to_inference_data(SurrogateKD(["y"]), program(1.0), program(0.0), ["a", "b", "c"], num_samples=2)
    assert pair.teacher["prior_predictive"]["y"].shape == (1, 2, 3)


def test_a_batch_dimension_without_a_plate():
    def program():
        width = pyro.sample("width", dist.HalfCauchy(torch.ones(4)))
        pyro.sample("x", dist.Normal(torch.zeros(4), width))

    pair = to_inference_data(SurrogateKD(["x"]), program, program, num_samples=2)
    assert pair.student["prior"]["width"].dims == ("chain", "draw", "width_dim_0")
    assert pair.student["prior_predictive"]["x"].shape == (1, 2, 4)
