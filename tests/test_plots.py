"""Plots: what is drawn, by lines, bars and pictures; never pixels."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from pyro_kd import plots  # noqa: E402
from pyro_kd.diagnosis.columns import density_curve  # noqa: E402
from pyro_kd.diagnosis.inference_data import to_inference_data  # noqa: E402
from pyro_kd.diagnosis.reports import site_report  # noqa: E402
from pyro_kd.divergences import cross_entropy  # noqa: E402
from pyro_kd.errors import UnknownTargetError  # noqa: E402
from tests.support.losses import SurrogateKD  # noqa: E402


@pytest.fixture(autouse=True)
def settings():
    """No plot changes matplotlib's settings, or shows a figure."""
    before = dict(matplotlib.rcParams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "show", lambda *args, **kwargs: pytest.fail("shown"))
        yield
    assert dict(matplotlib.rcParams) == before
    pyplot.close("all")


def program(loc, rate=2.0):
    def model():
        with pyro.plate("rows", 100):
            k = pyro.sample("k", dist.Poisson(torch.tensor(rate)))
            z = pyro.sample("z", dist.Normal(loc, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + 0 * k, 0.5))

    return model


@pytest.fixture(scope="module")
def pair():
    pyro.set_rng_seed(0)
    return to_inference_data(SurrogateKD(["x"]), program(2.0, 2.5), program(0.0), num_samples=30)


def labels(ax):
    return ax.get_xlabel(), ax.get_ylabel()


# Curves.


def test_loss_curves():
    history = {
        "step": [1, 2, 3, 4],
        "loss": [4.0, 3.0, 2.0, 1.0],
        "seconds": [0.1] * 4,
        "lr": [1e-3] * 4,
        "term/z": [1.0, math.nan, 0.5, None],
        "validation/loss": [math.nan, 3.5, math.nan, math.nan],
    }
    ax = plots.loss_curves(history)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["loss", "term/z", "validation/loss"]
    assert lines["loss"].get_xydata().tolist() == [[1, 4], [2, 3], [3, 2], [4, 1]]
    assert lines["term/z"].get_xydata().tolist() == [[1, 1.0], [3, 0.5]], "over the gaps"
    assert lines["validation/loss"].get_marker() == ".", "a single point would be no line"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    assert ax.get_yscale() == "log"
    assert labels(ax) == ("step", "loss and terms (nats)")


def test_small_terms_beside_a_negative_total_have_an_axis_of_their_own():
    history = {
        "step": [1, 2],
        "loss": [300.0, -80.0],
        "loss/new": [200.0, -90.0],
        "term/z": [1e-2, 1e-3],
        "term/w": [0.0, 0.0],
    }
    ax = plots.loss_curves(history)
    right = ax.figure.axes[-1]
    assert [line.get_label() for line in ax.lines] == ["loss", "loss/new", "term/w"]
    assert [line.get_label() for line in right.lines] == ["term/z (right)"]
    assert (ax.get_yscale(), right.get_yscale()) == ("linear", "log")
    assert right.get_ylabel() == "small terms (nats)"
    assert len(ax.get_legend().get_texts()) == 4
    colours = [line.get_color() for line in (*ax.lines, *right.lines)]
    assert len(set(colours)) == len(colours)


def test_a_term_that_is_0_leaves_the_remaining_terms_readable():
    ax = plots.loss_curves({"step": [1, 2, 3], "loss": [800.0, 1.0, 0.5], "term/z": [0.0, 0.0, 0.0]})
    assert ax.get_yscale() == "symlog"
    places = ax.transData.transform([(1, value) for value in (0.0, 0.5, 1.0, 800.0)])[:, 1]
    assert min(np.diff(places)) > 0.05 * (places[-1] - places[0])


def test_the_total_lies_under_its_terms():
    ax = plots.loss_curves({"step": [1, 2], "loss": [2.0, 1.0], "term/x": [2.0, 1.0]})
    total, term = ax.lines
    assert total.get_zorder() < term.get_zorder()


