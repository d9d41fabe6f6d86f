"""LLaVA-NeXT's "anyres": which canvas a picture goes on, and the tiles that the canvas is cut into.

Sizes are (width, height), as in Pillow and LLaVA; transformers writes (height, width), in a model's `image_grid_pinpoints` too. The two share the published
list, whose order decides between equals: LLaVA puts a small square on the tall canvas, transformers on the wide one. Whose pinpoints these are says which is
meant. Gives up: merging the tiles' features, which needs the model's image_newline.
"""

import math

from PIL import Image

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA-NeXT's


def best_resolution(size: tuple[int, int], pinpoints=PINPOINTS) -> tuple[int, int]:
    """The canvas that keeps most of a picture's pixels; of equals the one with the least left over, then the first."""

    def kept(canvas):
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return pixels, pixels - math.prod(canvas)

    return max(pinpoints, key=kept)


def grid_shape(size: tuple[int, int], pinpoints=PINPOINTS, tile: int = 336) -> tuple[int, int]:
    """(columns, rows) of whole tiles on a picture's canvas. LLaVA's `cut` makes one more where a canvas is no multiple of the tile."""
    width, height = best_resolution(size, pinpoints)
    return width // tile, height // tile


def cut(picture: Image.Image, pinpoints=PINPOINTS, tile: int = 336) -> list[Image.Image]:
    """The tiles, row by row, of a picture as large as its canvas allows, in the middle of black; they are black beyond the canvas."""
    width, height = best_resolution(picture.size, pinpoints)
    by_width, by_height = width / picture.width, height / picture.height
    if by_width < by_height:
        new_width, new_height = width, min(math.ceil(picture.height * by_width), height)
    else:
        new_width, new_height = min(math.ceil(picture.width * by_height), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize((new_width, new_height), Image.Resampling.BICUBIC), ((width - new_width) // 2, (height - new_height) // 2))
    return [canvas.crop((left, top, left + tile, top + tile)) for top in range(0, height, tile) for left in range(0, width, tile)]
