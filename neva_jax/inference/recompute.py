"""The same as cache.py without a cache: every token computes the whole row again, through the model's own layer runner.

For meshes with a pipeline, whose stages' layers no other device has, and to compare a cache with. The work of an answer grows with its length squared.
"""

import jax
import jax.numpy as jnp


def start(model, blocks, embeddings: jax.Array, batch: dict, room: int):
    """See cache.start. A row's answer follows its prompt without a gap."""
    rows = jnp.arange(embeddings.shape[0])
    segments = jnp.pad(batch["segment_ids"], [(0, 0), (0, room)])
    memory = {"embeddings": jnp.pad(embeddings, [(0, 0), (0, room), (0, 0)]), "segments": segments, "lengths": jnp.sum(segments != 0, -1)}
    return _decode(model, memory)[rows, memory["lengths"] - 1], memory


def step(model, blocks, memory: dict, embeddings: jax.Array, count: jax.Array):
    """See cache.step."""
    rows, at = jnp.arange(embeddings.shape[0]), memory["lengths"] + count
    grown = {"embeddings": memory["embeddings"].at[rows, at].set(embeddings), "segments": memory["segments"].at[rows, at].set(1)}
    memory = memory | grown
    return _decode(model, memory)[rows, at], memory


def _decode(model, memory) -> jax.Array:
    segments = memory["segments"]
    return model.llm.decode(memory["embeddings"], jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape), segments)