def test_loss_curves_with_negative_values_and_chosen_columns():
    ax = plots.loss_curves({"step": [1, 2], "loss": [1.0, -1.0], "lr": [1.0, 0.5]}, ["loss"])
    assert ax.get_yscale() == "linear"
    assert plots.loss_curves({"step": [1, 2], "loss": [1.0, 2.0], "lr": [1.0, 0.5]}, ["lr"]).lines[
        0
    ].get_ydata().tolist() == [1.0, 0.5]


def test_loss_curves_of_a_wrong_history():
    with pytest.raises(KeyError, match="no column 'los'.*Did you mean 'loss'"):
        plots.loss_curves({"step": [1], "loss": [1.0]}, ["los"])
    with pytest.raises(KeyError, match="no column 'step'"):
        plots.loss_curves({"loss": [1.0]})
    with pytest.raises(ValueError, match="'loss' has 2 values, but 'step' has 1"):
        plots.loss_curves({"step": [1], "loss": [1.0, 2.0]})


# Bars by site.


def test_site_bars():
    loc = torch.tensor(1.0, requires_grad=True)
    report = site_report(SurrogateKD(["x"], fresh=["k"]), program(loc), program(0.0), num_samples=3)
    terms, gradients = plots.site_bars(report)
    # z: two entries of delta^2 / 2; x: (2 delta)^2 / 2 s^2; 100 rows.
    assert [bar.get_width() for bar in terms.patches] == pytest.approx([0.1 * 100, 800.0])
    assert [bar.get_width() for bar in gradients.patches] == pytest.approx([0.1 * 200, 1600.0])
    assert [text.get_text() for text in terms.get_yticklabels()] == ["z", "x"], "a fresh site has no term"
    assert [text.get_text().strip() for text in terms.texts] == ["1.2 %", "98.8 %"]
    assert terms.yaxis_inverted()
    assert gradients.yaxis_inverted()
    assert terms.patches[0].get_facecolor() != terms.patches[1].get_facecolor(), "latents and targets differ"
    assert labels(terms) == ("weight times term (nats per call)", "site")
    assert labels(gradients)[0] == "gradient norm (nats per unit)"


def test_site_bars_show_two_standard_errors():
    def noisy(p, q, value):
        return q.log_prob(value) ** 2

    report = site_report(SurrogateKD(["x"], divergence=noisy), program(1.0), program(0.0), num_samples=5)
    terms, _ = plots.site_bars(report)
    (bars,) = [collection for collection in terms.collections if len(collection.get_segments()) == 3]
    low, high = bars.get_segments()[2][:, 0]
    row = report["x"].term
    assert (low, high) == pytest.approx((row.mean - 2 * row.standard_error, row.mean + 2 * row.standard_error))


# Laws of one and of several variables.


def test_densities(pair):
    axes = plots.densities(pair)
    assert [ax.get_xlabel() for ax in axes] == ["k", "z[0]", "z[1]", "x"]
    assert [ax.get_ylabel() for ax in axes] == ["probability", "density", "density", "density"]
    teacher, student = axes[1].lines
    for line, loc in ((teacher, 0.0), (student, 2.0)):
        grid, density = line.get_xdata(), line.get_ydata()
        assert ((density[1:] + density[:-1]) / 2 * np.diff(grid)).sum() == pytest.approx(1.0, abs=0.02)
        assert grid[density.argmax()] == pytest.approx(loc, abs=0.3)
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["teacher", "student"]


