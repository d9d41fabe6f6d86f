"""Pictures beside their words, as one PNG: training examples with supervised words in colour, or questions with answer and truth."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, SIDE, MARGIN = 460, 112, 8  # of a cell, of its pictures, around both; in pixels
BLACK, GREY, GREEN, RED = (20, 20, 20), (130, 130, 130), (10, 130, 60), (200, 30, 30)


def sheet(cells: list[tuple[list[np.ndarray], list[tuple[str, tuple[int, int, int]]]]], columns: int = 2) -> np.ndarray:
    """cells: (pictures uint8[H, W, 3], [(text, colour)]) -> uint8[H, W, 3]"""
    drawn = [_cell(pictures, runs) for pictures, runs in cells]
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    page = Image.new("RGB", (WIDTH * columns, max(1, sum(heights))), "white")
    for row, top in zip(rows, np.cumsum([0, *heights]), strict=False):
        for i, cell in enumerate(row):
            page.paste(cell, (WIDTH * i, int(top)))
    return np.asarray(page)


def _cell(pictures, runs) -> Image.Image:
    font = ImageFont.load_default(13)
    left = MARGIN + len(pictures) * (SIDE + MARGIN)
    lines = _wrap(runs, font, WIDTH - left - MARGIN)
    height = max(SIDE if pictures else 0, 17 * len(lines)) + 2 * MARGIN
    cell = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(cell)
    for i, picture in enumerate(pictures):
        shown = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST if len(picture) < SIDE else Image.Resampling.BICUBIC)
        cell.paste(shown, (MARGIN + i * (SIDE + MARGIN), MARGIN))
    for y, line in enumerate(lines):
        x = left
        for word, colour in line:
            draw.text((x, MARGIN + 17 * y), word, fill=colour, font=font)
            x += font.getlength(word)
    draw.line([(0, height - 1), (WIDTH, height - 1)], fill=(225, 225, 225))
    return cell


def _wrap(runs, font, width):
    """[(text, colour)] -> lines of [(word, colour)] no wider than `width` (a longer word stands alone)."""
    lines, room = [[]], width
    for text, colour in runs:
        for i, paragraph in enumerate(text.split("\n")):
            if i:
                lines.append([])
                room = width
            for word in paragraph.replace(" ", " \0").split("\0"):
                need = font.getlength(word)
                if need > room and lines[-1]:
                    lines.append([])
                    room = width
                lines[-1].append((word, colour))
                room -= need
    return [line for line in lines if line]
