"""LLaVA-NeXT's anyres against the tables and pixels of LLaVA, and against transformers."""

import io
import json

import numpy as np
import pytest
from helpers import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import PICTURES, encoded, noise, processed, rgb
from PIL import Image

from neva_jax.data import tiles
from neva_jax.data.image import ImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
SIDE = 56
SMALL = tuple((width // 6, height // 6) for width, height in tiles.PINPOINTS)  # a sixth of LLaVA-NeXT's, so that tests are quick
SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def anyres(pinpoints=SMALL, edge=SIDE, side=SIDE, **changes):
    return ImageProcessor((side, side), edge, aspect="anyres", image_grid_pinpoints=pinpoints, **changes)


def test_the_originals_table():
    table = json.loads(golden("images.json").read_text())["anyres"]
    assert len(table) > 10
    for row in table:
        size = tuple(row["size"])
        assert tiles.best_resolution(size) == tuple(row["best"])
        assert tiles.grid_shape(size) == tuple(row["grid_336"]) and tiles.grid_shape(size, tile=224) == tuple(row["grid_224"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES, st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8))
def test_best_resolution_equals_transformers_turned(size, pinpoints):
    select = pytest.importorskip("transformers.image_processing_utils").select_best_resolution
    assert tiles.best_resolution(size, pinpoints) == select(size[::-1], [pinpoint[::-1] for pinpoint in pinpoints])[::-1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SIZES)
def test_tiles_cover_the_canvas_row_by_row(size):
    picture = Image.new("RGB", size, (255, 255, 255))
    width, height = tiles.best_resolution(size, SMALL)
    columns, rows = tiles.grid_shape(size, SMALL, SIDE)
    parts = np.stack([np.asarray(tile) for tile in tiles.cut(picture, SMALL, SIDE)])
    assert parts.shape == (rows * columns, SIDE, SIDE, 3)
    white = parts.reshape(rows, columns, SIDE, SIDE, 3).swapaxes(1, 2).reshape(height, width, 3).all(-1)
    across, down = white.any(0), white.any(1)
    assert white.sum() == across.sum() * down.sum() and (across.all() or down.all())  # one rectangle, as wide or as high as the canvas
    for line in (across, down):
        left, right = line.argmax(), line[::-1].argmax()
        assert left == right or left + 1 == right


def test_equals_a_picture_cut_by_hand():
    picture = Image.fromarray(noise(60, 150))
    pixels = anyres(((112, 56), (168, 112)))(encoded(picture), "w")
    canvas = np.zeros((112, 168, 3), np.uint8)
    canvas[22:90] = np.asarray(picture.resize((168, 68), Image.Resampling.BICUBIC))  # 60 * 168 / 150 = 67.2, and up
    expected = [picture.resize((56, 56), Image.Resampling.BICUBIC)] + [canvas[top : top + 56, left : left + 56] for top in (0, 56) for left in (0, 56, 112)]
    np.testing.assert_array_equal(pixels, np.stack([np.asarray(part) for part in expected]))


@pytest.mark.parametrize(("edge", "width"), [(SIDE, SIDE), (60, 40)])
@pytest.mark.parametrize("kind", PICTURES)
def test_equals_transformers(tmp_path, kind, edge, width):
    """Through its own saved file, so that (height, width) and the ties are those of transformers."""
    pytest.importorskip("transformers")
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [list(size) for size in SMALL]  # the same list, which means another order here
    settings = {"size": {"shortest_edge": edge}, "crop_size": {"height": SIDE, "width": width}, "image_grid_pinpoints": pinpoints}
    theirs = LlavaNextImageProcessorPil(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    assert ours.shortest_edge == edge and ours.image_grid_pinpoints == tuple(size[::-1] for size in SMALL)
    data = PICTURES[kind]()
    np.testing.assert_array_equal(ours(data, "w"), processed(theirs, rgb(data)))


def test_llava_and_transformers_disagree_on_a_small_square():
    data = PICTURES["same"]()
    tall, wide = anyres()(data, "w"), anyres(tuple(size[::-1] for size in SMALL))(data, "w")
    assert tall.shape == wide.shape == (3, SIDE, SIDE, 3)
    assert not tall[1, : SIDE // 2].any() and tall[1, SIDE // 2 :].any()  # in the middle of 1 x 2 tiles: black above
    assert not wide[1, :, : SIDE // 2].any() and wide[1, :, SIDE // 2 :].any()


def test_a_canvas_that_is_no_multiple_ends_in_black():
    """As LLaVA's crop does; transformers stretches the rest to a whole tile, so such a list of its is refused."""
    pixels = anyres(((SIDE, 100),))(encoded(Image.new("RGB", (56, 100), (255, 255, 255))), "w")
    assert pixels.shape == (3, SIDE, SIDE, 3) and pixels[:2].all() and pixels[2, :44].all() and not pixels[2, 44:].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_lines_and_points(size):
    file = io.BytesIO()
    Image.new("RGB", size, (255, 255, 255)).save(file, "PNG")
    pixels = anyres()(file.getvalue(), "w")
    assert pixels.shape == (3, SIDE, SIDE, 3) and pixels[0].all() and pixels[1:].any()


def test_a_tower_without_shortest_edge():
    assert anyres(edge=None)(PICTURES["jpeg"](), "w").tobytes() == anyres()(PICTURES["jpeg"](), "w").tobytes()
