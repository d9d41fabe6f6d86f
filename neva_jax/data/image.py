"""A picture's bytes -> the pixels that CLIP sees, uint8[H, W, 3], equal to Hugging Face's CLIPImageProcessor to the last bit (Pillow backend).

Rescaling and normalisation wait for the device: uint8 is a quarter of the bytes. EXIF rotation is not applied and transparency is dropped, not
blended, because LLaVA and NeVA open pictures with `convert("RGB")`; transformers 5 blends on white when it is given the picture itself.
Gives up: LLaVA-NeXT's tiles, NeVA's `keep` (its shape differs from picture to picture), animation (the first frame counts).
"""

import io
import json
import math
import os
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from PIL import Image

from neva_jax.errors import DataError, UserError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # none that starts another program, as EPS does
_MAX_SIDE = 2**16  # pixels, JPEG's own limit
_MAX_WORKING = 64 * 2**20  # pixels of the padded or enlarged picture held at once: 192 MiB

# The rest of what a preprocessor config may say about pixels, and the one value of each that is done here.
_FIXED = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
_FIXED |= {"resample": 3, "rescale_factor": 1 / 255, "do_pad": False}
_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "LlavaImageProcessor")


@dataclass(frozen=True)
class ImageProcessor:
    """crop_size: (h, w) of the result, in pixels. mean, std: per channel, of values in 0..1; std is used on the device only.

    shortest_edge: what the shorter side is resized to before the centre crop, in pixels; None: both sides to crop_size, whatever the proportions.
    aspect: "square" crops the middle of a long picture; "pad" first puts it on a square of the mean's colour, as LLaVA-1.5's finetuning does.
    max_pixels: a file whose header says more is refused before it is decoded.
    """

    CLIP_MEAN: ClassVar = (0.48145466, 0.4578275, 0.40821073)
    CLIP_STD: ClassVar = (0.26862954, 0.26130258, 0.27577711)

    crop_size: tuple[int, int] = (224, 224)
    shortest_edge: int | None = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect: str = "square"
    max_pixels: int = 32 * 2**20

    def __post_init__(self):
        if self.aspect not in ("square", "pad"):
            raise UserError(f"model.data.image_aspect_ratio: found {self.aspect!r}, expected 'square' or 'pad'")

    @classmethod
    def from_pretrained(cls, directory, aspect=None):
        """From `processor_config.json` (nested image_processor, transformers 5) or `preprocessor_config.json`; None where neither speaks of pictures.

        aspect: overrides the file's own, which is "pad" for a LlavaImageProcessor with do_pad and else "square".
        Raises UserError for a processor that would make other pixels than this class.
        """
        path, fields = _read_config(directory)
        if fields is None:
            return None
        kind = fields.pop("image_processor_type", None) or fields.pop("feature_extractor_type", None) or _TYPES[0]
        if kind.removesuffix("Fast") not in _TYPES:
            raise UserError(f"{path}: image_processor_type: found {kind!r}, expected one of {', '.join(_TYPES)}")
        is_padded = kind.startswith("Llava") and fields.pop("do_pad", False)
        for name, expected in _FIXED.items():
            found = fields.get(name, expected)
            if not (isinstance(found, (bool, int, float)) and math.isclose(found, expected, rel_tol=1e-6)):
                raise UserError(f"{path}: {name}: found {found!r}, expected {expected!r}; another value would change the pixels and is not supported")
        crop_size = _crop_size(fields.get("crop_size", 224), path)
        return cls(
            crop_size, _shortest_edge(fields.get("size", 224), crop_size, path), _colour(fields, "image_mean", cls.CLIP_MEAN, path),
            _colour(fields, "image_std", cls.CLIP_STD, path), aspect or ("pad" if is_padded else "square"),
        )  # fmt: skip

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        """An encoded picture -> uint8[H, W, 3]. Raises DataError, which opens with `where`, for what is no whole picture or is too large.

        Defined where the originals are not: transformers 4 takes a picture 1 or 3 pixels high for channels first and fails or returns noise; here,
        as in transformers 5, it is an ordinary picture. One so long and thin that its padded or enlarged whole exceeds 64 Mpixel (gigabytes in the
        originals) is resized one axis at a time: the same pixels if it is wide; if it is tall, other roundings between the passes.
        """
        picture = self._decode(data, where)
        square = (max(picture.size),) * 2
        if math.prod(square if self.aspect == "pad" else self._target(picture.size)) > _MAX_WORKING:
            return self._center_crop(self._resize_thin(picture))
        if self.aspect == "pad":
            picture = self._on_canvas(picture, square)
        return self._center_crop(picture.resize(self._target(picture.size), Image.Resampling.BICUBIC))

    def _decode(self, data, where):
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > self.max_pixels or max(width, height) > _MAX_SIDE:
                    raise DataError(f"{where}: {width} x {height} pixels, expected at most {self.max_pixels} and sides up to {_MAX_SIDE}; shrink the picture")
                return picture.convert("RGB")
        except DataError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise DataError(f"{where}: more than {self.max_pixels} pixels; shrink the picture") from None
        except Image.UnidentifiedImageError:
            found = f"starts with {data[:12]!r}" if data else "is empty"
            raise DataError(f"{where}: no picture: it {found}, expected {', '.join(_FORMATS)}; fetch or convert it again") from None
        except Exception as error:  # decoders answer hostile bytes with nearly every exception there is
            raise DataError(f"{where}: the picture is cut off or damaged ({type(error).__name__}: {str(error)[:80]!r}); fetch it again") from None

    def _target(self, size):
        """(width, height) after resizing; transformers' `get_resize_output_image_size(default_to_square=False)`."""
        if self.shortest_edge is None:
            return self.crop_size[::-1]
        short, long = self.shortest_edge, int(self.shortest_edge * max(size) / min(size))
        return (short, long) if size[0] <= size[1] else (long, short)

    def _on_canvas(self, picture, size):
        """The picture in the middle of a canvas of the mean's colour. size: (width, height)."""
        canvas = Image.new("RGB", size, tuple(int(mean * 255) for mean in self.mean))
        canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
        return canvas

    def _resize_thin(self, picture):
        """Pillow resizes by a horizontal and then a vertical pass: padding or cropping between the two gives the same pixels without the huge whole."""
        width, height = picture.size
        if height > width:
            turned = replace(self, crop_size=self.crop_size[::-1])
            return turned._resize_thin(picture.transpose(Image.Transpose.TRANSPOSE)).transpose(Image.Transpose.TRANSPOSE)
        if self.aspect == "pad":
            new_width, new_height = self._target((width, width))
            band = self._on_canvas(picture.resize((new_width, height), Image.Resampling.BICUBIC), (new_width, width))
        else:
            full_width, new_height = self._target(picture.size)
            new_width = min(self.crop_size[1], full_width)
            left = (full_width - new_width) // 2
            band = picture.resize((full_width, height), Image.Resampling.BICUBIC).crop((left, 0, left + new_width, height))
        return band.resize((new_width, new_height), Image.Resampling.BICUBIC)

    def _center_crop(self, picture):
        """A picture -> uint8[H, W, 3], with zeros around where it is smaller; the roundings are those of transformers' `center_crop`."""
        pixels = np.asarray(picture)
        crop = np.zeros((*self.crop_size, 3), np.uint8)
        (into_rows, rows), (into_columns, columns) = map(_overlap, pixels.shape[:2], self.crop_size)
        crop[into_rows, into_columns] = pixels[rows, columns]
        return crop


