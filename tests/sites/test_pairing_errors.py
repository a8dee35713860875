"""Errors about programs that do not fit: they list all sites, name the plate, and suggest to swap swapped programs."""

import ast
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_kd import Distiller, LocalKD, freeze
from pyro_kd.divergences import wasserstein2
from pyro_kd.errors import (
    NoParametersError,
    PlateMismatchError,
    PyroKDError,
    SupportMismatchError,
    UnknownTargetError,
    UnpairedSiteError,
    UnsupportedDivergenceError,
)
from pyro_kd.training import Replay
from tests.support.losses import SurrogateKD


def sites(*names, family=dist.Normal):
    def program():
        for name in names:
            pyro.sample(name, family(torch.tensor(0.5), torch.tensor(1.0)))

    return program


# Sites that only one program has.


def line_to_write(error):
    """The options in an error's text, as a loss takes them."""
    options = re.search(r"give the loss ((?:site_map=\{[^}]*\}|fresh=\[[^]]*\]|, )+)", str(error)).group(1)
    call = ast.parse(f"f({options})", mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@pytest.mark.parametrize(
    ("student", "teacher", "options"),
    [
        (["z1", "x"], ["z1", "z2", "z3", "x"], {"fresh": ["z2", "z3"]}),
        (["z1", "z2", "z3", "x"], ["z1", "x"], {"fresh": ["z2", "z3"]}),
        (
            ["latent_1", "latent_2", "x"],
            ["latent1", "latent2", "x"],
            {"site_map": {"latent_1": "latent1", "latent_2": "latent2"}},
        ),
        (["h", "x"], ["z", "x"], {"site_map": {"h": "z"}}),
        (["h1", "h2", "deep", "x"], ["z1", "z2", "x"], {"fresh": ["z1", "z2", "h1", "h2", "deep"]}),
        (["latent_1", "extra", "x"], ["latent1", "x"], {"site_map": {"latent_1": "latent1"}, "fresh": ["extra"]}),
        (["z1", "pixels"], ["z1", "z2", "x"], {"site_map": {"pixels": "x"}, "fresh": ["z2"]}),
    ],
)
@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
def test_one_error_names_all_sites_and_its_suggestion_fixes_all(kind, student, teacher, options):
    lone = {*student} ^ {*teacher}
    with pytest.raises(UnpairedSiteError) as caught:
        kind(["x"]).loss(sites(*student), sites(*teacher))
    assert all(repr(name) in str(caught.value) for name in lone)
    assert line_to_write(caught.value) == options
    assert kind(["x"], **options).loss(sites(*student), sites(*teacher)) == 0.0


def test_the_suggestion_keeps_the_options_of_the_loss():
    loss = SurrogateKD(["x"], fresh=["own"], site_map={"h": "z"})
    with pytest.raises(UnpairedSiteError) as caught:
        loss.loss(sites("own", "h", "more", "x"), sites("z", "x"))
    options = line_to_write(caught.value)
    assert options == {"fresh": ["own", "more"]}
    assert SurrogateKD(["x"], site_map={"h": "z"}, **options).loss(sites("own", "h", "more", "x"), sites("z", "x")) == 0.0


def test_a_target_that_the_student_lacks_must_be_mapped():
    with pytest.raises(UnpairedSiteError, match=r"'x' are in the teacher only.*site_map=\{'its name in the student': 'x'\}"):
        SurrogateKD(["x"]).loss(sites("z1"), sites("z1", "z2", "x"))


def test_plates_that_draw_their_rows_are_named():
    def program(plate, latent):
        def model():
            with pyro.plate(plate, 10, subsample_size=3):
                pyro.sample(latent, dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(0.0, 1.0))

        return model

    programs = program("data_rows", "latent_z"), program("rows", "latent")
    with pytest.raises(UnpairedSiteError) as caught:
        SurrogateKD(["x"]).loss(*programs)
    options = line_to_write(caught.value)
    assert options == {"site_map": {"latent_z": "latent", "data_rows": "rows"}}
    assert SurrogateKD(["x"], **options).loss(*programs) == 0.0


# Plates of different sizes.


def in_plate(size, taken=None, latent=True):
    def program():
        with pyro.plate("rows", size, subsample_size=taken):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) if latent else torch.tensor(0.0)
            pyro.sample("x", dist.Normal(z, 1.0))

    return program