def test_a_law_that_is_much_narrower_than_the_other_is_seen():
    def narrow(loc, scale):
        def model():
            with pyro.plate("rows", 40):
                pyro.sample("x", dist.Normal(loc, scale))

        return model

    pyro.set_rng_seed(0)
    pair = to_inference_data(SurrogateKD(["x"]), narrow(0.0, 10.0), narrow(0.07, 0.01), num_samples=50)
    (ax,) = plots.densities(pair)
    assert ax.lines[0].get_ydata().max() == pytest.approx(39.9, rel=0.2)
    assert ax.lines[1].get_ydata().max() == pytest.approx(0.0399, rel=0.2)


def test_draws_that_are_not_finite_are_named():
    def program(value):
        def model():
            with pyro.plate("rows", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Delta(z + torch.tensor([0.0, 0.0, value])))

        return model

    pair = to_inference_data(SurrogateKD(["x"], divergence=cross_entropy), program(0.0), program(math.inf), num_samples=3)
    with pytest.raises(ValueError, match="'x' has 3 infinite draws of 9"):
        plots.densities(pair, ["x"])


def test_no_sites_are_refused(pair):
    with pytest.raises(ValueError, match="there is no site to draw"):
        plots.densities(pair, [])
    with pytest.raises(ValueError, match="sites is empty"):
        plots.pairs(pair, [])


def test_every_row_of_a_plate_is_drawn():
    def program():
        with pyro.plate("rows", 40):
            pyro.sample("x", dist.Normal(10.0 * (torch.arange(40) % 2), 1.0))

    pyro.set_rng_seed(0)
    pair = to_inference_data(SurrogateKD(["x"]), program, program, num_samples=200)
    (ax,) = plots.densities(pair)
    grid, density = ax.lines[0].get_xdata(), ax.lines[0].get_ydata()
    assert (density * (grid > 5)).sum() / density.sum() == pytest.approx(0.5, abs=0.05)


def test_whole_values_are_bars(pair):
    (ax,) = plots.densities(pair, ["k"])
    teacher, student = (np.array([bar.get_height() for bar in bars]) for bars in ax.containers)
    counts = pair.teacher["prior"]["k"].values
    assert teacher[1] == pytest.approx((counts == 1).mean())
    assert teacher.sum() == pytest.approx(1.0)
    assert student.sum() == pytest.approx(1.0)
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.containers[0]]
    assert centres[:2] == pytest.approx([-0.2, 0.8])


def test_point_mass_is_a_line():
    def point(loc):
        def model():
            pyro.sample("z", dist.Delta(torch.tensor(loc)))
            pyro.sample("x", dist.Normal(0.0, 1.0))

        return model

    pair = to_inference_data(SurrogateKD(["x"]), point(0.5), point(0.25), num_samples=3)
    (ax,) = plots.densities(pair, ["z"])
    assert [line.get_xdata()[0] for line in ax.lines] == [0.25, 0.5]


def test_large_events_show_their_first_entries():
    def wide():
        pyro.sample("x", dist.Normal(torch.zeros(3, 5), 1.0).to_event(2))

    pair = to_inference_data(SurrogateKD(["x"]), wide, wide, num_samples=3)
    assert [ax.get_xlabel() for ax in plots.densities(pair)] == ["x[0,0]", "x[0,1]", "x[0,2]", "x[0,3]", "x[0,4]", "x[1,0]"]


def test_density_curve_of_a_normal():
    """Silverman's width 0.9 n^-0.2 widens N(0, 1) to N(0, 1 + width^2)."""
    values = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(4000.0) + 0.5) / 4000).numpy()
    grid = np.linspace(-3, 3, 50)
    variance = 1 + (0.9 * 4000**-0.2) ** 2
    expected = np.exp(-0.5 * grid**2 / variance) / np.sqrt(2 * np.pi * variance)
    assert np.abs(density_curve(values, grid) - expected).max() < 1e-3


