"""SigLIP's tower against transformers (torch, CPU, fp32): every hidden state within 1e-5, gradients within 1e-4; and how it differs from CLIP's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Array, randomise, read_weights

from neva_jax.convert import hf
from neva_jax.errors import UserError
from neva_jax.layers.attention import attend
from neva_jax.models.clip import ClipVision, ClipVisionConfig
from neva_jax.models.multimodal import NevaConfig
from neva_jax.models.siglip import SiglipVision, SiglipVisionConfig
from neva_jax.parallel.layer_runner import scan_layers
from neva_jax.transforms.select import describe, nest

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

BASE = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4)
VARIANTS = {
    "tanh gelu": {},
    "a rest of pixels": dict(image_size=19, patch_size=4),  # as 384 / 14: the last rows and columns are outside every patch
    "odd sizes": dict(hidden_size=36, intermediate_size=40, image_size=21, patch_size=7, hidden_act="gelu", layer_norm_eps=1e-3),  # head dim 9, grid 3
}
PROCESSOR = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor  # of transformers 5, and 4


def torch_siglip(directory, **changes):
    model = randomise(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**(BASE | changes), attn_implementation="eager")))
    model.save_pretrained(directory)
    return model


def tower(config, runner=scan_layers):
    return lambda: SiglipVision(config, attend=attend, runner=runner, rngs=nnx.Rngs(0))


def our_siglip(directory, runner=scan_layers, **changes):
    """-> config, graphdef, {path: array}"""
    config = hf.vision_of(hf.read_config(directory)["vision"], **changes)
    tensors, keys = hf.open_tensors(directory), hf.key_map(NevaConfig(None, config, "mlp2x_gelu"))
    keys.check(tensors, list(keys.rules), "test")
    return config, *read_weights(tower(config, runner), tensors, keys, "vision_encoder/")


def features(graphdef, params, media):
    return np.asarray(jax.jit(lambda params, media: nnx.merge(graphdef, nest(params))(media))(params, media))


def pictures(size: int, count: int = 2) -> np.ndarray:
    """float32[count, size, size, 3] with the spread of normalised pixels."""
    return np.random.default_rng(1).normal(size=(count, size, size, 3)).astype(np.float32)


def channels_first(media):
    return torch.tensor(np.asarray(media).transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tower's directory, its pictures and all hidden states of transformers [L + 1, M, S, E]."""
    directory = tmp_path_factory.mktemp("siglip")
    theirs, media = torch_siglip(directory), pictures(16)
    with torch.no_grad():
        return directory, media, np.stack(theirs(channels_first(media), output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_hidden_state_and_gradients(tmp_path, name):
    theirs = torch_siglip(tmp_path, **VARIANTS[name])
    config, graphdef, params = our_siglip(tmp_path, select_layer=-1)
    media = pictures(config.image_size)
    out = theirs(channels_first(media), output_hidden_states=True)
    states = np.stack([h.detach().numpy() for h in out.hidden_states])
    weight = np.random.default_rng(2).normal(size=states.shape[1:]).astype(np.float32) / states[0].size ** 0.5  # gradients of order 1
    (out.hidden_states[-1] * torch.tensor(weight)).sum().backward()

    def loss(params):
        model = nnx.merge(graphdef, nest(params))
        block, stacked = nnx.split(model.layers)
        layers = jax.lax.map(lambda layer: nnx.merge(block, layer[0])(layer[1], None), (stacked, states[:-1]))  # each fed what theirs was fed
        model.config = dataclasses.replace(config, select_layer=0)
        start = model(media)
        model.config = config
        last = model(media)
        return jnp.sum(last * weight), (jnp.concatenate([start[None], layers]), last)

    (_, (layers, last)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert last.shape[1] == config.num_tokens == (config.image_size // config.patch_size) ** 2
    np.testing.assert_allclose(layers, states, atol=1e-5)
    np.testing.assert_allclose(last, states[-1], atol=1e-5)
    assert np.abs(out.last_hidden_state.detach().numpy() - states[-1]).max() > 0.1, "the norm behind the blocks would show"

    zeros = torch.zeros(config.hidden_size)  # the norm that nothing here reads has no gradient
    expected = {hf.canonical(n): Array((zeros if p.grad is None else p.grad).numpy()) for n, p in theirs.named_parameters()}
    keys = hf.key_map(NevaConfig(None, config, "mlp2x_gelu"))
    for path, grad in grads.items():
        want = keys.read(expected, f"vision_encoder/{path}", grad.shape, "gradients")
        np.testing.assert_allclose(grad, want, atol=1e-4, err_msg=path)
        assert np.abs(want).max() > 0.01 or path.startswith("post_layernorm") or path.endswith("k_proj/bias"), f"{path}: nothing was compared"


@pytest.mark.parametrize("layer, computed", [(-1, 3), (-2, 2), (-4, 0), (1, 1)])
def test_the_selected_layer_and_nothing_above_it(saved, layer, computed):
    directory, media, states = saved
    lengths = []

    def counting(body, stacked, x, side, *, first):
        lengths.append(first)
        return scan_layers(body, stacked, x, side, first=first)

    _, graphdef, params = our_siglip(directory, runner=counting, select_layer=layer)
    poisoned = {path: np.array(w) for path, w in params.items()}
    for path, weight in poisoned.items():
        if path.startswith("layers/"):
            weight[computed:] = np.nan
        if path.startswith("post_layernorm/"):
            weight[:] = np.nan
    np.testing.assert_allclose(features(graphdef, poisoned, media), states[layer], atol=1e-5)
    assert set(lengths) == {computed}


def test_bytes_are_normalised_on_the_device_as_the_processor_does(saved):
    from PIL import Image

    _, graphdef, params = our_siglip(saved[0])
    raw = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 3), np.uint8)
    processor = PROCESSOR(do_resize=False)
    floats = np.stack([processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0] for picture in raw]).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(nnx.merge(graphdef, nest(params)).normalize(raw), floats, atol=1e-6)
    np.testing.assert_allclose(features(graphdef, params, raw), features(graphdef, params, floats), atol=1e-5)


def test_sixteen_bits_and_pictures_of_another_size(saved):
    config, graphdef, params = our_siglip(saved[0], dtype="bfloat16")
    ours = jax.jit(lambda params: nnx.merge(graphdef, nest(params))(saved[1]))(params)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), saved[2][-2], atol=0.15)
    with pytest.raises(ValueError, match=r"H = W = 16; found \[2, 20, 20, 3\]"):
        features(graphdef, params, pictures(20))


