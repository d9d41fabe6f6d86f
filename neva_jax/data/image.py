"""A picture's bytes -> the pixels that a tower sees, uint8, equal to Hugging Face's CLIP, LLaVA, LLaVA-NeXT and SigLIP processors to the last bit (Pillow).

Rescaling and normalisation wait for the device: uint8 is a quarter of the bytes. Transparency is dropped, not blended, and 16-bit values above 255 are
white, because LLaVA and NeVA open pictures with `convert("RGB")`; transformers 5 blends on white when it is given the picture itself. EXIF rotation is an
option, which no original has; a TIFF's is always applied, by Pillow. Gives up: animation (the first frame counts).
"""

import io
import json
import math
import os
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from PIL import Image

from neva_jax.data import tiles
from neva_jax.errors import DataError, UserError

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # none that starts another program, as EPS does
_MAX_SIDE = 2**16  # pixels, JPEG's own limit
_MAX_WORKING = 64 * 2**20  # pixels of the padded or enlarged picture held at once: 192 MiB
_KEEP_SHORT, _KEEP_LONG = 224, 448  # pixels, NeVA's limits for "keep", whatever the tower
_ORIENTATION = 0x0112  # EXIF's tag; what undoes each of its values but 1
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip

# The rest of what a preprocessor config may say about pixels, and the one value of each that is done here.
_FIXED = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
_FIXED |= {"resample": 3, "rescale_factor": 1 / 255, "do_pad": False}
_LLAVA, _NEXT, _SIGLIP = "LlavaImageProcessor", "LlavaNextImageProcessor", "SiglipImageProcessor"
_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", _LLAVA, _NEXT, _SIGLIP)


