"""Handwriting from the Hershey fonts: seeded, in equal steps, and the font's own letters where nothing is changed."""

import random
import string
import sys
import time

import numpy
import pytest
import torch

from pyro_kd.datasets import Strokes, hershey, hershey_strokes
from pyro_kd.datasets.hershey import WORDS

HersheyFonts = pytest.importorskip("HersheyFonts").HersheyFonts


def test_the_seed_decides_and_global_generators_are_left_alone():
    states = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    first, again, other = (hershey_strokes(20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(states[0], torch.get_rng_state())
    assert numpy.array_equal(states[1], numpy.random.get_state()[1])
    assert states[2] == random.getstate()
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.lengths, again.lengths)
    assert not torch.equal(first.points[:20], other.points[:20])


def test_drawings_begin_at_the_origin_and_end_with_the_pen_up():
    strokes = hershey_strokes(50, seed=0)
    starts = strokes.lengths.cumsum(0) - strokes.lengths
    assert not strokes.points[starts, :2].any()
    assert (strokes.points[strokes.lengths.cumsum(0) - 1, 2] == 1).all()
    assert (strokes.lengths > 10).all()
    assert isinstance(strokes, Strokes)


def test_strokes_are_those_of_the_font():
    """Without changes of the hand, every point lies on the font's lines for the word, and its corners are near."""
    fonts = HersheyFonts()
    fonts.load_default_font("scripts")
    still = _Still(numpy.random.default_rng(0))
    for word in ("kind", "tilt", "Quick"):
        outline = hershey._outline(hershey._font("scripts"), word)
        drawn = hershey._write(outline, 0.5, 0.0, still)
        places = drawn[:, :2].cumsum(0)
        lines = [numpy.array(stroke, float) for stroke in fonts.strokes_for_text(word)]
        places += lines[0][0]
        corners = numpy.concatenate(lines)
        gaps = numpy.hypot(*(corners[:, None] - places).transpose(2, 0, 1))
        assert gaps.min(1).max() < 0.5
        starts = numpy.concatenate([line[:-1] for line in lines])
        ends = numpy.concatenate([line[1:] for line in lines])
        along = ((places[:, None] - starts) * (ends - starts)).sum(-1) / ((ends - starts) ** 2).sum(-1)
        nearest = starts + along.clip(0, 1)[..., None] * (ends - starts)
        assert numpy.hypot(*(places[:, None] - nearest).transpose(2, 0, 1)).min(1).max() < 1e-9


class _Still:
    """A generator whose normal variates are 0."""

    def __init__(self, generator):
        self.generator = generator

    def normal(self, loc, scale, size=None):
        return loc if size is None else numpy.full(size, loc)


def test_points_are_in_equal_steps_within_a_stroke():
    outline = hershey._outline(hershey._font("scripts"), "moon")
    drawn = hershey._write(outline, 3.0, 0.0, _Still(numpy.random.default_rng(0)))
    inside = numpy.concatenate([[False], drawn[:-1, 2] == 0])  # not the first of a stroke
    steps = numpy.hypot(drawn[inside, 0], drawn[inside, 1])
    assert steps.max() < 4  # at most 4/3 of 3, and shorter across corners
    assert numpy.median(steps) > 2


def test_touching_letters_are_one_stroke():
    """The script ``a`` ends where ``b`` begins, and ``b`` does not end where ``a`` begins."""
    font = hershey._font("scripts")
    assert len(hershey._outline(font, "ab")) == 1
    assert len(hershey._outline(font, "ba")) == 2


def test_letters_and_different_fonts_may_be_written():
    letters = hershey_strokes(100, seed=0, words=string.ascii_letters, fonts=["cursive", "futural"])
    assert len(letters) == 100
    assert letters.lengths.float().mean() < hershey_strokes(100, seed=0).lengths.float().mean() / 3


def test_step_decides_the_number_of_points():
    few, many = (hershey_strokes(50, seed=0, step=step).lengths.sum() for step in (4.0, 2.0))
    assert 1.6 < many / few < 2.1


def test_the_default_words_are_lower_case_words():
    assert len(WORDS) == len(set(WORDS)) > 200
    assert all(word.isalpha() and word.isascii() and word.islower() for word in WORDS)


@pytest.mark.xdist_group("timing")
def test_five_thousand_words_take_seconds():
    start = time.perf_counter()
    assert len(hershey_strokes(5000, seed=0)) == 5000
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"words": []}, "there are 0 words"),
        ({"step": 0.0}, "step must be positive"),
        ({"jitter": float("nan")}, "jitter not negative"),
        ({"fonts": ["comic"]}, "no font 'comic', but astrology"),
        ({"words": ["né"]}, "no character 'é', of the word 'né'"),
        ({"words": [" "]}, "leaves no trace"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hershey_strokes(**{"num": 3, "seed": 0} | options)


def test_without_the_fonts_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "HersheyFonts", None)
    hershey._font.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install Hershey-Fonts"):
        hershey_strokes(1, seed=0)


def test_the_fonts_acknowledgement_is_given():
    for name in ("Dr. A. V. Hershey", "James Hurt", "National Bureau of Standards"):
        assert name in " ".join(hershey_strokes.__doc__.split())
