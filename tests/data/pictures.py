"""Pictures of every kind, made in memory, and what a transformers processor makes of one."""

import io
import warnings

import numpy as np
from PIL import Image


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def rgb(data):
    """As LLaVA and NeVA open it. Without `info`: wherever that still speaks of transparency, transformers 5 would blend on white; transformers 4 never did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.info.clear()
    return picture


def processed(processor, picture, **options):
    """A transformers processor and a PIL picture -> uint8, channels last."""
    pixels = processor(picture, do_rescale=False, do_normalize=False, return_tensors="np", **options)["pixel_values"][0]
    assert pixels.dtype == np.uint8
    return np.moveaxis(pixels, -3, -1)


def palette_with_transparency():
    picture = Image.fromarray(noise(40, 60)).quantize(16)
    return encoded(picture, transparency=bytes(range(0, 256, 16)))


def exif(orientation):
    values = Image.Exif()
    values[0x0112] = orientation
    return values


PICTURES = {
    "rgb": lambda: encoded(Image.fromarray(noise(90, 123))),
    "jpeg": lambda: encoded(Image.fromarray(noise(333, 251)), "JPEG"),
    "progressive_gray_jpeg": lambda: encoded(Image.fromarray(noise(50, 81, 1)), "JPEG", progressive=True),
    "exif-rotated": lambda: encoded(Image.fromarray(noise(70, 41)), "JPEG", exif=exif(6)),
    "webp": lambda: encoded(Image.fromarray(noise(50, 81)), "WEBP", lossless=True),
    "gray": lambda: encoded(Image.fromarray(noise(30, 50, 1))),
    "bilevel": lambda: encoded(Image.fromarray(noise(30, 50, 1)).convert("1")),
    "16-bit": lambda: encoded(Image.fromarray(np.random.default_rng(0).integers(0, 400, (40, 60)).astype(np.uint16))),
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
