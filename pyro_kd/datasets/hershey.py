"""Handwriting made from the Hershey script fonts: words by hands that differ in size, slant and steadiness."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from pyro_kd.datasets.strokes import Strokes

__all__ = ["WORDS", "hershey_strokes"]

_TEXT = """
about above after again air all along also and animal answer any are around ask away back because been before began
below between big book both boy but call came can change city close come could country cut day did different does down
draw each earth eat end enough even every eye far father feet few find first follow food form found four from gave get
girl give good great group grow had half hand hard has head hear help her here high him home house how idea into just
keep kind know land large last late learn leave left letter life light like line list little live long look made make
man many may mean mile might more most mother mountain move much must name near need never new next night number often
old once one only open other our out over own page paper part people picture place plant play point press question
quick quite read real right river run said same saw say school sea second see seem sentence set she should show side
small some song soon sound spell stand start state still stop story study such take talk teacher tell than that their
them then there these they thing think this those thought three through time together too took tree try turn two under
until use very walk want watch water way well went were what when where which while white who why will with without
word work world would write year you young your zero
"""
WORDS = tuple(_TEXT.split())
_Array = numpy.ndarray[Any, Any]


def hershey_strokes(
    num: int,
    seed: int,
    *,
    words: Sequence[str] = WORDS,
    fonts: Sequence[str] = ("scripts", "scriptc"),
    step: float = 3.0,
    jitter: float = 0.15,
) -> Strokes:
    """Write random words, each by a different hand.

    A hand has a font, a slant, a width, a height and a slope of its line, letters that stray from the line, and a tremor. The
    points of a stroke are equally spaced along it. A stroke continues into the next letter if the font's letters touch.
    Coordinates are in the font's units, in which a capital letter is about 21 high, and dy grows downwards. The first point of a
    drawing is (0, 0).

    Args:
        num: number of drawings.
        seed: of the words and hands. Torch's and NumPy's global generators are not used.
        words: the words to choose from; for single letters ``string.ascii_letters``.
        fonts: names of Hershey-Fonts' fonts to choose from.
        step: distance between points before a hand changes it; rounded so that it divides the stroke evenly.
        jitter: standard deviation of the tremor of each point.

    Raises:
        ModuleNotFoundError: Hershey-Fonts is not installed.
        ValueError: a number is out of range, or there is no word, or a font or character that does not exist.

    References:
        Hershey, Calligraphy for computers, U. S. Naval Weapons Laboratory, 1967. The Hershey Fonts were originally created by
        Dr. A. V. Hershey while working at the U. S. National Bureau of Standards. The format of the font data in the
        distribution that Hershey-Fonts holds was originally created by James Hurt, Cognition, Inc., 900 Technology Park Drive,
        Billerica, MA 01821. The data may be used by anyone for any purpose with these acknowledgements, and may not be
        converted into the format that is distributed by the U. S. NTIS.

    Example:
        >>> from pyro_kd.datasets import hershey_strokes
        >>> drawings = hershey_strokes(3, seed=0, words=["a", "kind", "word"])
        >>> len(drawings), bool((drawings.lengths > 5).all())
        (3, True)
    """
    if num < 1 or not words or not fonts:
        raise ValueError(f"num must be at least 1, and is {num}; there are {len(words)} words and {len(fonts)} fonts")
    if not step > 0 or not jitter >= 0:
        raise ValueError(f"step must be positive and jitter not negative; they are {step} and {jitter}")
    generator = numpy.random.default_rng(seed)
    outlines = [[_outline(font, word) for word in words] for font in map(_font, fonts)]
    drawings = [
        _write(outlines[generator.integers(len(fonts))][generator.integers(len(words))], step, jitter, generator)
        for _ in range(num)
    ]
    return Strokes(
        torch.from_numpy(numpy.concatenate(drawings).astype(numpy.float32)),
        torch.tensor([len(drawing) for drawing in drawings]),
    )


@functools.cache
def _font(name: str) -> dict[str, tuple[float, list[_Array]]]:
    """Width and strokes of each character, the strokes relative to its left end, shape (points, 2)."""
    try:
        from HersheyFonts import HersheyFonts
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "handwriting is made with Hershey-Fonts: pip install Hershey-Fonts, or pyro-kd[examples]"
        ) from error
    fonts = HersheyFonts()
    if name not in fonts.default_font_names:
        raise ValueError(f"Hershey-Fonts has no font {name!r}, but {', '.join(sorted(fonts.default_font_names))}")
    fonts.load_default_font(name)
    characters = {}
    for code in range(32, 127):
        for glyph in fonts.glyphs_for_text(chr(code)):
            strokes = [numpy.array(list(stroke), dtype=float).reshape(-1, 2) for stroke in glyph.strokes]
            left = numpy.array([glyph.left_offset, 0.0])
            characters[chr(code)] = float(glyph.char_width), [stroke - left for stroke in strokes if len(stroke)]
    return characters


def _outline(font: dict[str, tuple[float, list[_Array]]], word: str) -> list[tuple[_Array, _Array]]:
    """The strokes of a word, each with the number of the letter that every point belongs to."""
    strokes: list[tuple[_Array, _Array]] = []
    right = 0.0
    for number, character in enumerate(word):
        if character not in font:
            raise ValueError(f"the font has no character {character!r}, of the word {word!r}")
        width, pieces = font[character]
        for piece in pieces:
            places, letters = piece + numpy.array([right, 0.0]), numpy.full(len(piece), number)
            if strokes and numpy.array_equal(strokes[-1][0][-1], places[0]):
                before, of = strokes.pop()
                places, letters = numpy.concatenate([before, places[1:]]), numpy.concatenate([of, letters[1:]])
            strokes.append((places, letters))
        right += width
    if not strokes:
        raise ValueError(f"the word {word!r} leaves no trace")
    return strokes


def _write(strokes: list[tuple[_Array, _Array]], step: float, jitter: float, generator: numpy.random.Generator) -> _Array:
    """One drawing in stroke-3 form, shape (points, 3)."""
    slant, slope = generator.normal(0.0, 0.25), generator.normal(0.0, 0.03)
    width, height = numpy.exp(generator.normal(0.0, 0.15, 2))
    hand = numpy.array([[width, width * slope], [-height * slant, height]])
    astray = generator.normal(0.0, 0.7, (int(strokes[-1][1].max()) + 1, 2))
    places, pen = [], []
    for corners, letters in strokes:
        corners = corners + astray[letters]
        along = numpy.concatenate([[0.0], numpy.hypot(*numpy.diff(corners, axis=0).T).cumsum()])
        number = max(round(along[-1] / step), 1) + 1 if along[-1] > 0 else 1  # a dot is one point
        at = numpy.linspace(0.0, along[-1], number)
        places.append(numpy.stack([numpy.interp(at, along, corners[:, axis]) for axis in (0, 1)], -1))
        pen.append(numpy.arange(number) == number - 1)
    absolute = numpy.concatenate(places) @ hand
    absolute += generator.normal(0.0, jitter, absolute.shape)
    moves = numpy.diff(absolute, axis=0, prepend=absolute[:1])
    return numpy.concatenate([moves, numpy.concatenate(pen)[:, None]], -1)
