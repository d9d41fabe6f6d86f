"""Greedy answers to a batch of prompts: media encoded once, then one token a row and turn, until every row has stopped.

Given up for now: a key/value cache (each turn decodes the whole row again, which is right for short answers only), sampling, streaming.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.models.fusion import fuse
from neva_jax.parallel.sharding import constrain
from neva_jax.transforms.select import nest


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "stop_id"))
def greedy(graphdef, params, batch, *, max_new_tokens: int, stop_id: int):
    """batch: tokens, segment_ids, position_ids, media_index int32[B, T], media [B, N, ...]; rows are right-padded prompts with at least
    max_new_tokens free positions -> int32[B, max_new_tokens], the answers, stop_id and all that comes after it.
    """
    model = nnx.merge(graphdef, nest(params))
    rows = jnp.arange(batch["tokens"].shape[0])
    media = model.encode(batch["media"]) if batch["media"].shape[1] else None
    lengths = jnp.sum(batch["segment_ids"] != 0, -1)

    def turn(carry):
        i, tokens, segments, answers, done = carry
        embeddings = model.llm.embed(tokens)
        if media is not None:
            embeddings = fuse(embeddings, media, batch["media_index"])
        hidden = model.llm.decode(embeddings, batch["position_ids"], segments)
        chosen = jnp.argmax(model.llm.logits(hidden[rows, lengths + i - 1]), -1).astype(jnp.int32)
        chosen = jnp.where(done, stop_id, chosen)
        at = lengths + i
        return i + 1, tokens.at[rows, at].set(chosen), segments.at[rows, at].set(1), answers.at[:, i].set(chosen), done | (chosen == stop_id)

    start = (0, batch["tokens"], batch["segment_ids"], jnp.full((len(rows), max_new_tokens), stop_id, jnp.int32), jnp.zeros(len(rows), bool))
    answers = jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & ~jnp.all(c[4]), turn, start)[3]
    return constrain(answers, None, None)  # whole on every device, so that every process can read them
