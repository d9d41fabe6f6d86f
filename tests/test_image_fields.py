"""model.data.image_aspect_ratio and apply_exif_rotation: from the config to the processor, or a sentence."""

import pytest

from configs import base
from neva_jax.build.model import image_processor
from neva_jax.config import assign, refusals
from neva_jax.errors import UserError

ASPECT = "model.data.image_aspect_ratio"


def made(**fields):
    config = base.get_config()
    for name, value in fields.items():
        assign(config, f"model.data.{name}", value)
    return config


@pytest.mark.parametrize(("value", "aspect"), [("square", "square"), ("pad", "pad"), (None, "square"), ("null", "square"), ("None", "square")])
def test_aspects_of_training(value, aspect):
    config = made(image_aspect_ratio=value)
    assert ASPECT not in refusals(config)
    assert image_processor(config).aspect == aspect


@pytest.mark.parametrize("value", ["keep", "anyres", "other"])
def test_aspects_of_the_library_alone(value):
    message = refusals(made(image_aspect_ratio=value))[ASPECT]
    assert message.startswith(f"{ASPECT} is {value!r}, expected one of square, pad, None; keep and anyres are only in neva_jax.data.image.ImageProcessor")
    assert "keep's size varies" in message and "image_newline" in message and "\n" not in message


def test_exif_rotation():
    assert not image_processor(made()).exif
    assert image_processor(made(apply_exif_rotation="true")).exif
    with pytest.raises(UserError, match="apply_exif_rotation is 'yes', expected true or false"):
        made(apply_exif_rotation="yes")


def test_a_towers_own_processor_is_told_too(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224, "crop_size": 224, "image_mean": [0.5, 0.5, 0.5]}')
    config = made(image_aspect_ratio="pad", apply_exif_rotation=True)
    assign(config, "model.mm_cfg.vision_encoder.from_pretrained", str(tmp_path))
    processor = image_processor(config)
    assert (processor.mean, processor.aspect, processor.exif) == ((0.5, 0.5, 0.5), "pad", True)