@pytest.mark.parametrize("kind", [SurrogateKD, LocalKD])
@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((5,), (3,), "plate 'rows' has size 3 in the teacher and 5 in the student"),
        ((5, None, False), (3, None, False), "plate 'rows' has size 3 in the teacher and 5 in the student"),
        ((50, 5), (50, 3), "plate 'rows' takes 3 rows in the teacher and 5 in the student"),
        ((50, 3), (40, 3), "plate 'rows' has size 40 in the teacher and 50 in the student"),
    ],
    ids=["at a latent", "at a target", "rows", "size"],
)
def test_the_error_names_the_plate_whose_sizes_differ(kind, student, teacher, expected):
    with pytest.raises(PlateMismatchError, match=expected):
        kind(["x"]).loss(in_plate(*student), in_plate(*teacher))


def test_the_error_names_the_plate_even_if_given_rows_hide_its_size():
    def program(size):
        def model(rows):
            with pyro.plate("rows", size, subsample=rows):
                pyro.sample("x", dist.Normal(0.0, 1.0))

        return model

    with pytest.raises(
        PlateMismatchError, match="plate 'rows' has size 40 in the teacher and 50 in the student: the scale of"
    ):
        SurrogateKD(["x"]).loss(program(50), program(40), torch.arange(3))


def test_the_error_names_a_plate_of_different_length_in_a_loop():
    def program(size):
        def model():
            for i in pyro.plate("components", size):
                pyro.sample(f"mean_{i}", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0))

        return model

    with pytest.raises(
        UnpairedSiteError,
        match=r"'mean_3', 'mean_4' are in the student only.*plate 'components' has size 3 in the teacher and 5",
    ):
        SurrogateKD(["x"]).loss(program(5), program(3))


def test_an_error_raised_by_a_program_is_not_changed():
    def broken():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            raise ValueError("of the user's own")

    with pytest.raises(ValueError, match="of the user's own") as caught:
        SurrogateKD(["x"]).loss(broken, in_plate(3))
    assert not isinstance(caught.value, PyroKDError)


# Names to choose from.


