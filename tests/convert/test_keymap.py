"""The key map both ways, bit by bit, theirs -> ours -> theirs and ours -> theirs -> ours, for every shape of model; and what it says of misfits."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from helpers import Array

from neva_jax.convert.hf import key_map
from neva_jax.convert.keymap import COPY, TRANSPOSE, KeyMap, Rule, chain, pad_rows, patch_conv
from neva_jax.errors import UserError
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.transforms.select import describe

LLM = LlamaConfig(
    vocab_size=50, padded_vocab_size=64, num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=4, head_dim=6, rope=Rope(6)
)
VISION = ClipVisionConfig(hidden_size=16, ffn_hidden_size=20, num_layers=2, num_attention_heads=2, image_size=21, patch_size=7)
VARIANTS = {
    "mha": {},
    "gqa": dict(num_query_groups=2),
    "wide heads": dict(head_dim=10, num_query_groups=1),
    "tied": dict(tied=True),
    "biases": dict(bias=True),
    "qkv biases": dict(qkv_bias=True),
    "layernorm, plain mlp": dict(normalization="layernorm1p", activation="squared-relu"),
}
PROJECTORS = ("mlp2x_gelu", "identity", "linear", "mlp1x_gelu", "mlp3x_gelu", "mlp_downsample", "mlp_downsample_rowmajor")


def model(projector="mlp2x_gelu", **llm):
    vision = dataclasses.replace(VISION, hidden_size=24) if projector == "identity" else VISION
    return NevaConfig(dataclasses.replace(LLM, **llm), vision, projector)


def weights_of(config):
    return describe(lambda: neva(config, rngs=nnx.Rngs(0)))[1]


def random_arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def read(keys, tensors, weights):
    return {path: keys.read(tensors, path, w.shape, "test") for path, w in weights.items()}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


CONFIGS = {name: model(**llm) for name, llm in VARIANTS.items()} | {projector: model(projector) for projector in PROJECTORS}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_has_every_weight_of_the_model_and_nothing_else(name):
    assert set(key_map(CONFIGS[name]).rules) == set(weights_of(CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_equal_in_every_bit(name):
    config = CONFIGS[name]
    keys, weights = key_map(config), weights_of(config)
    ours = random_arrays({path: w.shape for path, w in weights.items()})
    for path in {"llm/embed_tokens/embedding", "llm/lm_head/kernel"} & set(ours):  # padding is not exported; it comes back as zeros
        ours[path][np.s_[50:] if "embed" in path else np.s_[:, 50:]] = 0
    theirs = keys.write(ours)
    assert all(array.flags.c_contiguous for array in theirs.values()), "safetensors writes memory as it lies"
    equal(read(keys, {name: Array(x) for name, x in theirs.items()}, weights), ours)

    theirs = random_arrays({name: x.shape for name, x in theirs.items()})
    tensors = {name: Array(x) for name, x in theirs.items()}
    keys.check(tensors, list(weights), "test")
    equal(keys.write(read(keys, tensors, weights)), theirs)


def test_names_and_layouts_are_torchs():
    """Beside the round trip, which a wrong but invertible table would pass: one number of each kind, followed by hand."""
    keys = key_map(model(num_query_groups=2))
    weights = weights_of(model(num_query_groups=2))
    ours = random_arrays({path: w.shape for path, w in weights.items()})
    theirs = keys.write(ours)
    assert theirs["llm.layers.2.self_attn.k_proj.weight"].shape == (12, 24)
    assert theirs["llm.layers.2.self_attn.k_proj.weight"][5, 7] == ours["llm/layers/self_attn/k_proj/kernel"][2, 7, 5]
    assert theirs["llm.embed_tokens.weight"].shape == theirs["llm.lm_head.weight"].shape == (50, 24)
    assert theirs["llm.lm_head.weight"][49, 3] == ours["llm/lm_head/kernel"][3, 49]
    assert theirs["vision_encoder.encoder.layers.1.mlp.fc1.weight"][4, 9] == ours["vision_encoder/layers/mlp/up_proj/kernel"][1, 9, 4]
    patch = theirs["vision_encoder.embeddings.patch_embedding.weight"]
    assert patch.shape == (16, 3, 7, 7)
    assert patch[11, 2, 4, 5] == ours["vision_encoder/patch_embedding/kernel"][(4 * 7 + 5) * 3 + 2, 11]


OPERATIONS = [(COPY, (3, 4)), (TRANSPOSE, (3, 4)), (patch_conv(4), (5, 3, 4, 4)), (pad_rows(6, 8), (6, 3)), (chain(pad_rows(6, 8), TRANSPOSE), (6, 3))]


@pytest.mark.parametrize("op, shape", OPERATIONS)
def test_operations_invert(op, shape):
    x = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(op.inverse(op.forward(x)), x)


def test_padded_rows():
    x = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(pad_rows(3, 5).forward(x), [*x, [0, 0], [0, 0]])
    np.testing.assert_array_equal(pad_rows(2, 2).forward(x), x[:2], err_msg="their own padding is cut")
    np.testing.assert_array_equal(pad_rows(2, 3).forward(x), x)


def tensors_of(config):
    return {name: Array(x) for name, x in key_map(config).write({p: np.zeros(w.shape, np.float32) for p, w in weights_of(config).items()}).items()}


def test_missing_and_unknown_names_are_listed_together():
    tensors, keys = tensors_of(model()), key_map(model())
    keys.check(tensors, list(keys.rules), "here")
    del tensors["llm.layers.1.mlp.up_proj.weight"], tensors["llm.norm.weight"]
    tensors |= {"llm.layers.3.mlp.up_proj.weight": Array(np.zeros(1)), "llm.lm_head.bias": Array(np.zeros(1))}
    with pytest.raises(UserError) as error:
        keys.check(tensors, list(keys.rules), "here")
    message = str(error.value)
    assert message.startswith("here: 2 tensors are missing (llm.layers.1.mlp.up_proj.weight, llm.norm.weight)")
    assert "2 are not part of such a model (llm.layers.3.mlp.up_proj.weight, llm.lm_head.bias)" in message and "\n" not in message


def test_a_long_list_is_cut():
    with pytest.raises(UserError, match=r"^here: 73 tensors are missing \(([^,]+, ){4}\.\.\.\);"):
        key_map(model()).check({}, list(key_map(model()).rules), "here")


@pytest.mark.parametrize(
    "name, shape, says",
    [
        ("llm.layers.1.self_attn.q_proj.weight", (24, 20), r"\[24, 20\] gives llm/layers/self_attn/q_proj/kernel the shape \[20, 24\], .* \[24, 24\]"),
        ("llm.embed_tokens.weight", (50, 22), r"\[50, 22\] gives llm/embed_tokens/embedding the shape \[64, 22\], .* \[64, 24\]"),
        ("vision_encoder.embeddings.patch_embedding.weight", (16, 3, 14, 14), r"\[16, 3, 14, 14\] gives .* the shape \[588, 16\], .* \[147, 16\]"),
        ("vision_encoder.embeddings.position_embedding.weight", (17, 16), r"\[17, 16\] gives .* the shape \[17, 16\], .* \[10, 16\]"),
        ("projector.linear_2.bias", (20,), r"\[20\] gives projector/2/bias the shape \[20\], .* \[24\]"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(name, shape, says):
    tensors = tensors_of(model()) | {name: Array(np.zeros(shape, np.float32))}
    with pytest.raises(UserError, match=f"^here: {name} {says}") as error:
        for path, weight in weights_of(model()).items():
            key_map(model()).read(tensors, path, weight.shape, "here")
    assert "\n" not in str(error.value)


def test_their_dtype_is_kept():
    import ml_dtypes

    keys = KeyMap([Rule("llm.{i}", "llm/x", TRANSPOSE)], {"llm": 2})
    tensors = {f"llm.{i}": Array(np.full((2, 3), i, ml_dtypes.bfloat16)) for i in range(2)}
    array = keys.read(tensors, "llm/x", (2, 3, 2), "test")
    assert array.dtype == ml_dtypes.bfloat16 and keys.write({"llm/x": array})["llm.1"].dtype == ml_dtypes.bfloat16