def test_it_lies_on_devices_as_clip_does():
    sizes = dict(hidden_size=32, ffn_hidden_size=56, num_layers=3, num_attention_heads=4, image_size=16, patch_size=4)
    clip_config, siglip_config = ClipVisionConfig(**sizes), SiglipVisionConfig(**sizes)
    clip = describe(lambda: ClipVision(clip_config, attend=attend, runner=scan_layers, rngs=nnx.Rngs(0)))[1]
    siglip = describe(tower(siglip_config))[1]
    assert {path: weight.axes for path, weight in siglip.items() if path in clip} == {path: clip[path].axes for path in siglip.keys() & clip.keys()}
    assert siglip.keys() - clip.keys() == {"patch_embedding/bias"} and siglip["patch_embedding/bias"].axes == ("embed",)
    assert siglip["position_embedding/embedding"].shape == (16, 32)


def test_there_is_no_class_token_to_keep():
    config = SiglipVisionConfig(32, 56, 3, 4, 384, 14)
    assert (config.keep_class_token, config.grid, config.num_tokens, config.image_mean) == (False, 27, 729, (0.5, 0.5, 0.5))
    assert NevaConfig(None, config, "mlp_downsample").media_length == 196
    with pytest.raises(TypeError, match="keep_class_token"):
        dataclasses.replace(config, keep_class_token=True)
    with pytest.raises(UserError, match="hidden_size 32 cannot have 5 heads"):
        dataclasses.replace(config, num_attention_heads=5)