def test_pairs(pair):
    axes = plots.pairs(pair, ["z", "x"])
    assert axes.shape == (3, 3)
    assert not axes[0, 1].axison
    assert labels(axes[2, 0]) == ("z[0]", "x")
    assert labels(axes[1, 1]) == ("z[1]", "density")
    points = axes[2, 0].collections[0].get_offsets()
    teacher, student = points[::2], points[1::2]
    assert len(teacher) == len(student) == 800
    assert np.allclose(student - teacher, [2.0, 4.0], atol=1e-4), "the same draws of both programs, row by row"
    # corr(z[0], z[0] + z[1] + noise) = 1 / sqrt(2.25)
    assert np.corrcoef(teacher.T)[0, 1] == pytest.approx(2 / 3, abs=5 * (1 - 4 / 9) / math.sqrt(800))
    first = pair.teacher["prior"]["z"].sel(z_dim_0=0).values.reshape(-1)
    assert teacher[0, 0] == pytest.approx(first[0])


def test_pairs_match_a_global_latent_with_every_row():
    def model():
        level = pyro.sample("level", dist.Normal(0.0, 100.0))
        with pyro.plate("rows", 4):
            pyro.sample("x", dist.Normal(level, 0.01))

    pair = to_inference_data(SurrogateKD(["x"]), model, model, num_samples=10)
    points = plots.pairs(pair, ["level", "x"])[1, 0].collections[0].get_offsets()
    assert points.shape == (2 * 10 * 4, 2)
    assert np.abs(points[:, 0] - points[:, 1]).max() < 0.1


def test_pairs_of_one_variable_and_unknown_sites(pair):
    with pytest.raises(ValueError, match="at least two variables, but 'x' has one"):
        plots.pairs(pair, ["x"])
    with pytest.raises(UnknownTargetError, match="'zz'.*Did you mean 'z'"):
        plots.densities(pair, ["zz"])


# Images.


def test_sample_grid():
    images = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    ax = plots.sample_grid(images, columns=3)
    picture = ax.images[0].get_array()
    assert picture.shape == (2 * 3 - 1, 3 * 4 - 1)
    assert picture[0].tolist() == [0.0] * 3 + [1.0] + [0.25] * 3 + [1.0] + [0.5] * 3
    assert picture[2].tolist() == [1.0] * 11, "white between images"
    assert picture[3].tolist() == [0.75] * 3 + [1.0] * 8
    assert not ax.axison


def test_sample_grid_of_colours():
    images = np.zeros((2, 3, 4, 4))
    images[1, 2] = 1.0
    picture = plots.sample_grid(images).images[0].get_array()
    assert picture.shape == (4, 9, 3)
    assert picture[0, 0].tolist() == [0.0, 0.0, 0.0]
    assert picture[0, 5].tolist() == [0.0, 0.0, 1.0]
    assert plots.sample_grid(torch.ones(1, 1, 2, 2)).images[0].get_array().shape == (2, 2)


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 4, 4), (0, 4, 4)])
def test_sample_grid_refuses_shapes_that_are_not_images(shape):
    with pytest.raises(ValueError, match="images must have shape"):
        plots.sample_grid(torch.zeros(shape))


# Axes.


def test_axes_that_are_given(pair):
    """Nothing is made with pyplot then."""
    figure = Figure()
    axes = figure.subplots(2, 2)
    assert plots.sample_grid(torch.rand(3, 2, 2), ax=axes[0, 0]) is axes[0, 0]
    assert plots.loss_curves({"step": [1], "loss": [1.0]}, ax=axes[0, 1]) is axes[0, 1]
    assert plots.densities(pair, ["k", "x"], axes=axes[1])[1] is axes[1, 1]
    assert plots.pairs(pair, ["z"], axes=Figure().subplots(2, 2)).shape == (2, 2)
    report = site_report(SurrogateKD(["x"]), program(1.0), program(0.0), num_samples=2)
    assert len(plots.site_bars(report, axes=Figure().subplots(2))) == 2
    assert pyplot.get_fignums() == []
    with pytest.raises(ValueError, match="needs 4 axes, not 2"):
        plots.densities(pair, axes=axes[1])