@dataclass(frozen=True)
class ImageProcessor:
    """crop_size: (h, w) of the result, in pixels. mean, std: per channel, of values in 0..1; std is used on the device only.

    shortest_edge: what the shorter side is resized to before the centre crop, in pixels; None: both sides to crop_size, whatever the proportions.
    aspect: "square" crops the middle of a long picture, as LLaVA's None does and NeVA for any word it does not know; "pad" first puts it on a square of
        the mean's colour, as LLaVA-1.5's finetuning does; "keep" is NeVA's, proportions kept and nothing cropped, the long side at most 448 and the
        short one 224, whatever crop_size; "anyres" is LLaVA-NeXT's, the whole picture stretched and then the tiles of its enlarged canvas.
    max_pixels: a file whose header says more is refused before it is decoded.
    image_grid_pinpoints: (width, height) of anyres's canvases; exif: turn a picture as its EXIF says, if that can be read.
    """

    CLIP_MEAN: ClassVar = (0.48145466, 0.4578275, 0.40821073)
    CLIP_STD: ClassVar = (0.26862954, 0.26130258, 0.27577711)

    crop_size: tuple[int, int] = (224, 224)
    shortest_edge: int | None = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    aspect: str = "square"
    max_pixels: int = 32 * 2**20
    image_grid_pinpoints: tuple[tuple[int, int], ...] = tiles.PINPOINTS
    exif: bool = False

    def __post_init__(self):
        if self.aspect not in ("square", "pad", "keep", "anyres"):
            raise UserError(f"model.data.image_aspect_ratio: found {self.aspect!r}, expected 'square', 'pad', 'keep' or 'anyres'")

    @classmethod
    def from_pretrained(cls, directory, aspect=None):
        """From `processor_config.json` (nested image_processor, transformers 5) or `preprocessor_config.json`; None where neither speaks of pictures.

        aspect: overrides the file's own, which is "pad" for a LlavaImageProcessor with do_pad, "anyres" for a LlavaNextImageProcessor and else "square".
        Raises UserError for a processor that would make other pixels than this class.
        """
        path, fields = _read_config(directory)
        if fields is None:
            return None
        kind = str(fields.pop("image_processor_type", None) or fields.pop("feature_extractor_type", None) or _TYPES[0]).removesuffix("Fast")
        if kind not in _TYPES:
            raise UserError(f"{path}: image_processor_type: found {kind!r}, expected one of {', '.join(_TYPES)}")
        pads = kind in (_LLAVA, _NEXT) and fields.pop("do_pad", False)  # LLaVA-NeXT's evens out the number of tiles of a batch, and changes no pixel
        crops = kind == _NEXT or fields.get("do_center_crop", kind != _SIGLIP) is not False
        if not crops:
            fields.pop("do_center_crop", None)
        for name, expected in _FIXED.items():
            found = fields.get(name, expected)
            if not (isinstance(found, (bool, int, float)) and math.isclose(found, expected, rel_tol=1e-6)):
                raise UserError(f"{path}: {name}: found {found!r}, expected {expected!r}; another value would change the pixels and is not supported")
        size = fields.get("size", 224)
        if not crops and not (isinstance(size, dict) and set(size) == {"height", "width"}):
            raise UserError(f"{path}: size: found {size!r}, expected height and width, since do_center_crop is off; pixels of varying shape are not supported")
        crop_size = _sides("crop_size", fields.get("crop_size", 224), path) if crops else _sides("size", size, path)
        mean, std = (cls.CLIP_MEAN, cls.CLIP_STD) if kind != _SIGLIP else ((0.5,) * 3,) * 2
        return cls(
            crop_size, _shortest_edge(size, crop_size, path), _colour(fields, "image_mean", mean, path), _colour(fields, "image_std", std, path),
            aspect or ("anyres" if kind == _NEXT else "pad" if pads else "square"),
            image_grid_pinpoints=_pinpoints(fields, crop_size[0], path) if kind == _NEXT else tiles.PINPOINTS,
        )  # fmt: skip

    def __call__(self, data: bytes, where: str) -> np.ndarray:
        """An encoded picture -> uint8[H, W, 3]; of varying size with "keep"; [1 + tiles, H, W, 3] with "anyres".

        Raises DataError, which opens with `where`, for what is no whole picture or is too large.

        Defined where the originals are not: transformers 4 takes a picture 1 or 3 pixels high for channels first and fails or returns noise; here,
        as in transformers 5, it is an ordinary picture. One so long and thin that its padded or enlarged whole exceeds 64 Mpixel (gigabytes in the
        originals) is resized one axis at a time, and only where it is kept: a wide one differs by a rounding here and there, a tall one by roundings
        between the passes. One more than 448 times as long as thin, whose "keep" would be 0 pixels thin, gets 1 x 448.
        """
        picture = self._decode(data, where)
        if self.aspect == "keep":
            return np.array(picture.resize(_kept_size(picture.size), Image.Resampling.BICUBIC))
        if self.aspect == "anyres":
            whole = (self.shortest_edge, self.shortest_edge) if self.shortest_edge else self.crop_size[::-1]
            parts = picture.resize(whole, Image.Resampling.BICUBIC), *tiles.cut(picture, self.image_grid_pinpoints, self.crop_size[0])
            return np.stack([self._fit(part) for part in parts])
        return self._fit(picture)

    def _fit(self, picture):
        """A picture -> uint8[H, W, 3] of crop_size."""
        whole = (max(picture.size),) * 2 if self.aspect == "pad" else picture.size
        target = self._target(whole)
        if math.prod(whole if self.aspect == "pad" else target) > _MAX_WORKING:
            return self._center_crop(self._resize_thin(picture))
        if picture.width > picture.height and target[0] * whole[1] <= whole[0] * target[1]:  # Pillow's horizontal pass comes first
            return self._center_crop(self._resize_wide(picture))
        if self.aspect == "pad":
            picture = self._on_canvas(picture, whole)
        return self._center_crop(picture.resize(target, Image.Resampling.BICUBIC))

    def _decode(self, data, where):
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > self.max_pixels or max(width, height) > _MAX_SIDE:
                    raise DataError(f"{where}: {width} x {height} pixels, expected at most {self.max_pixels} and sides up to {_MAX_SIDE}; shrink the picture")
                picture.load()
                pixels = picture if picture.mode == "RGB" else picture.convert("RGB")
                # Read after decoding: by then Pillow has turned a TIFF and forgotten its tag.
                method = _UPRIGHT.get(picture.getexif().get(_ORIENTATION)) if self.exif else None
                return pixels if method is None else pixels.transpose(method)
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
        """(width, height) after resizing."""
        return _resized(size, self.shortest_edge) if self.shortest_edge else self.crop_size[::-1]

    def _on_canvas(self, picture, size):
        """The picture in the middle of a canvas of the mean's colour. size: (width, height)."""
        canvas = Image.new("RGB", size, tuple(int(mean * 255) for mean in self.mean))
        canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
        return canvas

    def _resize_wide(self, picture):
        """Pillow resizes in two passes, the cheaper one first: where that is the horizontal one, what is cropped or padded before the second costs it nothing
        and changes no pixel."""
        height = picture.height
        if self.aspect == "pad":
            new_width, new_height = self._target((picture.width, picture.width))
            band = self._on_canvas(picture.resize((new_width, height), Image.Resampling.BICUBIC), (new_width, picture.width))
        else:
            full_width, new_height = self._target(picture.size)
            new_width = min(self.crop_size[1], full_width)
            left = (full_width - new_width) // 2
            band = picture.resize((full_width, height), Image.Resampling.BICUBIC).crop((left, 0, left + new_width, height))
        return band.resize((new_width, new_height), Image.Resampling.BICUBIC)

    def _resize_thin(self, picture):
        """Like `_resize_wide`, without the whole width either: like pixels, without the huge whole."""
        width, height = picture.size
        if height > width:
            turned = replace(self, crop_size=self.crop_size[::-1])
            return turned._resize_thin(picture.transpose(Image.Transpose.TRANSPOSE)).transpose(Image.Transpose.TRANSPOSE)
        if self.aspect == "pad":
            return self._resize_wide(picture)
        full_width, new_height = self._target(picture.size)
        new_width = min(self.crop_size[1], full_width)
        scale = width / full_width
        left, right = ((full_width + side * new_width) // 2 * scale for side in (-1, 1))  # of what is kept, in the picture's pixels
        reach = 2 * max(scale, 1) + 1  # of the bicubic filter; Pillow keeps `box` in 32 bits, which is exact enough near 0 only
        first, last = max(0, int(left - reach)), min(width, int(right + reach) + 1)
        part = picture.crop((first, 0, last, height))
        band = part.resize((new_width, height), Image.Resampling.BICUBIC, box=(left - first, 0, min(right - first, part.width), height))
        return band.resize((new_width, new_height), Image.Resampling.BICUBIC)

    def _center_crop(self, picture):
        """A picture -> uint8[H, W, 3], with zeros around where it is smaller; the roundings are those of transformers' `center_crop`."""
        pixels = np.asarray(picture)
        crop = np.zeros((*self.crop_size, 3), np.uint8)
        (into_rows, rows), (into_columns, columns) = map(_overlap, pixels.shape[:2], self.crop_size)
        crop[into_rows, into_columns] = pixels[rows, columns]
        return crop


def _resized(size, edge):
    """(width, height) with `edge` for the shorter side; transformers' `get_resize_output_image_size(default_to_square=False)`."""
    long = int(edge * max(size) / min(size))
    return (edge, long) if size[0] <= size[1] else (long, edge)


def _kept_size(size):
    """(width, height) of NeVA's "keep", with its roundings."""
    edge = int(min(_KEEP_LONG / (max(size) / min(size)), _KEEP_SHORT))
    width, height = _resized(size, max(edge, 1))
    return min(width, _KEEP_LONG), min(height, _KEEP_LONG)


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


def _sides(name, value, path):
    sides = (value.get("height"), value.get("width")) if isinstance(value, dict) else (value, value)
    if not all(map(_is_side, sides)):
        raise UserError(f"{path}: {name}: found {value!r}, expected a whole number of pixels or height and width")
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


def _pinpoints(fields, tile, path):
    """(width, height) each; the file has (height, width)."""
    value = fields.get("image_grid_pinpoints", tiles.PINPOINTS)
    if not (isinstance(value, (list, tuple)) and value and all(isinstance(p, (list, tuple)) and len(p) == 2 and all(map(_is_side, p)) for p in value)):
        raise UserError(f"{path}: image_grid_pinpoints: found {value!r}, expected pairs [height, width] of pixels")
    if bad := [p for p in value if any(side % tile for side in p) or math.prod(p) > _MAX_WORKING]:
        raise UserError(f"{path}: image_grid_pinpoints: found {bad[0]!r}, expected multiples of the tile's {tile} pixels, {_MAX_WORKING} pixels at most")
    return tuple((width, height) for height, width in value)


def _is_side(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_SIDE
