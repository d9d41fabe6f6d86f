"""Pixels against the original programs' answers, against transformers itself, and against hostile files."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neva_jax.data import image as image_module
from neva_jax.data.image import ImageProcessor
from neva_jax.errors import DataError, UserError

GOLDEN = Path(os.environ.get("NEVA_GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))
FILES = ("extreme_ironing.jpg", "gray.png", "rgba.png", "exif_rot6.jpg", "wide.png", "palette.png", "tall.png")
METHODS = {
    "hf224": (224, "square"), "hf336": (336, "square"), "llava_none_224": (224, "square"), "llava_none_336": (336, "square"),
    "nemo_square_224": (224, "square"), "nemo_other_224": (224, "square"),
    "llava_pad_224": (224, "pad"), "llava_pad_336": (336, "pad"), "nemo_pad_224": (224, "pad"),
}  # fmt: skip


def sized(size, aspect="square", **changes):
    return ImageProcessor(crop_size=(size, size), shortest_edge=size, aspect=aspect, **changes)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def answers():
    if not (GOLDEN / "images.json").exists():
        pytest.skip(f"golden answers are not here: {GOLDEN / 'images.json'} (set NEVA_GOLDEN_DIR)")
    return json.loads((GOLDEN / "images.json").read_text())["files"], np.load(GOLDEN / "images.npz")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FILES)
def test_equals_the_originals(answers, name, method):
    described, arrays = answers
    answer = described[name]["methods"][method]
    pixels = sized(*METHODS[method])((GOLDEN / "images" / name).read_bytes(), name).transpose(2, 0, 1)
    if f"{name}|{method}|u8" in arrays:
        np.testing.assert_array_equal(pixels, arrays[f"{name}|{method}|u8"])
    assert list(pixels.shape) == answer["shape"]
    assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == answer["sha256_u8"]


# ---- Against transformers, live

@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("transformers")
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    def process(data, crop_size, shortest_edge, aspect):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data)).convert("RGB")  # as LLaVA and NeVA do
        picture.info.clear()  # transformers 5 would blend on white wherever `info` still speaks of transparency; transformers 4 never did
        size = {"height": crop_size[0], "width": crop_size[1]} if shortest_edge is None else {"shortest_edge": shortest_edge}
        processor = LlavaImageProcessorPil(size=size, crop_size=dict(zip(("height", "width"), crop_size, strict=True)), do_pad=aspect == "pad")
        return processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    return process


def palette_with_transparency():
    picture = Image.fromarray(noise(40, 60)).quantize(16)
    return encoded(picture, transparency=bytes(range(0, 256, 16)))


PICTURES = {
    "rgb": lambda: encoded(Image.fromarray(noise(90, 123))),
    "jpeg": lambda: encoded(Image.fromarray(noise(333, 251)), "JPEG"),
    "progressive_gray_jpeg": lambda: encoded(Image.fromarray(noise(50, 81, 1)), "JPEG", progressive=True),
    "webp": lambda: encoded(Image.fromarray(noise(50, 81)), "WEBP", lossless=True),
    "gray": lambda: encoded(Image.fromarray(noise(30, 50, 1))),
    "bilevel": lambda: encoded(Image.fromarray(noise(30, 50, 1)).convert("1")),
    "16-bit": lambda: encoded(Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (40, 60)).astype(np.uint16))),
    "palette": palette_with_transparency,
    "palette_one_colour": lambda: encoded(Image.fromarray(noise(40, 60)).quantize(16), transparency=3),
    "LA": lambda: encoded(Image.fromarray(noise(40, 60, 2), "LA")),
    "RGBA": lambda: encoded(Image.fromarray(noise(40, 60, 4))),
    "CMYK": lambda: encoded(Image.fromarray(noise(40, 60, 4), "CMYK"), "JPEG"),
    "gif": lambda: encoded(Image.fromarray(noise(40, 60)).quantize(8), "GIF", save_all=True, append_images=[Image.new("P", (60, 40))]),
    "bmp": lambda: encoded(Image.fromarray(noise(40, 60)), "BMP"),
    "tiff": lambda: encoded(Image.fromarray(noise(40, 60)), "TIFF"),
    "1x1": lambda: encoded(Image.new("RGB", (1, 1), (1, 2, 3))),
    "1 high": lambda: encoded(Image.fromarray(noise(1, 77))),
    "3 high": lambda: encoded(Image.fromarray(noise(3, 50))),
    "1 wide": lambda: encoded(Image.fromarray(noise(77, 1))),
    "very wide": lambda: encoded(Image.fromarray(noise(5, 1999))),
    "very tall": lambda: encoded(Image.fromarray(noise(1999, 6))),
    "same": lambda: encoded(Image.fromarray(noise(56, 56))),
}
PROCESSORS = {
    "square": ((56, 56), 56, "square"),
    "pad": ((56, 56), 56, "pad"),
    "crop smaller": ((40, 33), 56, "square"),
    "crop larger": ((81, 90), 56, "square"),
    "crop larger, padded": ((81, 90), 57, "pad"),
    "stretched": ((48, 56), None, "square"),
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency", "ignore:'mode' parameter")
def test_equals_transformers(reference, kind, processor):
    data, settings = PICTURES[kind](), PROCESSORS[processor]
    pixels = ImageProcessor(settings[0], settings[1], aspect=settings[2])(data, "w")
    expected = reference(data, *settings)
    assert pixels.dtype == expected.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("crop", [(56, 56), (40, 33)])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_thin_pictures_are_resized_in_two_passes(monkeypatch, aspect, crop):
    picture = Image.fromarray(noise(4, 900) // 4 + 96)  # no black or white: nothing is clipped between the passes
    processor = ImageProcessor(crop, 56, aspect=aspect)
    wide, tall = encoded(picture), encoded(picture.transpose(Image.Transpose.TRANSPOSE))
    expected = processor(wide, "w"), processor(tall, "w")
    monkeypatch.setattr(image_module, "_MAX_WORKING", 1)
    np.testing.assert_array_equal(processor(wide, "w"), expected[0])
    difference = np.abs(processor(tall, "w").astype(int) - expected[1])
    assert difference.max() <= 2  # the passes run in the other order, and each rounds; 0 would mean that this path was not taken


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_line_of_pixels_takes_no_gigabytes(aspect, size):
    data = encoded(Image.fromarray(noise(*size)))
    assert sized(336, aspect)(data, "w").shape == (336, 336, 3)


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
    with pytest.raises(UserError, match="image_aspect_ratio"):
        sized(336, "keep")


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
OLD = {"crop_size": 336, "size": 336, "image_mean": MEAN, "image_std": STD, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
NEW = {
    "crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "image_mean": MEAN, "image_std": STD, "resample": 3, "do_center_crop": True,
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098, "do_pad": None,
    "image_processor_type": "CLIPImageProcessorFast",
}  # fmt: skip
EXPECTED = ImageProcessor((336, 336), 336, tuple(MEAN), tuple(STD))


def saved(tmp_path, fields, name="preprocessor_config.json"):
    (tmp_path / name).write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return tmp_path


def test_from_pretrained_reads_old_and_new_forms(tmp_path):
    assert ImageProcessor.from_pretrained(tmp_path) is None
    assert ImageProcessor.from_pretrained(saved(tmp_path, {"patch_size": 14}, "processor_config.json")) is None
    assert ImageProcessor.from_pretrained(saved(tmp_path, OLD)) == EXPECTED
    assert ImageProcessor.from_pretrained(saved(tmp_path, NEW)) == EXPECTED
    assert ImageProcessor.from_pretrained(saved(tmp_path, {})) == ImageProcessor()
    nested = {"patch_size": 14, "image_processor": NEW | {"crop_size": {"height": 10, "width": 12}, "size": {"height": 10, "width": 12}}}
    found = ImageProcessor.from_pretrained(saved(tmp_path, nested, "processor_config.json"))
    assert found.crop_size == (10, 12) and found.shortest_edge is None


def test_from_pretrained_aspect(tmp_path):
    saved(tmp_path, NEW | {"do_pad": True, "image_processor_type": "LlavaImageProcessor"})
    assert ImageProcessor.from_pretrained(tmp_path).aspect == "pad"
    assert ImageProcessor.from_pretrained(tmp_path, aspect="square").aspect == "square"
    assert ImageProcessor.from_pretrained(saved(tmp_path, NEW), aspect="pad").aspect == "pad"


def test_from_pretrained_reads_what_transformers_saves(tmp_path):
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == sized(336)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"do_center_crop": False}, "do_center_crop: found False, expected True"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 2}, "resample: found 2, expected 3"),
        ({"resample": "bicubic"}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
        ({"size": {"shortest_edge": 336, "longest_edge": 700}}, "size"),
        ({"size": {"height": 300, "width": 336}}, "size"),
        ({"size": 0}, "size"),
        ({"size": True}, "size"),
        ({"crop_size": "336"}, "crop_size"),
        ({"crop_size": {"height": 336}}, "crop_size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [1, 2, 3]}, "image_std"),
    ],
)
def test_from_pretrained_refuses_other_pixels(tmp_path, fields, words):
    with pytest.raises(UserError, match=words) as error:
        ImageProcessor.from_pretrained(saved(tmp_path, NEW | fields))
    assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_from_pretrained_damaged_file(tmp_path, text):
    with pytest.raises(UserError, match="preprocessor_config.json"):
        ImageProcessor.from_pretrained(saved(tmp_path, text))
