"""One step: loss and gradients of what trains, accumulated over micro-batches by a scan, one update. The heart of the house.

state: {"params": {path: float32}, "opt_state": optax's, "skipped": int32, updates skipped in a row, "scales" and "amax_histories": of delayed FP8 scaling,
and, of a model with adapters, "draws": int32, steps begun, by which it drops};
frozen: {path: array}, only read. A gradient that is not finite leaves all but `skipped` and `draws` as it was, bit for bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from neva_jax.parallel.pipeline import Pipeline
from neva_jax.training.loss import row_weights, supervised_cross_entropy
from neva_jax.training.optimizer import clip_factor
from neva_jax.transforms.fp8 import Recipe, advance, init_histories, taking_maxima
from neva_jax.transforms.select import nest

ONE_STAGE = Pipeline()


def init_state(
    params: dict, optimizer: optax.GradientTransformation, *, recipe: Recipe | None = None, scales: dict | None = None, draws: bool = False
) -> dict:
    """recipe: of FP8; scales: {path: anything with the shape of a delayed scale}. draws: whether to count steps."""
    scales = {path: jnp.ones(scale.shape, jnp.float32) for path, scale in (scales or {}).items()}
    fp8 = {"scales": scales, "amax_histories": init_histories(recipe, scales)}
    return {"params": params, **fp8, "opt_state": optimizer.init(params), "skipped": jnp.int32(0)} | ({"draws": jnp.int32(0)} if draws else {})


def micro_loss(graphdef, params, frozen, micro, weights, num_shards: int = 1):
    """One micro-batch (fields [B, ...], over num_shards devices) and its rows' weights [B] -> float32."""
    model = nnx.merge(graphdef, nest(params | frozen))
    hidden = model(micro)
    return supervised_cross_entropy(model.llm.logits, hidden, micro["labels"], micro["supervised_positions"], weights, num_shards)


def make_train_step(
    graphdef, optimizer, *, clip: float | None, num_shards: int, reduction: str = "global_token_mean", accumulate_dtype=jnp.float32,
    recipe: Recipe | None = None, pipeline: Pipeline = ONE_STAGE, drop: Callable | None = None,
):  # fmt: skip
    """-> train_step(state, frozen, batch, lr, stop) -> (state, metrics). batch: fields [M, B, ...]; lr: float32; stop: int32[devices], not 0 asks for an end.

    pipeline: one gradient takes a round of it, round_size micro-batches. drop: (step, micro-batch) -> {path: keys} that the model drops by.
    """

    def accumulate(params, scales, frozen, batch, weights, draws):
        """-> loss, gradients, {path of a scale: the largest magnitude seen}. A layer's gradient is added to its sum as soon as it is there: fp32 sums are all
        the memory that gradients take. Sums in bf16 cannot be added to by fp32 gradients, so that those of a micro-batch stand beside them."""
        zeros = lambda dtype: jax.tree.map(lambda p: jax.new_ref(jnp.zeros(p.shape, dtype)), params)  # noqa: E731
        sums = zeros(accumulate_dtype)

        def one(carry, numbered):
            (total, amaxes), (number, *micro_and_weights) = carry, numbered
            fixed = frozen | drop(draws, number) if drop else frozen
            loss_of = lambda p, s: micro_loss(graphdef, p | taking_maxima(s), fixed, *micro_and_weights, num_shards)  # noqa: E731
            loss, pull = jax.vjp(loss_of, params, scales)
            grads = sums if accumulate_dtype == jnp.float32 else zeros(jnp.float32)
            _, seen = pull.with_refs(grads, scales)(jnp.ones_like(loss))  # scales stand for "as values"
            if grads is not sums:
                jax.tree.map(lambda s, g: s.addupdate(jax.freeze(g).astype(s.dtype)), sums, grads)
            return (total + loss, jax.tree.map(jnp.maximum, amaxes, seen)), None

        start, numbers = (jnp.float32(0), jax.tree.map(jnp.zeros_like, scales)), jnp.arange(weights.shape[0])
        (total, amaxes), _ = jax.lax.scan(one, start, (numbers, batch, weights))
        return total, jax.tree.map(jax.freeze, sums), amaxes

    def train_step(state, frozen, batch, lr, stop):
        params, scales, histories, opt_state = state["params"], state["scales"], state["amax_histories"], state["opt_state"]
        weights = row_weights(batch["labels"], reduction, num_shards)
        loss, grads, amaxes = accumulate(params, scales, frozen, *jax.tree.map(pipeline.fold, (batch, weights)), state.get("draws"))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        norm = optax.tree.norm(grads)
        finite = jax.tree.reduce(lambda all_finite, amax: all_finite & jnp.all(jnp.isfinite(amax)), amaxes, jnp.isfinite(norm))
        grads = jax.tree.map(lambda g: g * clip_factor(norm, clip), grads)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new_params = jax.tree.map(lambda p, u: p + lr * u, params, updates)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
        skipped = jnp.where(finite, 0, state["skipped"] + 1)
        draws = {"draws": state["draws"] + 1} if "draws" in state else {}
        state = {"params": keep(new_params, params), "opt_state": keep(new_opt_state, opt_state), "skipped": skipped, **draws}
        state["scales"], state["amax_histories"] = keep(advance(recipe, scales, histories, amaxes), (scales, histories))
        metrics = {"reduced_train_loss": loss, "grad_norm": norm, "skipped_in_a_row": skipped, "stop": jnp.max(stop), **count(batch)}
        return state, metrics

    return train_step


def make_eval_step(graphdef, pipeline: Pipeline = ONE_STAGE):
    """-> eval_step(params, frozen, batch) -> (sum of losses, count of targets) over the batch."""

    def eval_step(params, frozen, batch):
        rounds = jax.tree.map(pipeline.fold, (batch, jnp.ones(batch["labels"].shape[:2], jnp.float32)))
        total, _ = jax.lax.scan(lambda t, xs: (t + micro_loss(graphdef, params, frozen, *xs), None), jnp.float32(0), rounds)
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
