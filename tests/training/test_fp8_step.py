"""FP8 in one step: the state advances once, whatever the micro-batches; a skipped update restores it; frozen weights are e4m3; each field does something."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import batch, make, parts, reference_loss

from neva_jax.build.fp8 import PROJECTIONS
from neva_jax.training.optimizer import make_optimizer
from neva_jax.training.step import init_state, make_eval_step, make_train_step
from neva_jax.transforms.fp8 import E4M3, Quantised, Recipe, apply_fp8, describe_fp8, find_kernels, quantise

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@functools.cache
def fp8_parts(stage: str, recipe: Recipe, quantised: bool = True):
    """-> graphdef, scales, rows, params, frozen: the parts of test_step.py, with FP8."""
    _, rows, params, frozen = parts(stage)
    kernels = find_kernels([*params, *frozen], PROJECTIONS)
    stored = [path for path in kernels if path in frozen] if quantised else []
    graphdef, scales = describe_fp8(lambda: apply_fp8(make(), recipe, kernels, stored))
    return graphdef, scales, rows, params, frozen | {path: quantise(frozen[path]) for path in stored}


@functools.cache
def compiled(stage: str, recipe: Recipe, quantised: bool = True):
    graphdef, _, rows, *_ = fp8_parts(stage, recipe, quantised)
    optimizer = make_optimizer("adamw", rows, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return optimizer, jax.jit(make_train_step(graphdef, optimizer, clip=1.0, num_shards=1, recipe=recipe))


def steps(stage: str, recipe: Recipe, batches: list, *, state=None, quantised: bool = True, lr: float = 1e-3):
    """-> state, metrics after a step on each batch."""
    _, scales, _, params, frozen = fp8_parts(stage, recipe, quantised)
    optimizer, train_step = compiled(stage, recipe, quantised)
    state = state or init_state(params, optimizer, recipe=recipe, scales=scales)
    for data in batches:
        state, metrics = train_step(state, frozen, data, np.float32(lr), np.zeros(1, np.int32))
    return state, metrics


def newest(state, name: str) -> dict[str, np.ndarray]:
    """{path of a scale: the amax of the last step} of one operand."""
    return {path: np.asarray(history[..., 0]) for path, history in state["amax_histories"].items() if path.endswith(f"/{name}_scale")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a)


def test_the_seven_of_every_layer_and_nothing_else():
    for stage, operands in (("finetune", ("input", "kernel", "grad")), ("pretrain", ("input", "grad"))):
        _, scales, _, params, frozen = fp8_parts(stage, Recipe())
        found = {tuple(path.split("/")[-2:]) for path in scales}
        assert found == {(name, f"{operand}_scale") for name in NAMES for operand in operands}
        assert all(path.startswith("llm/layers/") and scale.shape == (2,) and scale.axes == ("layers",) for path, scale in scales.items())
        in_fp8 = {path for path, value in (params | frozen).items() if isinstance(value, Quantised)}
        assert {path.split("/")[-2] for path in in_fp8} == (set(NAMES) if stage == "pretrain" else set())


def test_micro_batches_push_their_maximum_once():
    """Each of four micro-batches alone, and all of them as one step: the same scales are read, the largest amax is pushed, and time passes once."""
    recipe = Recipe(history_len=3)
    start, _ = steps("finetune", recipe, [batch()] * 3)
    four = batch(4)
    together, _ = steps("finetune", recipe, [four], state=start)
    alone = [steps("finetune", recipe, [{name: field[i : i + 1] for name, field in four.items()}], state=start)[0] for i in range(4)]
    for operand in ("input", "kernel"):
        for path, amax in newest(together, operand).items():
            each = np.stack([newest(state, operand)[path] for state in alone])
            np.testing.assert_array_equal(amax, each.max(0), err_msg=path)
            assert operand == "kernel" or (each.max(0) > each.mean(0)).all()
    for path, history in together["amax_histories"].items():
        np.testing.assert_array_equal(history[:, 1:], start["amax_histories"][path][:, :2])
    whole, _ = steps("finetune", recipe, [batch(1)], state=start)
    for path, history in whole["amax_histories"].items():
        np.testing.assert_allclose(history[:, 0], together["amax_histories"][path][:, 0], rtol=0.05, err_msg=path)


def test_state_is_outside_the_optimizer_and_the_norm():
    state, metrics = steps("pretrain", Recipe(), [batch()] * 3)
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert len(moments) == 2 * len(state["params"])
    assert all(path.startswith("projector/") for path in state["params"])
    assert max(float(np.max(h)) for h in state["amax_histories"].values()) > 1 > float(metrics["grad_norm"]) > 0


def test_a_skipped_update_restores_the_state():
    before, _ = steps("finetune", Recipe(history_len=2), [batch()] * 2)
    for path in ("llm/norm/scale", "llm/layers/self_attn/q_proj/kernel"):
        poisoned = before["params"] | {path: before["params"][path].at[(0,) * before["params"][path].ndim].set(jnp.inf)}
        after, metrics = steps("finetune", Recipe(history_len=2), [batch()], state=before | {"params": poisoned})
        assert int(metrics["skipped_in_a_row"]) == 1
        for name in ("params", "scales", "amax_histories"):
            assert same(after[name], (before | {"params": poisoned})[name]), (path, name)


def test_frozen_weights_forward_and_gradient():
    """Against the bf16-free model in fp32: within e4m3's error; and the gradient with current scaling points where the true one does."""
    recipe = Recipe(scaling="current")
    graphdef, _, _, params, frozen = fp8_parts("pretrain", recipe)
    plain = parts("pretrain")[3]
    true_loss, true_grads = jax.value_and_grad(reference_loss)(params, plain, batch())
    total, count = make_eval_step(graphdef)(params, frozen, batch())
    assert 0 < abs(float(total / count - true_loss)) < 0.02 * float(true_loss)
    state, metrics = steps("pretrain", recipe, [batch()], lr=0.0)
    assert state["scales"] == {} and state["amax_histories"] == {}
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in true_grads.values()))
    assert abs(float(metrics["grad_norm"]) / norm - 1) < 0.1


