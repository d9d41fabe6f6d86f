"""Next-token cross-entropy at the supervised positions only, in chunks: no tensor of size B x T x V, nor B x K x V, ever exists."""

import jax
import jax.numpy as jnp

CHUNK = 64  # supervised positions a row that are turned into logits at once


def supervised_cross_entropy(logits, hidden, labels, supervised_positions):
    """logits: function [B, k, D] -> float32[B, k, V]; hidden: [B, T, D]; labels: int32[B, T], next-token targets, -100 where nothing is supervised;
    supervised_positions: int32[B, K], -1 pads -> (sum of losses in nats, count of targets), both float32 scalars.
    """
    rows, length = supervised_positions.shape
    chunk = CHUNK if length % CHUNK == 0 else length
    positions = jnp.maximum(supervised_positions, 0)
    targets = jnp.where(supervised_positions >= 0, jnp.take_along_axis(labels, positions, 1), -100)
    hidden = jnp.take_along_axis(hidden, positions[..., None], 1)
    chunks = (hidden.reshape(rows, -1, chunk, hidden.shape[-1]).swapaxes(0, 1), targets.reshape(rows, -1, chunk).swapaxes(0, 1))

    @jax.checkpoint
    def body(total, chunk):
        return total + jnp.sum(token_losses(logits(chunk[0]), chunk[1])), None

    total, _ = jax.lax.scan(body, jnp.float32(0), chunks)
    return total, jnp.sum(targets >= 0, dtype=jnp.float32)


def token_losses(logits, targets):
    """logits: float32[..., V], targets: int32[...] -> float32[...], 0 where the target is negative. The target's logit is a masked sum over V,
    not a gather, so that a head split over the vocabulary needs no gathering."""
    target_logit = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), -1)
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, -1) - target_logit, 0.0)
