"""Reports on programs as users write them: masks, scales, subsamples, names that ArviZ takes itself."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine

from pyro_kd import SurrogateKD, bound_report, check, to_inference_data
from pyro_kd.diagnosis.bound_table import _t_quantile
from pyro_kd.diagnosis.columns import thin
from pyro_kd.diagnosis.target_samples import target_samples
from pyro_kd.errors import PlateMismatchError

FEW = {"num_samples": 5, "sample_numbers": (), "seed": 0}


def padded(loc, shown):
    """1,000 rows, of which a mask shows the first ones; beyond them the programs differ."""
    mask = torch.arange(1000) < shown

    def program():
        with pyro.plate("rows", 1000), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(torch.where(mask, loc, 100 * loc), 1.0))

    return program


def test_the_lower_bound_does_not_see_what_a_mask_hides():
    report = bound_report(padded(0.3, 100), padded(0.0, 100), ["x"], **FEW)
    right = 0.3**2 / 2 / 10
    assert report.lower.limit <= right
    assert report.distance.mean == pytest.approx(2 * right, rel=1e-4)
    assert report.surrogate.mean == pytest.approx(right, rel=1e-4)


def test_the_lower_bound_sees_what_a_mask_shows():
    report = bound_report(padded(3.0, 900), padded(0.0, 900), ["x"], **FEW)
    assert 1 < report.lower.limit <= 4.5 * 0.9


def scaled(loc, *, target=1.0, latent=1.0):
    def program(rows):
        with pyro.plate("rows", rows):
            with poutine.scale(scale=latent):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
            with poutine.scale(scale=target):
                pyro.sample("x", dist.Normal(z, 1.0))

    return program


@pytest.mark.parametrize(
    ("name", "scales"), [("x", {"target": 0.1}), ("z", {"latent": 0.1}), ("x", {"target": torch.tensor(0.5)})]
)
def test_a_scale_that_is_no_subsample_is_refused(name, scales):
    with pytest.raises(PlateMismatchError, match=f"site '{name}' is scaled by poutine.scale.*without it"):
        bound_report(scaled(1.0, **scales), scaled(0.0, **scales), ["x"], 50, **FEW)


def subsampled(loc, size):
    def program():
        with pyro.plate("rows", size, subsample_size=300):
            pyro.sample("x", dist.Normal(loc, 1.0))

    return program


def test_a_subsample_is_no_scale_and_its_rows_are_those_that_are_drawn():
    report = bound_report(subsampled(1.0, 30_000), subsampled(0.0, 30_000), ["x"], **FEW)
    assert report.surrogate.mean == pytest.approx(0.5, rel=1e-4)
    assert (report.rows, report.rows_drawn) == (30_000, 300)
    assert "runs of 300 of 30000 rows" in str(report)


@pytest.mark.parametrize("plate", ["rows", "batch"])
@pytest.mark.parametrize("has_global", [False, True])
def test_the_distance_is_per_row_whatever_the_plates_are_called(plate, has_global):
    def program(loc, name, *, has_global=False):
        def model(rows):
            shift = pyro.sample("shift", dist.Normal(0.0, 1e-4)) if has_global else 0.0
            with pyro.plate(name, rows):
                pyro.sample("x", dist.Normal(loc + shift, 1.0))

        return model

    student = program(1.0, plate, has_global=has_global)
    report = bound_report(student, program(0.0, "rows"), ["x"], 300, fresh=["shift"] * has_global, **FEW)
    assert report.distance.mean == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("event", [False, True])
def test_categories_that_differ_have_distance_one(event):
    def program(shift):
        def model():
            with pyro.plate("rows", 200):
                law = dist.Categorical(logits=torch.tensor([0.0, 0.0, 0.0, 100.0 * shift]).expand(200, 1, 4))
                pyro.sample("x", law.to_event(1) if event else dist.Categorical(logits=law.logits[:, 0]))

        return model

    pyro.set_rng_seed(0)
    found = target_samples(SurrogateKD(["x"]), program(1), program(-1), (), {}, rows=400, most_runs=4)
    assert found.distances.tolist() == pytest.approx([1.0] * len(found.distances))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 19, 400])
@pytest.mark.parametrize("confidence", [0.9, 0.975, 0.995, 0.9999])
def test_the_quantile_is_that_of_students_t(degrees, confidence):
    assert _t_quantile(confidence, degrees) == pytest.approx(scipy.stats.t.ppf(confidence, degrees), rel=1e-8)


def test_thinned_draws_are_of_all_rows_of_a_plate():
    picked = thin(8000, 4000)
    assert len(set(picked)) == 4000
    assert abs((picked % 2).mean() - 0.5) < 0.05
    assert thin(10, 4000).tolist() == list(range(10))


def named_as_in_arviz():
    with pyro.plate("chain", 3):
        draw = pyro.sample("draw", dist.Normal(0.0, 1.0))
        pyro.sample("chain_target", dist.Normal(draw, 1.0))


def test_a_site_with_a_name_of_arviz_is_kept():
    pair = to_inference_data(
        SurrogateKD(["chain_target"]), named_as_in_arviz, named_as_in_arviz, num_samples=4, coords={"chain": ["a", "b", "c"]}
    )
    found = pair.teacher["prior"]["draw_site"]
    assert found.dims == ("chain", "draw", "chain_plate")
    assert found.coords["chain_plate"].values.tolist() == ["a", "b", "c"]
    alone = to_inference_data(SurrogateKD(["draw"]), named_as_in_arviz, named_as_in_arviz, num_samples=4)
    assert "draw_site" in alone.teacher["prior_predictive"]


def test_coords_of_no_dimension_are_refused():
    with pytest.raises(ValueError, match="no site has a dimension 'chian'"):
        to_inference_data(
            SurrogateKD(["chain_target"]),
            named_as_in_arviz,
            named_as_in_arviz,
            num_samples=2,
            coords={"chian": np.arange(3)},
        )


@pytest.mark.parametrize(
    ("scale", "shown"),
    [(3.0, "3 times"), (torch.tensor(3.0), "3 times"), (torch.tensor([0.0, 3.0]), "scaled"), (1.0, "all")],
)
def test_a_check_shows_scales_that_are_tensors(scale, shown):
    def program():
        with pyro.plate("rows", 2), poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0))

    def teacher():
        with pyro.plate("rows", 2), poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    (row,) = check(SurrogateKD(["x"]), program, teacher).sites
    assert row.counts == shown
