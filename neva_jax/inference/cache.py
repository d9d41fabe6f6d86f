"""Keys and values of all positions so far, so that a token costs one position's work: what a language model is run with to answer.

A layer is told nothing: where its attention is handed segment ids and a kernel, it is handed an object that takes in keys and values and a kernel that leaves
them there. Slots [B, S]: a row's prompt lies in the first of its T, the answers of all rows begin at slot T together; what lies between is never looked at.
Keys and values are kept as [B, G, S, C]: products with them are then of matrices that lie in one piece (a CPU is several times faster so). Given up: pages,
sharing a prefix between rows, quantised keys.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.parallel.sharding import constrain


class Call:
    """What stands for segment_ids in one call of one layer. keys, values: [B, G, S, C] after it."""

    def __init__(self, **inputs):
        self.__dict__.update(inputs)


def start(model, blocks, embeddings: jax.Array, batch: dict, room: int):
    """The prompts: embeddings [B, T, D] -> hidden [B, D] of each row's last position, and the cache, with `room` free slots.

    blocks: (graphdef of a layer, weights of all layers on axis 0 or a list of each layer's).
    """
    angles, segments = model.llm.config.rope.angles(batch["position_ids"]), batch["segment_ids"]

    def layer(block, x, _):
        call = Call(segment_ids=segments)
        block.self_attn.attend = functools.partial(_attend_and_keep, attend=block.self_attn.attend)
        x = block(x, (angles, call))
        return x, tuple(_pin(jnp.pad(part, [(0, 0), (0, 0), (0, room), (0, 0)])) for part in (call.keys, call.values))

    x, layers = _each(blocks, layer, embeddings, None)
    lengths = jnp.sum(segments != 0, -1)
    return x[jnp.arange(x.shape[0]), lengths - 1], {"layers": layers, "lengths": lengths, "first": jnp.int32(embeddings.shape[1])}


def step(model, blocks, cache: dict, embeddings: jax.Array, count: jax.Array):
    """One more token a row: embeddings [B, D] of the answers' token number `count` (from 0) -> hidden [B, D], cache."""
    lengths, slot = cache["lengths"], cache["first"] + count
    angles = model.llm.config.rope.angles((lengths + count)[:, None])

    def layer(block, x, mine):
        keys, values = mine
        slots = jnp.arange(keys.shape[2])
        visible = (slots < lengths[:, None]) | ((slots >= cache["first"]) & (slots <= slot))
        call = Call(keys=keys, values=values, slot=slot, visible=visible)
        block.self_attn.attend = _attend_to_cache
        x = block(x, (angles, call))
        return x, (_pin(call.keys), _pin(call.values))

    x, layers = _each(blocks, layer, embeddings[:, None], cache["layers"])
    return x[:, 0], cache | {"layers": layers}


def _each(blocks, layer, x, inputs):
    """x through all layers: layer(block, x, its input) -> (x, its output)."""
    graphdef, weights = blocks
    if isinstance(weights, list):
        outputs = []
        for one, mine in zip(weights, inputs or [None] * len(weights), strict=True):
            x, output = layer(nnx.merge(graphdef, one), x, mine)
            outputs.append(output)
        return x, outputs
    return jax.lax.scan(lambda x, each: layer(nnx.merge(graphdef, each[0]), x, each[1]), x, (weights, inputs))


def _attend_and_keep(query, key, value, call, *, is_causal, scale, attend):
    call.keys, call.values = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return attend(query, key, value, call.segment_ids, is_causal=is_causal, scale=scale)


def _attend_to_cache(query, key, value, call, *, is_causal, scale):
    """query, key, value: [B, 1, heads, C]; softmax in fp32."""
    batch, _, heads, width = query.shape
    call.keys = jax.lax.dynamic_update_slice_in_dim(call.keys, key.swapaxes(1, 2), call.slot, 2)
    call.values = jax.lax.dynamic_update_slice_in_dim(call.values, value.swapaxes(1, 2), call.slot, 2)
    grouped = query.reshape(batch, key.shape[2], -1, width)
    scores = jnp.einsum("bgrc,bgsc->bgrs", grouped, call.keys, preferred_element_type=jnp.float32) * (width**-0.5 if scale is None else scale)
    weights = jax.nn.softmax(jnp.where(call.visible[:, None, None], scores, jnp.finfo(jnp.float32).min), -1).astype(value.dtype)
    return jnp.einsum("bgrs,bgsc->bgrc", weights, call.values).reshape(batch, 1, heads, width)


def _pin(part: jax.Array) -> jax.Array:
    return constrain(part, "batch", "heads", "length", None)
