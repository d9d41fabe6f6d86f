"""Histograms to look at: bars of text for a terminal, and one PNG with a panel for each. Bins are as wide as each other: {"edges": [n + 1], "counts": [n]}."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from neva_jax.evaluation.sheet import BLACK, GREEN, GREY

EIGHTHS = " ▏▎▍▌▋▊▉█"
WIDTH, HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 900, 260, 44, 34, 74, 24  # of a panel and of its margins, in pixels
WIDEST = 80  # pixels of a bar
BAR, FAINT = (86, 130, 200), (228, 228, 228)


def text_bars(histogram: dict, width: int = 50) -> str:
    """A line a bin: its range, its bar (at most `width` characters, none for zero alone), its count."""
    edges, counts = histogram["edges"], histogram["counts"]
    ranges = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in zip(edges, edges[1:], strict=False)]
    lines = []
    for name, count in zip(ranges, counts, strict=True):
        eighths = max(-(-8 * width * count // max(counts)), count > 0)
        bar = EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        lines.append(f"{name:>{max(map(len, ranges))}} {bar:<{width}} {count:>{len(str(max(counts)))}}")
    return "\n".join(lines)


def picture(panels: list[tuple[str, dict, tuple[int, ...]]]) -> np.ndarray:
    """panels: (title, histogram, values to mark by a line) -> uint8[H, W, 3], one below the other."""
    page = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for i, (title, histogram, marks) in enumerate(panels):
        page.paste(_panel(title, histogram, marks), (0, HEIGHT * i))
    return np.asarray(page)


def _panel(title: str, histogram: dict, marks) -> Image.Image:
    edges, counts = histogram["edges"], histogram["counts"]
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font, small = ImageDraw.Draw(panel), ImageFont.load_default(15), ImageFont.load_default(12)
    floor, highest = HEIGHT - BOTTOM, max(counts)

    right = max(edges[-1], *marks, 0)

    def x(value):
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - edges[0]) / (right - edges[0])

    def y(count):
        return floor - (floor - TOP) * count / highest

    draw.text((LEFT, 10), title, fill=BLACK, font=font)
    for count in ticks(0, highest, 4):
        draw.line([(LEFT, y(count)), (WIDTH - RIGHT, y(count))], fill=FAINT)
        draw.text((LEFT - 8, y(count)), f"{count:,}", fill=GREY, font=small, anchor="rm")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            middle, half = x((low + high) / 2), min(x(high) - x(low), WIDEST) / 2
            draw.rectangle([middle - half + 1, min(y(count), floor - 1), max(middle + half - 1, middle - half + 1), floor], fill=BAR)
    whole = edges[1] - edges[0] == 1  # a bin a value: its name stands below the middle of its bar
    for value in ticks(edges[0], right - whole, 10):
        draw.text((x(value + whole / 2), floor + 6), f"{value:,}", fill=GREY, font=small, anchor="ma")
    for mark in marks:
        for top in range(TOP, floor, 8):
            draw.line([(x(mark), top), (x(mark), min(top + 4, floor))], fill=GREEN)
    draw.line([(LEFT, floor), (WIDTH - RIGHT, floor)], fill=BLACK)
    return panel


def ticks(low: int, high: int, count: int) -> range:
    """Round whole numbers from `low` to `high`, about `count` of them."""
    steps = (step * 10**power for power in range(20) for step in (1, 2, 5))
    step = next(step for step in steps if step * count >= high - low)
    return range(-(-low // step) * step, high + 1, step)
