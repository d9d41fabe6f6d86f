"""What several tests need: the golden folder, random torch models, and our modules filled from them through the real key map."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from neva_jax.convert import hf
from neva_jax.models.multimodal import NevaConfig
from neva_jax.transforms.select import describe

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("NEVA_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))


def golden(name: str) -> Path:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"golden answers are not here: {path} (set NEVA_GOLDEN_DIR)")
    return path


def randomise(model, seed: int = 0):
    """Every parameter of a torch model gets random values, biases and norms too: else parity proves nothing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3) * noise)
    return model.eval()


class Array:
    """An array where a lazy tensor of a file is expected."""

    def __init__(self, array):
        self.array, self.shape = np.asarray(array), tuple(array.shape)

    def read(self):
        return self.array


def read_weights(make, tensors: dict, key_map, prefix: str = ""):
    """make() -> module, described and never run; its weights come from `tensors` through the key map -> graphdef, {path: float32 array}.

    prefix: what the module is of a whole model: "llm/", "vision_encoder/", "projector/", or "" for all of it.
    """
    graphdef, weights = describe(make)
    return graphdef, {path: np.asarray(key_map.read(tensors, prefix + path, w.shape, "test"), np.float32) for path, w in weights.items()}


def neva_config(directory, projector: str = "mlp2x_gelu", *, padded: int | None = None, **changes) -> NevaConfig:
    """A NevaConfig read from a Hugging Face directory's own config.json; `llm` and `vision` in changes replace fields."""
    from neva_jax.models.clip import ClipVisionConfig
    from neva_jax.models.llama import LlamaConfig

    config = hf.read_config(directory)
    text = hf.text_fields(config["text"] or {})
    llm = LlamaConfig(**text, padded_vocab_size=padded or text["vocab_size"])
    vision = ClipVisionConfig(**hf.vision_fields(config["vision"] or {"image_size": 28, "patch_size": 14}))
    return NevaConfig(dataclasses.replace(llm, **changes.get("llm", {})), dataclasses.replace(vision, **changes.get("vision", {})), projector)
