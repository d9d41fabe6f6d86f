"""The projector against torch.nn, and mlp_downsample against a plain statement of NeMo's and VILA's block, in both orders of its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Array, randomise, read_weights

from neva_jax.convert.hf import projector_rules
from neva_jax.convert.keymap import KeyMap
from neva_jax.errors import UserError
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.multimodal import NevaConfig
from neva_jax.models.projector import Projector, downsample
from neva_jax.transforms.select import nest

IN, OUT = 6, 10


def torch_projector(kind: str):
    """NeVA's own construction (state keys under `mm_projector` included), without the rearrangement of mlp_downsample."""
    from torch import nn

    if kind == "identity":
        return nn.Sequential()
    if kind == "linear":
        return nn.Linear(IN, OUT)
    if kind.startswith("mlp_downsample"):
        return nn.Sequential(nn.Identity(), nn.LayerNorm(4 * IN), nn.Linear(4 * IN, OUT), nn.GELU(), nn.Linear(OUT, OUT))
    modules = [nn.Linear(IN, OUT)]
    for _ in range(int(kind[3]) - 1):
        modules += [nn.GELU(), nn.Linear(OUT, OUT)]
    return nn.Sequential(*modules)


def plain_downsample(x: np.ndarray, column_major: bool) -> np.ndarray:
    """[M, h * h, E] -> [M, ceil(h/2)**2, 4E], one block after the other."""
    grid = round(x.shape[1] ** 0.5)
    half = (grid + 1) // 2
    padded = np.zeros((len(x), 2 * half, 2 * half, x.shape[2]), x.dtype)
    padded[:, :grid, :grid] = x.reshape(len(x), grid, grid, -1)
    blocks = []
    for first in range(half):
        for second in range(half):
            r, c = (2 * second, 2 * first) if column_major else (2 * first, 2 * second)
            blocks.append(np.concatenate([padded[:, r, c], padded[:, r, c + 1], padded[:, r + 1, c], padded[:, r + 1, c + 1]], -1))
    return np.stack(blocks, 1)


def our_projector(kind: str, theirs, out: int = OUT):
    tensors = {f"projector.{name}": Array(p.detach().numpy()) for name, p in theirs.named_parameters()}
    key_map = KeyMap(projector_rules(kind, tensors), {})
    key_map.check(tensors, list(key_map.rules), "test")
    return key_map, *read_weights(lambda: Projector(kind, IN, out, rngs=nnx.Rngs(0)), tensors, key_map, "projector/")


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample", "mlp_downsample_rowmajor"])
@pytest.mark.parametrize("grid", [4, 5])
def test_features_and_gradients(kind, grid):
    import torch

    theirs = randomise(torch_projector(kind))
    key_map, graphdef, params = our_projector(kind, theirs)
    features = np.random.default_rng(0).normal(size=(2, grid**2, IN)).astype(np.float32)
    arranged = plain_downsample(features, kind == "mlp_downsample") if kind.startswith("mlp_downsample") else features
    out = theirs(torch.tensor(arranged))
    out.square().mean().backward()

    def loss(params):
        y = nnx.merge(graphdef, nest(params))(features)
        return jnp.mean(jnp.square(y)), y

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(ours, out.detach(), atol=1e-5)
    expected = {f"projector.{name}": Array(p.grad.numpy()) for name, p in theirs.named_parameters()}
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, key_map.read(expected, f"projector/{path}", grad.shape, "gradients"), atol=1e-4, err_msg=path)


def test_identity():
    _, graphdef, params = our_projector("identity", torch_projector("identity"), out=IN)
    features = np.random.default_rng(0).normal(size=(2, 4, IN)).astype(np.float32)
    assert params == {}
    np.testing.assert_array_equal(nnx.merge(graphdef, {})(features), features)
    with pytest.raises(UserError, match="identity joins equal widths; found a tower of width 6 and a language model of width 10"):
        Projector("identity", IN, OUT, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("column_major, starts", [(True, [0, 8, 2, 10]), (False, [0, 2, 8, 10])])
def test_order_of_downsampled_tokens(column_major, starts):
    """On a 4x4 grid of numbered features: which block comes when, and what stands in it."""
    numbered = jnp.arange(16.0).reshape(1, 16, 1)
    np.testing.assert_array_equal(downsample(numbered, column_major=column_major)[0], [[s, s + 1, s + 4, s + 5] for s in starts])


@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize("grid", [1, 2, 3, 5, 6])
def test_downsample_of_every_grid(grid, column_major):
    x = np.random.default_rng(0).normal(size=(2, 3, grid**2, 5)).astype(np.float32)
    ours = downsample(jnp.asarray(x), column_major=column_major)
    np.testing.assert_array_equal(ours.reshape(6, -1, 20), plain_downsample(x.reshape(6, grid**2, 5), column_major))


def test_an_odd_grid_is_padded_at_its_end():
    numbered = jnp.arange(1.0, 10.0).reshape(1, 9, 1)
    np.testing.assert_array_equal(downsample(numbered, column_major=False)[0], [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]])


def test_class_token_and_downsample_do_not_go_together():
    with pytest.raises(UserError, match=r"found 17 features an image; set .*vision_select_feature to patch"):
        downsample(jnp.zeros((1, 17, IN)), column_major=True)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "conv", ""])
def test_an_unknown_kind(kind):
    with pytest.raises(UserError, match="mm_mlp_adapter_type .* is not one of identity, linear, mlp_downsample"):
        Projector(kind, IN, OUT, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear", "mlp_downsample", "mlp_downsample_rowmajor"])
@pytest.mark.parametrize("grid", [4, 5])
def test_media_length_is_the_number_of_vectors(kind, grid):
    """What the data lays out for an image is what the projector makes of it."""
    vision = ClipVisionConfig(hidden_size=IN, ffn_hidden_size=8, num_layers=1, num_attention_heads=2, image_size=7 * grid, patch_size=7)
    features = jax.ShapeDtypeStruct((1, vision.num_tokens, IN), jnp.float32)
    out = jax.eval_shape(lambda features: Projector(kind, IN, OUT, rngs=nnx.Rngs(0))(features), features)
    assert NevaConfig(llm=None, vision=vision, projector=kind).media_length == out.shape[1]