def subsampled(loc=0.0):
    with pyro.plate("rows", 10, subsample_size=2):
        z = pyro.sample("latent", dist.Normal(loc, 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("point", dist.Delta(z))


@pytest.mark.parametrize("name", ["row", "rows"])
def test_a_plate_is_not_suggested_as_a_target(name):
    with pytest.raises(UnknownTargetError, match=f"'{name}'") as caught:
        SurrogateKD([name]).loss(subsampled, subsampled)
    assert "'rows'" not in str(caught.value).replace(f"target {name!r}", "")
    with pytest.raises(UnknownTargetError, match="has 'latent'") as caught:
        Replay(subsampled, ["row"], lambda values: ())()
    assert "'rows'" not in str(caught.value)


def test_a_plate_is_not_suggested_among_the_draws_behind_a_point():
    from pyro_kd import bound_report

    with pytest.raises(UnsupportedDivergenceError, match="the teacher draws 'latent'"):
        bound_report(subsampled, subsampled, ["point"])


# Programs that may have been swapped.


class Sites(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.loc, self.names = nn.Parameter(torch.tensor(0.0)), names

    def forward(self):
        for name in self.names:
            pyro.sample(name, dist.Normal(self.loc, 1.0))


def test_the_error_suggests_to_swap_a_frozen_student():
    student, teacher = Sites("x"), freeze(Sites("z", "x"))
    with pytest.raises(UnpairedSiteError, match=r"The student is a frozen program\. .* swap them: loss\(student, teacher\)"):
        SurrogateKD(["x"])(teacher, student)()
    with pytest.raises(UnpairedSiteError) as caught:
        SurrogateKD(["x"])(student, teacher)()
    assert "swap" not in str(caught.value)
    with pytest.raises(NoParametersError, match="swap them"):
        SurrogateKD(["x"])(freeze(Sites("x")), Sites("x"))()


def test_the_error_states_that_supports_fit_in_the_reverse_direction():
    wide, narrow = sites("x"), lambda: pyro.sample("x", dist.Exponential(1.0))
    with pytest.raises(SupportMismatchError, match="but not in the other direction"):
        SurrogateKD(["x"]).loss(narrow, wide)


# Pyro's table of shapes.


def test_the_table_of_a_long_trace_is_cut():
    def program(count):
        def model():
            for i in range(count):
                pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            return torch.zeros(3) + torch.zeros(4)

        return model

    with pytest.raises(RuntimeError, match="must match the size of tensor b") as caught:
        SurrogateKD(["x"]).loss(program(100), program(100))
    lines = str(caught.value).split("\n")
    assert len(lines) < 20
    assert "left out" in str(caught.value)
    assert "z99" in str(caught.value)
    with pytest.raises(RuntimeError) as caught:
        SurrogateKD(["x"]).loss(program(2), program(2))
    assert "left out" not in str(caught.value)
    assert "z0" in str(caught.value)


@pytest.mark.parametrize(
    ("student", "site_map", "said", "options"),
    [
        (["z", "x"], {"q": "z"}, "site_map has 'q': 'z', but the student has no site 'q'", None),
        (
            ["h", "x"],
            {"h": "zed"},
            "site_map has 'h': 'zed', but the teacher has no site 'zed'",
            {"site_map": {"h": "z"}},
        ),
    ],
    ids=["student's", "teacher's"],
)
def test_a_site_map_with_unknown_names_is_refused(student, site_map, said, options):
    with pytest.raises(UnpairedSiteError, match=said) as caught:
        SurrogateKD(["x"], site_map=site_map).loss(sites(*student), sites("z", "x"))
    if options is None:
        assert "leave that out of site_map" in str(caught.value)
    else:
        assert line_to_write(caught.value) == options
        assert SurrogateKD(["x"], **options).loss(sites(*student), sites("z", "x")) == 0.0


def test_a_distiller_suggests_to_swap_its_programs():
    def student():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    distiller = Distiller(freeze(sites("x")), student, lambda params: torch.optim.Adam(params), SurrogateKD(["x"]))
    with pytest.raises(NoParametersError, match=r"exchange them: Distiller\(student, teacher"):
        distiller.step()


@pytest.mark.parametrize("weight", ["0.1", None, [0.1]])
@pytest.mark.parametrize(
    "form", [lambda weight: {"z": weight}, lambda weight: lambda site: weight], ids=["mapping", "function"]
)
def test_a_latent_weight_that_is_not_a_number_names_the_site(weight, form):
    with pytest.raises(TypeError, match="latent_weight of site 'z' is .* must be a number"):
        SurrogateKD(["x"], latent_weight=form(weight)).loss(sites("z", "x"), sites("z", "x"))


@pytest.mark.parametrize("weight", [-0.1, {"z": -1}, lambda site: -0.1], ids=["number", "mapping", "function"])
def test_a_latent_weight_below_0_names_the_site(weight):
    """Training would drive the distributions of the site apart."""
    with pytest.raises(ValueError, match=r"latent_weight of site 'z' is -.*at least 0"):
        SurrogateKD(["x"], latent_weight=weight).loss(sites("z", "x"), sites("z", "x"))


@pytest.mark.parametrize("option", ["divergence", "latent_divergence"])
def test_a_divergence_given_by_name_is_refused(option):
    with pytest.raises(TypeError, match=f"{option} must be a function .*divergences.kl, not 'kl'"):
        SurrogateKD(["x"], **{option: "kl"})


def test_wasserstein2_names_the_distribution_without_a_closed_form():
    def program(fn):
        return lambda: pyro.sample("x", fn)

    loss = SurrogateKD(["x"], divergence=wasserstein2)
    with pytest.raises(
        UnsupportedDivergenceError, match=r"site 'x': .* Normal \(teacher\) and Laplace \(student\): Laplace is none"
    ):
        loss.loss(program(dist.Laplace(0.0, 1.0)), program(dist.Normal(0.0, 1.0)))
