"""Bars as long as their counts, in text and in pixels."""

import numpy as np
import pytest

from neva_jax.evaluation.histogram import BAR, HEIGHT, WIDTH, picture, text_bars, ticks
from neva_jax.evaluation.sheet import GREEN

TWO = {"edges": [0, 16, 32], "counts": [300, 100]}


def columns(page, colour):
    """How many pixels of a colour each column has."""
    return (page == colour).all(axis=2).sum(axis=0)


def test_bars_of_text():
    assert text_bars(TWO, width=6).split("\n") == [" 0-15 ██████ 300", "16-31 ██     100"]
    assert text_bars({"edges": [7, 8, 9, 10], "counts": [1000, 1, 0]}, width=4).split("\n") == ["7 ████ 1000", "8 ▏       1", "9         0"]


def test_bars_of_pixels():
    page = picture([("a title", TWO, ())])
    assert page.shape == (HEIGHT, WIDTH, 3) and page.dtype == np.uint8
    heights = columns(page, BAR)
    left, right = heights[: WIDTH // 2].max(), heights[WIDTH // 2 + 60 :].max()
    assert left == pytest.approx(3 * right, abs=3) and left > HEIGHT / 2
    assert not columns(page, GREEN).any() and (page[:40] != 255).any(), "the title"


def test_marks_stand_at_their_values_even_outside_of_all_bars():
    marked = np.flatnonzero(columns(picture([("", TWO, (16, 64))]), GREEN))
    plain = np.flatnonzero(columns(picture([("", TWO, (16, 32))]), GREEN))
    assert len(marked) == len(plain) == 2 and marked[1] == plain[1] < WIDTH
    assert marked[0] - 74 == pytest.approx((plain[0] - 74) / 2, abs=2)


def test_panels_lie_below_each_other():
    one = {"edges": [3, 4], "counts": [5]}
    page = picture([("", TWO, ()), ("", one, ())])
    assert np.array_equal(page[:HEIGHT], picture([("", TWO, ())])) and np.array_equal(page[HEIGHT:], picture([("", one, ())]))


@pytest.mark.parametrize(("low", "high", "count", "expected"), [
    (0, 10, 4, [0, 5, 10]), (0, 3, 10, [0, 1, 2, 3]), (52, 112, 10, [60, 70, 80, 90, 100, 110]), (0, 0, 4, [0]), (0, 123456, 4, [0, 50000, 100000]),
])  # fmt: skip
def test_ticks_are_round(low, high, count, expected):
    assert list(ticks(low, high, count)) == expected
