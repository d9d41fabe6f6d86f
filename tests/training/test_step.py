"""One step on made-up batches: accumulation, reductions, clipping, gradients that are not finite, what is differentiated, and what never exists."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neva_jax.layers.linear import matmul_to_fp32
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.training.loss import TOKENS, chunk_length, row_weights, supervised_cross_entropy
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.step import init_state, make_eval_step, make_train_step
from neva_jax.transforms.select import Row, describe, flatten, trainable

LLM = LlamaConfig(
    vocab_size=300, padded_vocab_size=320, num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, num_query_groups=1, head_dim=8,
    rope=Rope(8), init_std=0.2,
)  # fmt: skip
VISION = ClipVisionConfig(hidden_size=12, ffn_hidden_size=16, num_layers=2, num_attention_heads=2, image_size=8, patch_size=4, select_layer=-2)
CONFIG = NevaConfig(LLM, VISION, "mlp2x_gelu")
ROWS = {"pretrain": [Row("^projector/")], "finetune": [Row("^projector/"), Row("^llm/")]}
B, T, K = 8, 24, 64


def make():
    return neva(CONFIG, rngs=nnx.Rngs(0))


@functools.cache
def parts(stage: str):
    graphdef, weights = describe(make)
    rows = trainable(weights, ROWS[stage])
    flat = flatten(nnx.to_pure_dict(nnx.state(make())))
    params = {path: flat[path] for path in rows}
    return graphdef, rows, params, {path: array for path, array in flat.items() if path not in rows}


def batch(micro_batches: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """8 rows of different length and number of targets, one picture each, as [M, 8 / M, ...]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 300, (B, T)).astype(np.int32)
    lengths = rng.integers(12, T + 1, B)
    targets = (np.arange(T) >= lengths[:, None] - rng.integers(1, 7, B)[:, None]) & (np.arange(T) < lengths[:, None])
    rows = {
        "tokens": tokens,
        "labels": np.where(targets, np.roll(tokens, -1, 1), -100).astype(np.int32),
        "position_ids": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segment_ids": (np.arange(T) < lengths[:, None]).astype(np.int32),
        "media_index": np.tile(np.where((np.arange(T) >= 2) & (np.arange(T) < 6), np.arange(T) - 2, -1).astype(np.int32), (B, 1)),
        "supervised_positions": np.stack([np.pad(np.flatnonzero(row), (0, K - row.sum()), constant_values=-1) for row in targets]).astype(np.int32),
        "media": rng.integers(0, 256, (B, 1, 8, 8, 3), np.uint8),
        "bad_image": np.zeros(B, np.int32),
    }
    return {name: array.reshape(micro_batches, B // micro_batches, *array.shape[1:]) for name, array in rows.items()}


def step(stage: str, data: dict, *, lr: float = 0.1, state=None, name: str = "sgd", decay: float = 0.0, **settings):
    graphdef, rows, params, frozen = parts(stage)
    optimizer = make_optimizer(name, rows, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    settings = {"clip": None, "num_shards": 1} | settings
    train_step = jax.jit(make_train_step(graphdef, optimizer, **settings))
    return train_step(state or init_state(params, optimizer), frozen, data, np.float32(lr), np.zeros(1, np.int32))


def reference_loss(params, frozen, data):
    """The loss without any of our machinery: all logits, log-softmax, one mean over all targets."""
    from neva_jax.transforms.select import nest

    model = nnx.merge(parts("finetune")[0], nest(params | frozen))
    rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in data.items()}
    losses = -jnp.take_along_axis(jax.nn.log_softmax(model.llm.logits(model(rows)), -1), jnp.maximum(rows["labels"], 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(rows["labels"] >= 0, losses, 0)) / jnp.sum(rows["labels"] >= 0)


@pytest.mark.parametrize("stage", ROWS)
def test_equals_the_plain_loss_and_gradient(stage):
    _, _, params, frozen = parts(stage)
    value, grads = jax.value_and_grad(reference_loss)(params, frozen, batch())
    state, metrics = step(stage, batch())
    np.testing.assert_allclose(metrics["reduced_train_loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    for path in params:
        np.testing.assert_allclose(state["params"][path], params[path] - 0.1 * grads[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_weighs_by_targets(micro_batches):
    """Micro-batches with different numbers of targets: a mean of their means would differ."""
    (a, ma), (b, mb) = step("finetune", batch()), step("finetune", batch(micro_batches))
    np.testing.assert_allclose(ma["reduced_train_loss"], mb["reduced_train_loss"], rtol=1e-6)
    for path in a["params"]:
        np.testing.assert_allclose(a["params"][path], b["params"][path], atol=1e-6, err_msg=path)
    _, means = step("finetune", batch(micro_batches), reduction="microbatch_mean")
    assert abs(float(means["reduced_train_loss"] - mb["reduced_train_loss"])) > 1e-3


def test_nemos_mean_of_means():
    """One mean for each micro-batch and data shard, then their mean; a micro-batch without targets is 0, not NaN."""
    labels = np.full((2, 4, 6), -100)
    labels[0, 0, :4], labels[0, 1, :1], labels[0, 2, :2] = 1, 1, 1  # shard 0 of micro-batch 0: 5 targets, shard 1: 2; micro-batch 1: none
    weights = np.asarray(row_weights(jnp.asarray(labels), "microbatch_mean", 2))
    np.testing.assert_allclose(weights[0], [1 / 5 / 4, 1 / 5 / 4, 1 / 2 / 4, 1 / 2 / 4])
    assert np.isfinite(weights).all()


def test_only_what_trains_is_differentiated_and_stored():
    state, _ = step("pretrain", batch(), name="adamw")
    assert all(path.startswith("projector/") for path in state["params"])
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert len(moments) == 2 * len(state["params"])
    llm = {(16, 16), (16, 8), (16, 24), (24, 16), (16, 320), (320, 16)} - {(12, 16), (16, 16)}
    assert not llm & set(_weight_gradients("pretrain"))
    assert len(_weight_gradients("finetune")) > len(_weight_gradients("pretrain")), "the trained stage has them, so the search can find them"


def _weight_gradients(stage: str) -> list[tuple[int, ...]]:
    """Shapes of the products of two activations over all tokens: what a weight's gradient is made of."""
    graphdef, rows, params, frozen = parts(stage)
    optimizer = make_optimizer("sgd", rows, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    jaxpr = jax.make_jaxpr(make_train_step(graphdef, optimizer, clip=1.0, num_shards=1))(init_state(params, optimizer), frozen, batch(), 0.1, jnp.zeros(1))
    return [eqn.outvars[0].aval.shape for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general" and _contracts_tokens(eqn)]


def _contracts_tokens(eqn) -> bool:
    (left, _), _ = eqn.params["dimension_numbers"]
    return int(np.prod([eqn.invars[0].aval.shape[i] for i in left])) >= B * T


def equations(jaxpr):
    """Every equation, those inside scans and calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))


def test_no_logits_beyond_a_chunk():
    """With T = 24 and K = 128 no array of B x T x V or B x K x V exists, forward or backward; B x 64 x V does."""
    hidden, labels = jnp.ones((B, 200, 16)), jnp.zeros((B, 200), jnp.int32)
    positions = jnp.tile(jnp.arange(128), (B, 1))
    kernel = jnp.ones((16, 320))
    loss = lambda h, k: supervised_cross_entropy(lambda x: x @ k, h, labels, positions, jnp.ones(B))  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).compile().as_text()
    sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+,320)\]", text)]
    assert sizes and max(sizes) <= B * 64 * 320


@pytest.mark.parametrize("rows, length, expected", [(32, 64, 64), (4, 2048, 512), (4, 512, 256), (1, 4096, 2048), (128, 1024, 64), (16, 192, 64), (3, 50, 50)])
def test_chunks_are_as_long_as_memory_allows(rows, length, expected):
    """A divisor of K; more than CHUNK only up to TOKENS a device, and never all of K."""
    assert chunk_length(rows, length) == expected
    assert length % expected == 0 and (expected in (64, length) or expected * rows <= TOKENS and expected < length)


@pytest.mark.parametrize("head_trains", [True, False])
def test_the_heads_gemms_are_in_its_own_dtype(head_trains):
    """Logits are fp32, and their gradient comes in fp32: left alone it would drag the head into fp32 GEMMs, and a frozen head into its weights' gradient."""
    hidden, kernel = jnp.ones((2, 3, 16), jnp.bfloat16), jnp.full((16, 20), 0.5, jnp.bfloat16)
    wrt = (0, 1) if head_trains else 0
    function = jax.grad(lambda h, k: jnp.sum(jnp.sin(matmul_to_fp32(h, k))), wrt)
    products = [eqn for eqn in equations(jax.make_jaxpr(function)(hidden, kernel).jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) == 2 + head_trains
    assert {str(var.aval.dtype) for eqn in products for var in eqn.invars} == {"bfloat16"}
    for found, expected in zip(jax.tree.leaves(function(hidden, kernel)), jax.tree.leaves(jax.grad(lambda h, k: jnp.sum(jnp.sin(h @ k)), wrt)(
        hidden.astype(jnp.float32), kernel.astype(jnp.float32))), strict=True):  # fmt: skip
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2e-2)


@pytest.mark.parametrize("accumulate_dtype, apart", [(jnp.float32, False), (jnp.bfloat16, True)])
def test_gradients_are_added_where_their_sums_lie(accumulate_dtype, apart):
    """No micro-batch has a gradient of its own of the whole stack: inside the loop nothing of its size is made. Beside bf16 sums one is."""
    graphdef, rows, params, frozen = parts("finetune")
    optimizer = make_optimizer("sgd", rows, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    train_step = make_train_step(graphdef, optimizer, clip=1.0, num_shards=1, accumulate_dtype=accumulate_dtype)
    jaxpr = jax.make_jaxpr(train_step)(init_state(params, optimizer), frozen, batch(2), 0.1, jnp.zeros(1, jnp.int32)).jaxpr
    micro_batches = next(eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan" and eqn.params["length"] == 2)
    stacked = params["llm/layers/mlp/up_proj/kernel"].shape
    made = [eqn for eqn in equations(micro_batches.params["jaxpr"].jaxpr) if any(getattr(v.aval, "shape", None) == stacked for v in eqn.outvars)]
    assert bool([eqn for eqn in made if eqn.primitive.name not in ("jit", "scan")]) == apart, made


def test_clipping_is_by_global_norm_and_the_norm_is_logged_before():
    _, rows, params, frozen = parts("finetune")
    grads = jax.grad(reference_loss)(params, frozen, batch())
    norm = float(optax.tree.norm(grads))
    state, metrics = step("finetune", batch(), clip=norm / 4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    path = "llm/layers/mlp/up_proj/kernel"
    np.testing.assert_allclose(state["params"][path], params[path] - 0.1 * grads[path] / 4, atol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    good, metrics = step("finetune", batch(), name="adamw")
    poisoned = {path: array.at[(0,) * array.ndim].set(jnp.nan) if path == "llm/norm/scale" else array for path, array in good["params"].items()}
    bad, metrics = step("finetune", batch(), name="adamw", state=good | {"params": poisoned})
    assert int(metrics["skipped_in_a_row"]) == 1 and not np.isfinite(float(metrics["grad_norm"]))
    for before, after in zip(jax.tree.leaves((poisoned, good["opt_state"])), jax.tree.leaves((bad["params"], bad["opt_state"])), strict=True):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    again, metrics = step("finetune", batch(), name="adamw", state=bad)
    assert int(metrics["skipped_in_a_row"]) == 2
    _, metrics = step("finetune", batch(), name="adamw", state=again | {"params": good["params"]})
    assert int(metrics["skipped_in_a_row"]) == 0


def test_factors_and_decay_come_from_the_table():
    rows = {"a/kernel": Row("a"), "a/bias": Row("a"), "b/kernel": Row("b", lr_factor=0.1, weight_decay=0.5)}
    optimizer = make_optimizer("sgd", rows, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2)
    params = dict.fromkeys(rows, jnp.ones(()))
    updates, _ = optimizer.update(dict.fromkeys(rows, jnp.zeros(())), optimizer.init(params), params)
    assert {path: round(float(u), 6) for path, u in updates.items()} == {"a/kernel": -0.2, "a/bias": 0.0, "b/kernel": -0.05}


def test_accumulators_may_be_bf16():
    (a, _), (b, _) = step("finetune", batch(4)), step("finetune", batch(4), accumulate_dtype=jnp.bfloat16)
    differences = [float(jnp.max(jnp.abs(a["params"][path] - b["params"][path]))) for path in a["params"]]
    assert 0 < max(differences) < 1e-2


def test_evaluation_sums():
    graphdef, _, params, frozen = parts("finetune")
    total, count = jax.jit(make_eval_step(graphdef))(params, frozen, batch(2))
    np.testing.assert_allclose(total / count, reference_loss(params, frozen, batch()), rtol=1e-6)
