"""Next-token cross-entropy at the supervised positions only, in chunks: no tensor of size B x T x V, nor B x K x V, ever exists."""

import jax
import jax.numpy as jnp

from neva_jax.parallel.layer_runner import remat
from neva_jax.parallel.sharding import constrain

CHUNK = 64  # supervised positions a row that are turned into logits at once, at least,
TOKENS = 2048  # and what a device may have of them together: enough that the head's GEMMs are not bound by reading its weights


def chunk_length(rows: int, length: int) -> int:
    """rows: of a micro-batch on one device; length: K -> the positions of a chunk, a divisor of K; where K is more than CHUNK, never all of it."""
    if length % CHUNK:
        return length
    fit = [n for n in range(CHUNK, length // 2 + 1, CHUNK) if length % n == 0 and n * rows <= TOKENS]
    return max(fit, default=CHUNK)


def supervised_cross_entropy(logits, hidden, labels, supervised_positions, row_weights, num_shards: int = 1):
    """logits: function [B, k, D] -> float32[B, k, V]; hidden: [B, T, D]; labels: int32[B, T], next-token targets, -100 where nothing is supervised;
    supervised_positions: int32[B, K], -1 pads; row_weights: float32[B]; num_shards: devices that share B
    -> float32: sum over targets of weight of the row x loss in nats.
    """
    rows, length = supervised_positions.shape
    chunk = chunk_length(rows // num_shards, length)
    positions = jnp.maximum(supervised_positions, 0)
    targets = jnp.where(supervised_positions >= 0, jnp.take_along_axis(labels, positions, 1), -100)
    hidden = jnp.take_along_axis(hidden, positions[..., None], 1)
    chunks = (hidden.reshape(rows, -1, chunk, hidden.shape[-1]).swapaxes(0, 1), targets.reshape(rows, -1, chunk).swapaxes(0, 1))

    @remat
    def body(total, chunk):
        hidden = constrain(chunk[0], "batch", None, None)
        return total + jnp.sum(token_losses(logits(hidden), chunk[1]) * row_weights[:, None]), None

    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def row_weights(labels, reduction: str, num_shards: int):
    """labels: int32[M, B, T] of a whole global batch -> float32[M, B], the weights under which the weighted sum is the loss.

    global_token_mean: one mean over every target of the global batch. microbatch_mean: NeMo's mean of means, one a micro-batch and data shard
    (`num_shards` of B / num_shards neighbouring rows each); one without any target counts as 0 where NeMo's is NaN.
    """
    counts = jnp.sum(labels >= 0, -1, dtype=jnp.float32)
    if reduction == "global_token_mean":
        return jnp.ones_like(counts) / jnp.maximum(jnp.sum(counts), 1.0)
    micro_batches, rows = counts.shape
    means = jnp.sum(counts.reshape(micro_batches, num_shards, -1), -1, keepdims=True)
    weights = 1.0 / (jnp.maximum(means, 1.0) * micro_batches * num_shards)
    return jnp.broadcast_to(weights, (micro_batches, num_shards, rows // num_shards)).reshape(micro_batches, rows)


def token_losses(logits, targets):
    """logits: float32[..., V], targets: int32[...] -> float32[...], 0 where the target is negative. The target's logit is a masked sum over V,
    not a gather, so that a head split over the vocabulary needs no gathering."""
    target_logit = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), -1)
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, -1) - target_logit, 0.0)