def test_frozen_weights_may_be_quantised_every_step():
    state, _ = steps("pretrain", Recipe(), [batch()] * 2, quantised=False)
    _, scales, *_ = fp8_parts("pretrain", Recipe(), False)
    assert sum(path.endswith("/kernel_scale") for path in scales) == 7
    for path, amax in newest(state, "kernel").items():
        np.testing.assert_array_equal(amax, jnp.max(jnp.abs(parts("pretrain")[3][path.replace("kernel_scale", "kernel")]), (1, 2)))


@pytest.mark.parametrize(
    "change", [{"scaling": "current"}, {"gradients": E4M3}, {"history_len": 4}, {"algo": "max", "history_len": 4}, {"margin": 1}], ids=lambda c: next(iter(c))
)
def test_each_field_changes_the_state(change):
    """Steps on batches of unlike sizes of activations, so that the newest amax is not the largest."""
    default = Recipe(history_len=4) if "algo" in change else Recipe()
    recipe = Recipe(**{"history_len": default.history_len} | change)
    batches = [batch(seed=seed) for seed in range(4)]
    ours, theirs = (steps("finetune", one, batches)[0] for one in (recipe, default))
    changed = {name for name in ("params", "scales", "amax_histories") if not same(ours[name], theirs[name])}
    expected = {"scaling": {"params", "scales", "amax_histories"}, "history_len": {"amax_histories"}}.get(next(iter(change)), {"scales"})
    assert changed >= expected
    if "history_len" in change and len(change) == 1:
        assert changed == expected, "more history alone changes no number while the newest counts"


def test_losses_fall_as_in_fp32():
    """Twenty steps on one batch."""
    curves = {}
    for name, recipe in (("delayed", Recipe()), ("current", Recipe(scaling="current")), ("max", Recipe(algo="max", history_len=16))):
        state, losses = None, []
        for _ in range(20):
            state, metrics = steps("finetune", recipe, [batch()], state=state, lr=3e-3)
            losses.append(float(metrics["reduced_train_loss"]))
        curves[name] = losses
    graphdef, rows, params, frozen = parts("finetune")
    optimizer = make_optimizer("adamw", rows, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    train_step, state, exact = jax.jit(make_train_step(graphdef, optimizer, clip=1.0, num_shards=1)), init_state(params, optimizer), []
    for _ in range(20):
        state, metrics = train_step(state, frozen, batch(), np.float32(3e-3), np.zeros(1, np.int32))
        exact.append(float(metrics["reduced_train_loss"]))
    assert exact[-1] < exact[0] / 2
    for name, losses in curves.items():
        print(name, np.abs(np.array(losses) - exact).max(), exact[0], exact[-1], losses[-1])
        np.testing.assert_allclose(losses, exact, atol=0.03 * exact[0], err_msg=name)
