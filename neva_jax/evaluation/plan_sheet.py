"""One PNG of a planner's sweep: a bar a mesh and micro-batch, memory by kind against the card, and the speed that the formula expects."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from neva_jax.evaluation.histogram import FAINT, ticks
from neva_jax.evaluation.plan_report import KINDS, mesh_name
from neva_jax.evaluation.sheet import BLACK, GREEN, GREY, RED

WIDTH, ROW, TOP, BOTTOM, LEFT, RIGHT = 980, 24, 78, 40, 250, 150  # of the page, of a row, and of the margins, in pixels
COLOURS = dict(zip(KINDS, [(168, 190, 224), (86, 130, 200), (120, 160, 110), (222, 178, 94), (196, 112, 96)], strict=True))


def sweep_sheet(rows: list[dict], device: str, num_devices: int) -> np.ndarray:
    """rows: of Planner.sweep -> uint8[H, W, 3]"""
    page = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + BOTTOM), "white")
    draw, font, small = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(12)
    card, floor = rows[0]["memory_gib"]["device"], page.height - BOTTOM
    right = 1.25 * card

    def x(gib: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(gib, right) / right

    proof = "compiled, not timed" if rows[0]["compiled"] else "estimated, not compiled"
    draw.text((12, 10), f"{num_devices} x {device}: GiB a GPU by mesh and micro-batch ({proof})", fill=BLACK, font=font)
    place = 12
    for kind, name in KINDS.items():
        draw.rectangle([place, 42, place + 12, 54], fill=COLOURS[kind])
        draw.text((place + 18, 48), name, fill=GREY, font=small, anchor="lm")
        place += 34 + int(draw.textlength(name, font=small))
    draw.text((WIDTH - 12, TOP - 8), "samples/s/GPU", fill=GREY, font=small, anchor="rb")
    for gib in ticks(0, int(right), 8):
        draw.line([(x(gib), TOP), (x(gib), floor)], fill=FAINT)
        draw.text((x(gib), floor + 6), str(gib), fill=GREY, font=small, anchor="ma")
    for number, row in enumerate(rows):
        _draw_row(draw, small, x, TOP + ROW * number, row)
    for name, gib in (("usable", rows[0]["usable_gib"]), ("card", card)):
        draw.line([(x(gib), TOP - 4), (x(gib), floor)], fill=GREEN)
        draw.text((x(gib), floor + 22), name, fill=GREEN, font=small, anchor="ma" if name == "card" else "ra")
    return np.asarray(page)


def _draw_row(draw: ImageDraw.ImageDraw, font, x, top: int, row: dict) -> None:
    middle, start = top + ROW // 2, 0.0
    draw.text((LEFT - 10, middle), f"{mesh_name(row['mesh'])}, micro-batch {row['micro_batch_size']}", fill=BLACK, font=font, anchor="rm")
    for kind in KINDS:
        size = row["memory_gib"][kind]
        if x(start + size) - x(start) >= 1:
            draw.rectangle([x(start), top + 4, x(start + size), top + ROW - 4], fill=COLOURS[kind])
        start += size
    speed = f"{row['samples_per_second_per_gpu']:.1f}" if row["fits"] else "does not fit"
    draw.text((WIDTH - 12, middle), speed, fill=BLACK if row["fits"] else RED, font=font, anchor="rm")