def _overlap(size, crop):
    """One axis, in pixels -> (slice of the crop, slice of the picture)."""
    if size >= crop:
        start = (size - crop) // 2
        return slice(0, crop), slice(start, start + crop)
    start = (crop - size + 1) // 2
    return slice(start, start + size), slice(0, size)


def _read_config(directory):
    """-> (path, what it says about pictures) or (None, None). A nested image_processor goes before preprocessor_config.json, as in transformers 5."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                fields = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from None
        if isinstance(fields, dict) and name == "processor_config.json":
            fields = fields.get("image_processor")
            if fields is None:
                continue
        if not isinstance(fields, dict):
            raise UserError(f"{path}: found {type(fields).__name__}, expected an object that describes an image processor")
        return path, {key: value for key, value in fields.items() if value is not None}  # null means the default
    return None, None


def _crop_size(value, path):
    sides = (value.get("height"), value.get("width")) if isinstance(value, dict) else (value, value)
    if not all(map(_is_side, sides)):
        raise UserError(f"{path}: crop_size: found {value!r}, expected a whole number of pixels or height and width")
    return sides


def _shortest_edge(value, crop_size, path):
    edge = value.get("shortest_edge") if isinstance(value, dict) and set(value) == {"shortest_edge"} else value
    if _is_side(edge):
        return edge
    if value == {"height": crop_size[0], "width": crop_size[1]}:
        return None
    raise UserError(f"{path}: size: found {value!r}, expected a whole number, shortest_edge alone, or the height and width of crop_size {crop_size}")


def _colour(fields, name, default, path):
    value = fields.get(name, default)
    if not (isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value)):
        raise UserError(f"{path}: {name}: found {value!r}, expected three numbers from 0 to 1")
    return tuple(map(float, value))


def _is_side(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_SIDE
