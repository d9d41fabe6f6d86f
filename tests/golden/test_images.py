"""Pixels against what NeMo, LLaVA and Hugging Face made of the stored pictures, to the last bit, in every way that one may prepare them."""

import hashlib
import json

import numpy as np
import pytest
from helpers import golden

from neva_jax.data.image import ImageProcessor

ASPECTS = {
    "hf": "square", "llava_none": "square", "llava_pad": "pad", "llava_anyres": "anyres",
    "nemo_square": "square", "nemo_pad": "pad", "nemo_keep": "keep", "nemo_other": "square",
}  # fmt: skip
SIZES = {"llava_anyres": (336,)}
METHODS = {
    f"{name}{'' if name == 'hf' else '_'}{size}": ImageProcessor((size, size), size, aspect=aspect)
    for name, aspect in ASPECTS.items()
    for size in SIZES.get(name, (224, 336))
}


@pytest.fixture(scope="module")
def answers():
    return json.loads(golden("images.json").read_text())["files"], np.load(golden("images.npz"))


def test_every_stored_way_is_known(answers):
    described, _ = answers
    assert len(described) >= 7
    assert {method for file in described.values() for method in file["methods"]} <= METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_equals_the_originals(answers, method):
    described, arrays = answers
    processor = METHODS[method]
    for name, file in described.items():
        pixels = processor(golden(f"images/{name}").read_bytes(), name)
        answer = file["methods"].get(method, {"error": "not stored"})
        if "error" in answer:  # 1 x 1, one pixel high: defined here
            assert pixels.dtype == np.uint8 and (processor.aspect == "keep" or pixels.shape[-3:] == (*processor.crop_size, 3))
            continue
        first = np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
        assert list(first.shape) == answer["shape"], name
        assert hashlib.sha256(first.tobytes()).hexdigest() == answer["sha256_u8"], name
        values = ((pixels / 255 - processor.mean) / processor.std).astype(np.float32)
        assert abs(values.mean() - answer["mean"]) < 1e-5 and abs(values.std() - answer["std"]) < 1e-5, name


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_equals_the_stored_arrays(answers):
    """The same without a hash: where a decoder of another version rounds otherwise, this says by how much."""
    _, arrays = answers
    assert len(arrays.files) > 40
    for key in arrays.files:
        name, method, form = key.split("|")
        processor = METHODS[method]
        pixels = np.moveaxis(processor(golden(f"images/{name}").read_bytes(), name), -1, -3)
        if form != "u8":
            pixels = (pixels / 255 - np.array(processor.mean)[:, None, None]) / np.array(processor.std)[:, None, None]
        step = {"stride8": 8 if pixels.ndim == 3 else 16}.get(form, 1)
        difference = np.abs(arrays[key].astype(np.float64) - pixels[..., ::step, ::step])
        assert difference.max() <= (1e-3 if form == "f16" else 1e-6) and difference.mean() < 1e-3, key
