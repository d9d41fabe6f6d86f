"""A tower's own preprocessor file -> an ImageProcessor that makes the tower's pixels, or one sentence on why it cannot be."""

import importlib
import json

import numpy as np
import pytest
from pictures import PICTURES, processed, rgb

from neva_jax.data.image import ImageProcessor
from neva_jax.errors import UserError

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


SIGLIP = {  # google/siglip-so400m-patch14-384
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}  # fmt: skip


def test_from_pretrained_siglip(tmp_path):
    expected = ImageProcessor((384, 384), None, (0.5,) * 3, (0.5,) * 3)
    assert ImageProcessor.from_pretrained(saved(tmp_path, SIGLIP)) == expected
    bare = {"image_processor_type": "SiglipImageProcessorFast", "size": SIGLIP["size"]}  # the means are the class's own
    assert ImageProcessor.from_pretrained(saved(tmp_path, bare)) == expected
    assert ImageProcessor.from_pretrained(saved(tmp_path, SIGLIP), aspect="pad").aspect == "pad"


def test_from_pretrained_llava_next(tmp_path):
    fields = NEW | {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
    found = ImageProcessor.from_pretrained(saved(tmp_path, fields))
    assert found.aspect == "anyres" and found.crop_size == (336, 336)
    assert found.image_grid_pinpoints == ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))  # (width, height): a square picture goes wide
    found = ImageProcessor.from_pretrained(saved(tmp_path, fields | {"image_grid_pinpoints": [[336, 672], [1344, 336]]}))
    assert found.image_grid_pinpoints == ((672, 336), (336, 1344))


TOWERS = {  # what a transformers class is made with
    "clip": ("clip", "CLIPImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
    "clip, of its own": (
        "clip", "CLIPImageProcessor",
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 40, "width": 50}, "image_mean": MEAN, "image_std": STD},
    ),
    "clip, stretched": (
        "clip", "CLIPImageProcessor",
        {"size": {"height": 42, "width": 56}, "crop_size": {"height": 42, "width": 56}},
    ),
    "clip, stretched and uncropped": ("clip", "CLIPImageProcessor", {"size": {"height": 42, "width": 56}, "do_center_crop": False}),
    "llava": ("llava", "LlavaImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "do_pad": True}),
    "siglip": ("siglip", "SiglipImageProcessor", {"size": {"height": 56, "width": 56}}),
    "siglip, long": ("siglip", "SiglipImageProcessor", {"size": {"height": 42, "width": 56}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["rgb", "jpeg", "RGBA", "CMYK", "1x1", "very wide"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_what_transformers_saves_makes_its_pixels(tmp_path, tower, kind):
    pytest.importorskip("transformers")
    model, name, settings = TOWERS[tower]
    theirs = getattr(importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}"), f"{name}Pil")(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_pretrained(tmp_path)
    assert list(ours.mean) == list(theirs.image_mean) and list(ours.std) == list(theirs.image_std)
    data = PICTURES[kind]()
    np.testing.assert_array_equal(ours(data, "w"), processed(theirs, rgb(data)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"do_center_crop": False}, "size: found {'shortest_edge': 336}, expected height and width, since do_center_crop is off"),
        ({"do_center_crop": "no"}, "do_center_crop: found 'no', expected True"),
        ({"do_center_crop": False, "size": {"height": 0, "width": 336}}, "size"),
        ({"do_center_crop": False, "image_processor_type": "LlavaNextImageProcessor"}, "do_center_crop: found False, expected True"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 2}, "resample: found 2, expected 3"),
        ({"resample": "bicubic"}, "resample"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type: found 'ViTImageProcessor', expected one of CLIPImageProcessor"),
        ({"image_processor_type": 3}, "image_processor_type"),
        ({"image_processor_type": "SiglipImageProcessor", "do_center_crop": None}, "size"),
        *(
            ({"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints}, "image_grid_pinpoints")
            for pinpoints in ([], "[[336, 672]]", [336, 672], [[336]], [[336, 0]], [[336, 400]], [[33600, 33600]])
        ),
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
