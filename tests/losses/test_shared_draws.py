"""The warnings about draws that teacher and student do not share, where the student loses a part of the teacher's law."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import check, mixture_of, posterior_predictive
from tests.support.losses import SurrogateKD

X = torch.ones(6)
DRAWS = {"slope": torch.randn(20)}


def model(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0))


def guide(x):
    pyro.sample("slope", dist.Normal(0.0, 1.0))


def independent(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + z, 1.0))


def with_latent(x):
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + shared, 1.0))


def warnings_of(student, teacher, x=X, **options):
    loss = SurrogateKD(["y"], fresh="*", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss.loss(student, teacher, x)
    return [str(w.message) for w in caught]


SHARING = {
    "draws": lambda: posterior_predictive(model, DRAWS),
    "guide": lambda: posterior_predictive(model, guide),
    "mixture": lambda: mixture_of([independent, independent]),
    "mixture of sites": lambda: mixture_of([independent, independent], sites=["y"]),
}


VECTORIZED = {"num_particles": 2, "vectorize_particles": True}


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in SHARING), ("draws", VECTORIZED), ("guide", VECTORIZED)]
)
def test_it_warns_once_of_a_student_with_independent_rows(kind, options):
    (text,) = warnings_of(independent, SHARING[kind](), **options)
    name = {"guide": "slope", "draws": "draw"}.get(kind, "teacher")
    assert f"the rows of 'y' share '{name}' in the teacher, and nothing in the student" in text
    assert "loses what the rows have in common" in text
    assert "rows=len" in text
    assert "warnings.filterwarnings('ignore', 'the rows of')" in text


def test_a_check_reports_it():
    report = check(SurrogateKD(["y"], fresh="*"), independent, SHARING["draws"](), X, try_capture=False)
    assert report.is_ok
    assert [problem.text[:32] for problem in report.problems] == ["the rows of 'y' share 'draw' in "]


NOT_SHARING = {
    "a draw for each row": (independent, lambda: posterior_predictive(model, DRAWS, rows=len), X),
    "a guide for each row": (independent, lambda: posterior_predictive(model, guide, rows=len), X),
    "a teacher for each row": (independent, lambda: mixture_of([independent] * 2, sites=["y"], rows=len), X),
    "a student whose rows share a latent": (with_latent, SHARING["draws"], X),
    "one row": (independent, SHARING["draws"], X[:1]),
    "an ordinary teacher": (independent, lambda: model, X),
}


@pytest.mark.parametrize("case", NOT_SHARING)
def test_it_does_not_warn_without_reason(case):
    student, teacher, x = NOT_SHARING[case]
    assert warnings_of(student, teacher(), x) == []


def test_a_counterpart_to_the_draw_ends_it():
    student = posterior_predictive(model, DRAWS)
    assert warnings_of(student, SHARING["draws"]()) == []


def generator(scale, name="z"):
    def program(rows):
        with pyro.plate("data", rows):
            z = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Delta(pyro.param(f"{name} times {scale}", torch.tensor(scale)) * z))

    return program


def test_point_masses_after_fresh_latents_lose_their_spread():
    """A target that is a function of draws which are not shared is fitted to its mean: the scale of the best student is 0."""
    pyro.clear_param_store()
    (text,) = warnings_of(generator(1.0, "w"), generator(2.0), 100)
    assert text.startswith(
        "targets that are point masses (Delta) in both programs, 'y', are compared by their squared distance"
    )
    assert "'z', 'w' draw noise that is not shared" in text
    loss = SurrogateKD(["y"], fresh="*")
    report = check(loss, generator(1.0, "w"), generator(2.0), 10)
    assert report.is_ok
    assert any(problem.text == text for problem in report.problems)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        equal, collapsed = (loss.loss(generator(scale, "w"), generator(2.0), 1000) for scale in (2.0, 0.0))
    assert collapsed < equal


@pytest.mark.parametrize("options", [{}, {"site_map": {"w": "z"}}])
def test_point_masses_of_shared_latents_need_no_warning(options):
    pyro.clear_param_store()
    name = "w" if options else "z"
    assert not warnings_of(generator(1.0, name), generator(2.0), 100, **options)
