"""Pixels against transformers itself, of every kind of picture; what the originals leave undefined; hostile files."""

import dataclasses
import io
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers import ROOT
from pictures import PICTURES, encoded, exif, noise, processed, rgb
from PIL import Image, ImageOps

from neva_jax.data import image as image_module
from neva_jax.data.image import ImageProcessor
from neva_jax.errors import DataError, UserError

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency", "ignore:Corrupt EXIF data")


def sized(size, aspect="square", **changes):
    return ImageProcessor(crop_size=(size, size), shortest_edge=size, aspect=aspect, **changes)


PROCESSORS = {
    "square": ((56, 56), 56, "square"),
    "pad": ((56, 56), 56, "pad"),
    "crop smaller": ((40, 33), 56, "square"),
    "crop larger": ((81, 90), 56, "square"),
    "crop larger, padded": ((81, 90), 57, "pad"),
    "stretched": ((48, 56), None, "square"),
    "padded, then stretched": ((48, 56), None, "pad"),
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", PICTURES)
def test_equals_transformers(kind, processor):
    pytest.importorskip("transformers")
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    data, (crop_size, edge, aspect) = PICTURES[kind](), PROCESSORS[processor]
    crop = dict(zip(("height", "width"), crop_size, strict=True))
    theirs = LlavaImageProcessorPil(size={"shortest_edge": edge} if edge else crop, crop_size=crop, do_pad=aspect == "pad")
    np.testing.assert_array_equal(ImageProcessor(crop_size, edge, aspect=aspect)(data, "w"), processed(theirs, rgb(data)))


@pytest.mark.parametrize("kind", PICTURES)
def test_keep_equals_transformers_with_nevas_edge(kind):
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    picture = rgb(data := PICTURES[kind]())
    edge = int(min(448 / (max(picture.size) / min(picture.size)), 224))
    pixels = sized(56, "keep")(data, "w")
    np.testing.assert_array_equal(pixels, processed(CLIPImageProcessorPil(), picture, do_center_crop=False, size={"shortest_edge": edge}))
    assert min(pixels.shape[:2]) == edge and max(pixels.shape[:2]) <= 448 and pixels.flags.writeable


@pytest.mark.parametrize(("size", "shape"), [((1, 448), (1, 448)), ((1, 449), (1, 448)), ((60_000, 2), (448, 1))])
def test_keep_of_a_line(size, shape):
    """NeVA's shortest edge is 0 from 449 times as long as thin: Pillow refuses that."""
    assert sized(56, "keep")(encoded(Image.fromarray(noise(*size))), "w").shape == (*shape, 3)


@pytest.mark.parametrize("crop", [(56, 56), (40, 33)])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_thin_pictures_are_resized_in_two_passes(monkeypatch, aspect, crop):
    picture = Image.fromarray(noise(4, 900) // 4 + 96)  # no black or white: nothing is clipped between the passes
    processor = ImageProcessor(crop, 56, aspect=aspect)
    wide, tall = encoded(picture), encoded(picture.transpose(Image.Transpose.TRANSPOSE))
    expected = processor(wide, "w"), processor(tall, "w")
    monkeypatch.setattr(image_module, "_MAX_WORKING", 1)
    difference = np.abs(processor(wide, "w").astype(int) - expected[0])
    assert difference.max() <= 1 and difference.mean() < 1e-3
    difference = np.abs(processor(tall, "w").astype(int) - expected[1])
    assert 0 < difference.max() <= 2  # the passes run in the other order, and each rounds; 0 would mean that this path was not taken


def test_a_line_of_pixels_takes_no_gigabytes():
    """In a process of its own, which ends with the most memory it ever had. 1 x 65,536 is the thinnest that is read at all."""
    script = """if True:
        import io
        from PIL import Image
        from neva_jax.data.image import ImageProcessor
        for size in (65536, 1), (1, 65536):
            file = io.BytesIO()
            Image.new("RGB", size, (250, 120, 1)).save(file, "PNG")
            for aspect in "square", "pad", "keep", "anyres":
                for edge in 336, None:
                    pixels = ImageProcessor((336, 336), edge, aspect=aspect)(file.getvalue(), "w")
                    assert pixels[..., 0].max() == (122 if aspect == "pad" else 250), (size, aspect, edge)  # nothing is left of a line on a huge canvas
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 256 * 2**10  # KiB; importing takes 30 MiB of it, and the largest canvas 88


# ---- EXIF


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation_is_an_option(kind, orientation):
    picture = Image.fromarray(noise(24, 40))
    options = {"lossless": True} if kind == "WEBP" else {}
    plain, marked = encoded(picture, kind, **options), encoded(picture, kind, exif=exif(orientation), **options)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(marked))))
    turned = sized(56, "keep", exif=True)(marked, "w")
    np.testing.assert_array_equal(turned, sized(56, "keep")(upright, "w"))
    assert (turned.shape == (373, 224, 3)) == (orientation in (5, 6, 7, 8))
    if kind != "TIFF":  # which Pillow turns in any case
        np.testing.assert_array_equal(sized(56, "keep")(marked, "w"), sized(56, "keep")(plain, "w"))


@pytest.mark.parametrize(
    "values", [b"nonsense", b"MM\0*\0\0\0\x08\0\x05abc", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0"]
)
def test_exif_that_cannot_be_read_turns_nothing(values):
    data = encoded(Image.fromarray(noise(24, 40)), "JPEG", exif=b"Exif\0\0" + values)
    np.testing.assert_array_equal(sized(56, exif=True)(data, "w"), sized(56)(data, "w"))


# ---- Hostile files


def png_header(width, height):
    """A PNG of a few dozen bytes that claims to be large."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


WHOLE = encoded(Image.fromarray(noise(64, 64)))
JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "no picture: it starts with b'<!DOCTYPE"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (WHOLE[: len(WHOLE) // 2], "cut off or damaged"),
        (JPEG[: len(JPEG) // 2], "cut off or damaged"),
        (WHOLE[:100] + bytes(50) + WHOLE[150:], "cut off or damaged"),
        (JPEG[:20], "no picture|cut off"),
        (png_header(9000, 9000), "9000 x 9000 pixels, expected at most 33554432"),
        (png_header(11_000, 11_000), "11000 x 11000 pixels"),
        (png_header(50_000, 50_000), "more than 33554432 pixels"),
        (png_header(70_000, 1), "sides up to 65536"),
        (png_header(64, 64), "cut off or damaged"),
        (png_header(0, 64), "no picture|cut off"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_files(data, words):
    with pytest.raises(DataError, match=words) as error:
        sized(56)(data, "data.json: record 3: image 'a.png'")
    assert str(error.value).startswith("data.json: record 3: image 'a.png': ") and "\n" not in str(error.value)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    data = encoded(Image.new("RGB", (101, 100)))
    assert sized(8, max_pixels=10_100)(data, "w").shape == (8, 8, 3)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="101 x 100 pixels"):
        sized(8, max_pixels=10_099)(data, "w")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_any_damage_is_a_data_error():
    random = np.random.default_rng(0)
    processor, refused = sized(16), 0
    for data in (WHOLE, JPEG, encoded(Image.fromarray(noise(20, 20)), "GIF"), encoded(Image.fromarray(noise(20, 20)), "TIFF")):
        for _ in range(60):
            damaged = bytearray(data)
            for position in random.integers(0, len(data), 4):
                damaged[position] = random.integers(256)
            try:
                assert processor(bytes(damaged), "w").shape == (16, 16, 3)
            except DataError:
                refused += 1
    assert refused > 30


# ---- Settings


def test_processor_is_a_value():
    processor = sized(336, "pad")
    assert pickle.loads(pickle.dumps(processor)) == processor and hash(processor)
    with pytest.raises(dataclasses.FrozenInstanceError):
        processor.aspect = "square"
    with pytest.raises(UserError, match="image_aspect_ratio: found 'other', expected 'square', 'pad', 'keep' or 'anyres'"):
        sized(336, "other")
    different = [sized(336), processor, sized(336, exif=True), sized(336, image_grid_pinpoints=((336, 336),)), sized(224), sized(336, mean=(0.5,) * 3)]
    assert len(set(map(repr, different))) == len(different)  # prepared pictures are kept under it
