"""CLIP's vision tower against transformers (torch, CPU, fp32): every hidden state within 1e-5, gradients within 1e-4."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Array, golden, neva_config, randomise, read_weights

from neva_jax.convert import hf
from neva_jax.errors import UserError
from neva_jax.layers.attention import attend
from neva_jax.models.clip import ClipVision
from neva_jax.parallel.layer_runner import scan_layers
from neva_jax.transforms.select import nest

BASE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4)
VARIANTS = {
    "quick_gelu": {},
    "gelu": dict(hidden_act="gelu", layer_norm_eps=1e-3),
    "tanh gelu": dict(hidden_act="gelu_pytorch_tanh"),
    "odd sizes": dict(hidden_size=36, intermediate_size=40, num_attention_heads=4, image_size=21, patch_size=7),  # head dim 9, grid 3
    "one head": dict(hidden_size=20, num_attention_heads=1, num_hidden_layers=2, image_size=10, patch_size=2),
    "a rest of pixels": dict(image_size=18, patch_size=4),  # like SigLIP-384 or CLIP at 392: the last two rows and columns are outside every patch
}


def torch_clip(directory, **changes):
    transformers = pytest.importorskip("transformers")
    model = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**(BASE | changes), attn_implementation="eager")))
    model.save_pretrained(directory)
    return model


def our_clip(directory, attend=attend, runner=scan_layers, **vision):
    """-> config, graphdef, {path: array}"""
    config = neva_config(directory, vision=vision)
    make = lambda: ClipVision(config.vision, attend=attend, runner=runner, rngs=nnx.Rngs(0))  # noqa: E731
    return config, *read_weights(make, hf.open_tensors(directory), hf.key_map(config), "vision_encoder/")


def features(graphdef, params, media):
    return np.asarray(jax.jit(lambda params, media: nnx.merge(graphdef, nest(params))(media))(params, media))


def pictures(size: int, count: int = 2) -> np.ndarray:
    """float32[count, size, size, 3] with the spread of normalised pixels."""
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tower's directory, its pictures and all hidden states of transformers [L + 1, M, S, E]."""
    import torch

    directory = tmp_path_factory.mktemp("clip")
    theirs, media = torch_clip(directory), pictures(16)
    with torch.no_grad():
        out = theirs(torch.tensor(media.transpose(0, 3, 1, 2)), output_hidden_states=True)
    return directory, media, np.stack(out.hidden_states)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_hidden_state_and_gradients(tmp_path, name):
    import torch

    theirs = torch_clip(tmp_path, **VARIANTS[name])
    config, graphdef, params = our_clip(tmp_path, keep_class_token=True, select_layer=-1)
    media = pictures(config.vision.image_size)
    out = theirs(torch.tensor(media.transpose(0, 3, 1, 2)), output_hidden_states=True)
    states = np.stack([h.detach().numpy() for h in out.hidden_states])
    weight = np.random.default_rng(2).normal(size=states.shape[1:]).astype(np.float32) / states[0].size ** 0.5  # gradients of order 1
    (out.hidden_states[-1] * torch.tensor(weight)).sum().backward()

    def loss(params):
        model = nnx.merge(graphdef, nest(params))
        block, stacked = nnx.split(model.layers)
        layers = jax.lax.map(lambda layer: nnx.merge(block, layer[0])(layer[1], None), (stacked, states[:-1]))  # each fed what theirs was fed
        model.config = dataclasses.replace(config.vision, select_layer=0)
        start = model(media)
        model.config = config.vision
        last = model(media)
        return jnp.sum(last * weight), (jnp.concatenate([start[None], layers]), last)

    (_, (layers, last)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(layers, states, atol=1e-5)
    np.testing.assert_allclose(last, states[-1], atol=1e-5)

    zeros = torch.zeros(config.vision.hidden_size)  # the norm that nothing here reads has no gradient
    expected = {hf.canonical(n): Array((zeros if p.grad is None else p.grad).numpy()) for n, p in theirs.named_parameters()}
    for path, grad in grads.items():
        want = hf.key_map(config).read(expected, f"vision_encoder/{path}", grad.shape, "gradients")
        np.testing.assert_allclose(grad, want, atol=1e-4, err_msg=path)
        assert np.abs(want).max() > 0.01 or path.startswith("post_layernorm") or path.endswith("k_proj/bias"), f"{path}: nothing was compared"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("layer", [-2, -1, -4, 0, 1, 3])
def test_the_selected_layer_with_and_without_class_token(tower, layer, keep):
    directory, media, states = tower
    config, graphdef, params = our_clip(directory, select_layer=layer, keep_class_token=keep)
    ours = features(graphdef, params, media)
    assert ours.shape[1] == config.vision.num_tokens == 16 + keep
    np.testing.assert_allclose(ours, states[layer][:, 0 if keep else 1 :], atol=1e-5)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_does_not_exist(tower, layer):
    _, graphdef, params = our_clip(tower[0], select_layer=layer)
    with pytest.raises(UserError, match=f"vision_select_layer {layer} does not exist in a tower of 3 layers"):
        features(graphdef, params, tower[1])


@pytest.mark.parametrize("layer, computed", [(-2, 2), (-1, 3), (0, 0), (1, 1)])
def test_blocks_above_the_selected_layer_are_not_computed(tower, layer, computed):
    directory, media, _ = tower
    lengths = []

    def counting(body, stacked, x, side, *, first):
        lengths.append(first)
        return scan_layers(body, stacked, x, side, first=first)

    _, graphdef, params = our_clip(directory, runner=counting, select_layer=layer)
    poisoned = {path: np.array(w) for path, w in params.items()}
    for path, weight in poisoned.items():
        if path.startswith("layers/"):
            weight[computed:] = np.nan
        if path.startswith("post_layernorm/"):
            weight[:] = np.nan
    np.testing.assert_array_equal(features(graphdef, poisoned, media), features(graphdef, params, media))
    assert set(lengths) == {computed}


def test_golden():
    answers = np.load(golden("checkpoints/clip_vision_golden.npz"))
    directory, media = golden("checkpoints/clip_vision"), answers["pixel_values"].transpose(0, 2, 3, 1)
    for layer, states in enumerate(answers["hidden_states"]):
        _, graphdef, params = our_clip(directory, select_layer=layer, keep_class_token=True)
        np.testing.assert_allclose(features(graphdef, params, media), states, atol=1e-5)
    np.testing.assert_allclose(features(graphdef, params, media), answers["last_hidden_state"], atol=1e-5)


def test_bytes_are_normalised_on_the_device_as_the_processor_does(tower):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    _, graphdef, params = our_clip(tower[0])
    raw = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)
    processor = transformers.CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    floats = np.stack([processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0] for picture in raw]).transpose(0, 2, 3, 1)
    tower_of = nnx.merge(graphdef, nest(params))
    np.testing.assert_allclose(tower_of.normalize(raw), floats, atol=1e-6)
    np.testing.assert_allclose(features(graphdef, params, raw), features(graphdef, params, floats), atol=1e-5)
    np.testing.assert_array_equal(tower_of.normalize(floats), floats)
