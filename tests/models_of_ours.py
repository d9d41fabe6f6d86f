"""Small models in our own format with random weights, as the converter's --to orbax leaves them: written in milliseconds, of any family."""

import json
from pathlib import Path

import numpy as np
import runs
from flax import nnx

from neva_jax.build.data import build_tokenizer
from neva_jax.build.model import neva_config
from neva_jax.checkpoint.stream import open_lazily, save_lazily
from neva_jax.config import to_json
from neva_jax.models.multimodal import neva
from neva_jax.transforms.select import describe

FAMILIES = {  # fields of the config that make a family
    "llama": {},
    "grouped": {"model.num_attention_heads": 4, "model.num_query_groups": 2, "model.num_layers": 2, "model.hidden_size": 32},
    "multi-query, other head width": {"model.num_attention_heads": 4, "model.num_query_groups": 1, "model.kv_channels": 6},
    "tied": {"model.share_embeddings_and_output_weights": True},
    "llama 3.1's rope": {"model.scale_positional_embedding": True, "model.rotary_base": 5e5, "model.rope_scaling_factor": 8.0},
    "stretched rope": {"model.seq_len_interpolation_factor": 2.0},
    "biases": {"model.bias": True},
    "rows of the vocabulary that no token has": {"model.override_vocab_size": 1000},
    "class token, last layer": {"model.mm_cfg.vision_encoder.vision_select_feature": "cls_patch"},
    "geglu": {"model.activation": "fast-geglu"},
    "siglip": {"model.mm_cfg.vision_encoder.model_type": "siglip_vision_model", "model.mm_cfg.vision_encoder.class_token_length": 0},
}
NEMO_ONLY = {  # what transformers' LLaVA cannot compute
    "linear projector": {"model.mm_cfg.mm_mlp_adapter_type": "linear"},
    "downsampling projector": {"model.mm_cfg.mm_mlp_adapter_type": "mlp_downsample"},
    "nvgpt": {"model.normalization": "layernorm1p", "model.rotary_percentage": 0.5, "model.activation": "squared-relu"},
    "qkv biases, layernorm": {"model.qkv_bias": True, "model.normalization": "layernorm", "model.activation": "gelu"},
}


def ours(directory: Path, parts=("llm", "vision_encoder", "projector"), seed: int = 0, dtype=np.float32, **fields) -> Path:
    """fields: of the config, with their dots."""
    config = runs.tiny(directory, **{name.replace(".", "__"): value for name, value in fields.items()})
    model = neva_config(config, build_tokenizer(config).vocab_size)
    rng, weights = np.random.default_rng(seed), describe(lambda: neva(model, rngs=nnx.Rngs(0)))[1]
    arrays = {path: (0.3 * rng.normal(size=w.shape) + path.endswith("scale")).astype(dtype) for path, w in weights.items() if path.split("/")[0] in parts}
    directory.mkdir(parents=True, exist_ok=True)
    save_lazily(directory / "base", arrays)
    (directory / "config.json").write_text(json.dumps(to_json(config)))
    (directory / "base.json").write_text(json.dumps({"copied": sorted(arrays), "published": [], "whole": True}))
    return directory


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in open_lazily(Path(directory) / "base").items()}


def assert_same_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], vocab: int) -> None:
    """Bit for bit, but for rows of the vocabulary's padding, which belong to no token and are in no other program's file."""
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        if path == "llm/embed_tokens/embedding":
            np.testing.assert_array_equal(found[path][:vocab], array[:vocab], err_msg=path, strict=True)
        elif path == "llm/lm_head/kernel":
            np.testing.assert_array_equal(found[path][:, :vocab], array[:, :vocab], err_msg=path, strict=True)
        else:
            np.testing.assert_array_equal(found[path], array, err_msg=path, strict=True)
