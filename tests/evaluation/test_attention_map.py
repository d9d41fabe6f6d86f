"""Attention weights against transformers' output_attentions, and their places on the pictures."""

import jax
import numpy as np
import pytest
from flax import nnx
from parity.test_llava import ROWS, live, make_batch, our_llava  # noqa: F401 (live is a fixture)

from neva_jax.errors import UserError
from neva_jax.evaluation.attention_map import answer_attention, attention_weights, over_pictures
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.multimodal import NevaConfig
from neva_jax.transforms.select import nest

ROW = np.array(ROWS["two"][0])
PIXELS = np.random.default_rng(7).normal(size=(2, 3, 28, 28)).astype(np.float32)


@pytest.fixture(scope="module")
def ours(live):  # noqa: F811
    return our_llava(live[1])


def batch_of(config, row=ROW, length=None):
    batch = make_batch([(row, None)], PIXELS, config.media_length, length=length)
    return {name: batch[name] for name in ("tokens", "segment_ids", "position_ids", "media_index", "media")}


def test_weights_are_those_of_transformers(live, ours):  # noqa: F811
    """Every head of every layer, grouped heads and a padded row included; and those of the model as it runs, since the logits are its own."""
    import torch

    config, graphdef, params = ours
    with torch.no_grad():
        theirs = live[0](input_ids=torch.tensor(ROW[None]), pixel_values=torch.tensor(PIXELS), output_attentions=True)
    batch, n = batch_of(config, length=len(ROW) + 5), len(ROW)
    weights, logits = attention_weights(graphdef, params, batch)
    weights = np.asarray(weights)
    assert weights.shape == (2, 1, 4, n + 5, n + 5)
    np.testing.assert_allclose(weights[:, :, :, :n, :n], np.stack([layer.numpy() for layer in theirs.attentions]), atol=1e-5)
    np.testing.assert_allclose(weights[:, :, :, :n].sum(-1), 1, atol=1e-6)
    assert not np.triu(weights[:, :, :, :n], 1).any(), "causal, and nothing on padding"
    assert np.abs(weights[0] - weights[1])[..., :n, :n].max() > 0.1 and np.ptp(weights[0, 0, :, n - 1, :n], axis=0).max() > 0.1, "layers and heads differ"
    model = nnx.merge(graphdef, nest(params))
    expected = jax.jit(lambda: model.llm.logits(model(batch)))()
    np.testing.assert_allclose(logits[0, :n], expected[0, :n], atol=1e-5)


def test_an_answers_tokens_look_from_where_they_were_chosen(ours):
    config, graphdef, params = ours
    answer = [7, 11, 5]
    found = answer_attention(graphdef, params, batch_of(config, length=len(ROW) + 3), answer)
    whole = np.asarray(attention_weights(graphdef, params, batch_of(config, np.array([*ROW, *answer])))[0])
    n = len(ROW)
    assert found.shape == (3, 2, 4, n + 3)
    for i in range(3):
        np.testing.assert_allclose(found[i], whole[:, 0, :, n - 1 + i], atol=1e-6)
        assert not found[i, ..., n + i :].any() and found[i, ..., n + i - 1].all(), "up to the token before it, that one included"
    with pytest.raises(UserError, match="room for the answer's 4 tokens"):
        answer_attention(graphdef, params, batch_of(config, length=len(ROW) + 3), [7, 11, 5, 6])


@pytest.mark.parametrize(("projector", "class_token", "grid"), [
    ("mlp2x_gelu", False, [[0, 1], [2, 3]]),
    ("mlp2x_gelu", True, [[1, 2], [3, 4]]),
    ("mlp_downsample", False, [[0, 2], [1, 3]]),
    ("mlp_downsample_rowmajor", False, [[0, 1], [2, 3]]),
])  # fmt: skip
def test_places_on_the_pictures(ours, projector, class_token, grid):
    """Two pictures, the second one first in the text; index j of a picture has weight j + 1, or 10 times that in the second one."""
    patch = 7 if projector.startswith("mlp_downsample") else 14
    vision = ClipVisionConfig(32, 64, 1, 4, image_size=28, patch_size=patch, keep_class_token=class_token)
    config = NevaConfig(ours[0].llm, vision, projector)
    size = config.media_length
    media_index = np.array([-1, *range(size, 2 * size), -1, *range(size), 2 * size])  # the last is a learned vector
    weights = np.array([100.0, *10 * np.arange(1, size + 1), 100.0, *np.arange(1, size + 1), 100.0])
    maps = over_pictures(weights, media_index, config, 2)
    np.testing.assert_array_equal(maps, [np.array(grid) + 1, 10 * (np.array(grid) + 1)])
    assert over_pictures(np.stack([weights, weights]), media_index, config, 2).shape == (2, 2, 2, 2)
