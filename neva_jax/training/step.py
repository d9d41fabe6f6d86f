"""One step: loss and gradients of what trains, accumulated over micro-batches by a scan, one update. The heart of the house.

state: {"params": {path: float32}, "opt_state": optax's, "skipped": int32, updates skipped in a row}; frozen: {path: array}, only read.
A gradient that is not finite leaves params and opt_state as they were, bit for bit.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from neva_jax.training.loss import row_weights, supervised_cross_entropy
from neva_jax.training.optimizer import clip_factor
from neva_jax.transforms.select import nest


def init_state(params: dict, optimizer: optax.GradientTransformation) -> dict:
    return {"params": params, "opt_state": optimizer.init(params), "skipped": jnp.int32(0)}


def micro_loss(graphdef, params, frozen, micro, weights):
    """One micro-batch (fields [B, ...]) and its rows' weights [B] -> float32."""
    model = nnx.merge(graphdef, nest(params | frozen))
    hidden = model(micro)
    return supervised_cross_entropy(model.llm.logits, hidden, micro["labels"], micro["supervised_positions"], weights)


def make_train_step(graphdef, optimizer, *, clip: float | None, num_shards: int, reduction: str = "global_token_mean", accumulate_dtype=jnp.float32):
    """-> train_step(state, frozen, batch, lr, stop) -> (state, metrics). batch: fields [M, B, ...]; lr: float32; stop: int32[processes], 1 asks for an end."""

    def accumulate(params, frozen, batch, weights):
        def one(carry, micro_and_weights):
            loss, grads = jax.value_and_grad(lambda p: micro_loss(graphdef, p, frozen, *micro_and_weights))(params)
            total, sums = carry
            return (total + loss, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulate_dtype), params)
        return jax.lax.scan(one, (jnp.float32(0), zeros), (batch, weights))[0]

    def train_step(state, frozen, batch, lr, stop):
        params, opt_state = state["params"], state["opt_state"]
        loss, grads = accumulate(params, frozen, batch, row_weights(batch["labels"], reduction, num_shards))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        grads = jax.tree.map(lambda g: g * clip_factor(norm, clip), grads)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new_params = jax.tree.map(lambda p, u: p + lr * u, params, updates)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
        skipped = jnp.where(finite, 0, state["skipped"] + 1)
        state = {"params": keep(new_params, params), "opt_state": keep(new_opt_state, opt_state), "skipped": skipped}
        metrics = {"reduced_train_loss": loss, "grad_norm": norm, "skipped_in_a_row": skipped, "stop": jnp.max(stop), **count(batch)}
        return state, metrics

    return train_step


def make_eval_step(graphdef):
    """-> eval_step(params, frozen, batch) -> (sum of losses, count of targets) over the batch."""

    def eval_step(params, frozen, batch):
        ones = jnp.ones(batch["labels"].shape[:2], jnp.float32)
        total, _ = jax.lax.scan(lambda t, xs: (t + micro_loss(graphdef, params, frozen, *xs), None), jnp.float32(0), (batch, ones))
        return total, jnp.sum(batch["labels"] >= 0, dtype=jnp.float32)

    return eval_step


def count(batch) -> dict[str, jax.Array]:
    """What of a batch was worth its place, summed over processes."""
    valid = jnp.sum(batch["segment_ids"] != 0, dtype=jnp.int32)
    return {
        "tokens": valid,
        "supervised_tokens": jnp.sum(batch["labels"] >= 0, dtype=jnp.int32),
        "padding_share": 1 - valid / batch["segment_ids"].size,
        "bad_images": jnp.sum(batch["bad_image"], dtype=jnp.int32),
    }
