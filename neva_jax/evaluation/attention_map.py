"""Where a language model looks while it answers: its attention's softmax weights, and their share on each patch of each picture.

A kernel that also stores its weights takes the place of the model's own, and layers run one by one in Python, for one call; the model is not changed. The
kernel is the textbook's, in fp32: for prompts, not for training. Given up: the tower's attention, and long rows ([T, T] weights of every head are kept).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig
from neva_jax.transforms.select import nest


def _storing(store: list):
    """`attend` of layers/attention.py for a language model, which is causal, so that no row sees the padding behind it; appends its weights
    float32[B, H, T, T] to `store`."""

    def attend(query, key, value, segment_ids=None, *, is_causal: bool, scale: float | None = None):
        key, value = (jnp.repeat(part, query.shape[2] // part.shape[2], axis=2) for part in (key, value))
        scores = jnp.einsum("bthc,bshc->bhts", query, key, preferred_element_type=jnp.float32) * (scale or 1 / math.sqrt(query.shape[-1]))
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf))
        store.append(weights)
        return jnp.einsum("bhts,bshc->bthc", weights.astype(value.dtype), value)

    return attend


def _one_by_one(body, stacked, x, side):
    """A layer runner (see parallel/layer_runner.py)."""
    for layer in range(len(jax.tree.leaves(stacked)[0])):
        x = body(x, side, jax.tree.map(lambda weight, layer=layer: weight[layer], stacked))
    return x


@functools.partial(jax.jit, static_argnames="graphdef")
def attention_weights(graphdef: nnx.GraphDef, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Of a MultimodalModel and a batch for it -> weights float32[L, B, H, T, T] of the language model (row t: what position t looks at; rows sum to 1), and
    the logits float32[B, T, V padded]. Rows of padding mean nothing."""
    model, store = nnx.merge(graphdef, nest(params)), []
    model.llm.layers.self_attn.attend, model.llm.runner = _storing(store), _one_by_one
    logits = model.llm.logits(model(batch))
    return jnp.stack(store), logits


def answer_attention(graphdef: nnx.GraphDef, params: dict, batch: dict, answer: list[int]) -> np.ndarray:
    """batch: of one prompt, with room for the answer behind it; answer: token ids -> float32[A, L, H, T]: what the position that chose each of the A tokens
    looked at."""
    start, batch = int((batch["segment_ids"][0] != 0).sum()), {name: np.array(field) for name, field in batch.items()}
    rows, length = batch["tokens"].shape
    if rows != 1 or start + len(answer) > length:
        raise UserError(f"found {rows} prompts in {length} positions, {start} taken; expected one prompt with room for the answer's {len(answer)} tokens")
    batch["tokens"][0, start : start + len(answer)] = answer
    batch["segment_ids"][0, start : start + len(answer)] = 1
    weights, _ = attention_weights(graphdef, params, batch)
    return np.moveaxis(np.asarray(weights)[:, 0, :, start - 1 : start - 1 + len(answer)], 2, 0)


def over_pictures(weights: np.ndarray, media_index: np.ndarray, config: NevaConfig, num_media: int) -> np.ndarray:
    """weights: float[..., T], media_index: int[T] of that row -> float[..., N, h, w], the share of each patch (of each 2 x 2 patches, where the projector joins
    them), top left first. What is not in a picture (text, class token, learned vectors) is left out, so that a sum says how much was looked at the pictures.
    """
    size = config.media_length
    flat = np.zeros((*weights.shape[:-1], num_media * size), weights.dtype)
    places = np.flatnonzero((media_index >= 0) & (media_index < num_media * size))
    flat[..., media_index[places]] = weights[..., places]
    class_token = 0 if config.projector.startswith("mlp_downsample") else config.vision.num_tokens - config.vision.grid**2
    maps, side = flat.reshape(*flat.shape[:-1], num_media, size)[..., class_token:], math.isqrt(size - class_token)
    maps = maps.reshape(*maps.shape[:-1], side, side)
    return maps.swapaxes(-1, -2) if config.projector == "mlp_downsample" else maps  # whose blocks come column by column
