"""FP8 GEMMs by themselves: against Flax's own, what a power of two costs, what a frozen weight loses, what becomes of the scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.linen import fp8_ops

from neva_jax.layers.linear import Linear
from neva_jax.transforms.fp8 import E4M3, E5M2, Fp8Linear, Quantised, Recipe, advance, apply_fp8, find_kernels, gemm, quantise, scale_for, taking_maxima

SCALES = {"input": jnp.float32(2**-6), "kernel": jnp.float32(2**-5), "grad": jnp.float32(2**-14)}
NO_HISTORY = jnp.zeros(1)  # with nothing in it, Flax's operation takes the scale that it is given, and its new history is the amax
HYBRID, CURRENT = Recipe(), Recipe(scaling="current")


def operands(dtype, seed: int = 0):
    """x [2, 5, 32], kernel [32, 48], gradient of the product [2, 5, 48]"""
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, [(2, 5, 32), (32, 48), (2, 5, 48)], strict=True)]


def equal(a, b):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_flax(dtype):
    """Products, gradients and amaxes, to the bit, where scales are powers of two."""
    x, kernel, grad = operands(dtype)

    def flaxs(x, kernel, *histories):
        names = ("lhs_amax_history", "rhs_amax_history", "grad_amax_history")
        scales = {"lhs_scale": SCALES["input"], "rhs_scale": SCALES["kernel"], "grad_scale": SCALES["grad"]}
        settings = {"preferred_element_type": dtype, "quantize_compute_type": dtype, **scales, **dict(zip(names, histories, strict=True))}
        return fp8_ops.fp8_scaled_dot_general(x, kernel, (((2,), (0,)), ((), ())), **settings)

    ours, of_ours = jax.vjp(lambda x, kernel, scales: gemm(HYBRID, "q_proj", x, kernel, taking_maxima(scales)), x, kernel, SCALES)
    theirs, of_theirs = jax.vjp(flaxs, x, kernel, NO_HISTORY, NO_HISTORY, NO_HISTORY)
    of_x, of_kernel, seen = of_ours(grad)
    their_x, their_kernel, *histories = of_theirs(grad)
    for a, b in ((ours, theirs), (of_x, their_x), (of_kernel, their_kernel)):
        assert a.dtype == dtype
        equal(a, b)
    for name, history in zip(("input", "kernel", "grad"), histories, strict=True):
        equal(seen[name], history[0])
        assert seen[name] > 1, "the gradient of a scale is what was seen, not a small number"


@pytest.mark.parametrize("recipe", [HYBRID, CURRENT], ids=["delayed", "current"])
def test_error_of_a_product(recipe):
    """Within what two factors of three bits after the point can do, and not zero."""
    x, kernel, grad = operands(jnp.float32)
    scales = SCALES if recipe is HYBRID else {}
    out, back = jax.vjp(lambda x, kernel: gemm(recipe, "q_proj", x, kernel, scales), x, kernel)
    of_x, of_kernel = back(grad)
    for found, a, b, bits in ((out, x, kernel, (4, 4)), (of_x, grad, kernel.T, (3, 4)), (of_kernel, x.reshape(-1, 32).T, grad.reshape(-1, 48), (4, 3))):
        exact, largest = a @ b, jnp.abs(a) @ jnp.abs(b)
        error = jnp.abs(found - exact)
        assert jnp.all(error <= largest * 1.1 * sum(2.0**-n for n in bits)) and jnp.max(error) > 1e-3


def test_current_scaling_needs_no_scale_and_hides_nothing():
    x, kernel, _ = operands(jnp.float32)
    assert jnp.allclose(gemm(CURRENT, "q_proj", x * 2.0**60, kernel, {}), gemm(CURRENT, "q_proj", x, kernel, {}) * 2.0**60), "any magnitude will do"
    assert not jnp.any(gemm(CURRENT, "q_proj", jnp.zeros_like(x), kernel, {}))
    for poison in (jnp.inf, jnp.nan):
        assert not jnp.isfinite(gemm(CURRENT, "q_proj", x.at[0, 0, 0].set(poison), kernel, {})).all()


def test_delayed_scaling_saturates():
    x, kernel, _ = operands(jnp.float32)
    large, larger = (gemm(HYBRID, "q_proj", x * factor, kernel, SCALES) for factor in (1e6, 1e7))
    assert jnp.isfinite(large).all()
    equal(large, larger)  # 448 times the scale, and no more


def test_scales_are_powers_of_two_just_large_enough():
    for amax in (448.0, 448.1, 1.0, 3e-20, 1e30):
        scale = float(scale_for(jnp.float32(amax), jnp.float32(7), E4M3))
        assert np.log2(scale) % 1 == 0 and 448 * scale / 2 < amax <= 448 * scale * 1.0001
        assert float(scale_for(jnp.float32(amax), jnp.float32(7), E4M3, 3)) == 8 * scale
        assert float(scale_for(jnp.float32(amax), jnp.float32(7), E5M2)) == scale / 128
    for amax in (0.0, np.inf, np.nan):
        assert float(scale_for(jnp.float32(amax), jnp.float32(8), E4M3)) == 8


def test_gradients_in_e4m3():
    """Three bits after the point in place of two: closer to the truth, where the range suffices."""
    x, kernel, grad = operands(jnp.float32)
    errors = {}
    for gradients in (E5M2, E4M3):
        _, back = jax.vjp(lambda x: gemm(Recipe(scaling="current", gradients=gradients), "q_proj", x, kernel, {}), x)  # noqa: B023
        errors[gradients] = float(jnp.linalg.norm(back(grad)[0] - grad @ kernel.T))
    assert errors[E4M3] < 0.8 * errors[E5M2]


# ---- frozen weights ------------------------------------------------------------------------------------------------------------------------------------


def test_a_frozen_weight_keeps_half_the_bytes_and_one_scale_a_layer():
    kernel = jax.random.normal(jax.random.key(0), (3, 32, 48)).astype(jnp.bfloat16) * jnp.array([1, 2.0**-9, 2.0**20], jnp.bfloat16)[:, None, None]
    stored = quantise(kernel)
    assert stored.values.dtype == jnp.dtype(E4M3) and 2 * stored.values.nbytes == kernel.nbytes and stored.scale.shape == (3,)
    assert len(set(np.asarray(stored.scale))) == 3
    back = fp8_ops.dequantize(stored.values, jnp.float32, stored.scale[:, None, None])
    subnormal = 2.0**-10 * stored.scale[:, None, None]  # half of e4m3's smallest step
    assert jnp.all(jnp.abs(back - kernel) <= jnp.maximum(2.0**-4 * jnp.abs(kernel), subnormal).astype(jnp.float32))
    equal(quantise(back).values, stored.values)


def test_a_frozen_weight_is_the_quantised_model():
    """Forward and gradient of the activations are those of the dequantised weight; the weight itself has no gradient and no amax."""
    x, kernel, grad = operands(jnp.float32)
    stored = quantise(kernel)
    dequantised = fp8_ops.dequantize(stored.values, jnp.float32, stored.scale)
    scales = {name: SCALES[name] for name in ("input", "grad")}
    out, back = jax.vjp(lambda x, scales: gemm(HYBRID, "q_proj", x, stored, scales), x, scales)
    of_x, seen = back(grad)
    x8, grad8 = (fp8_ops.qdq(a, jnp.dtype(t), SCALES[name], jnp.float32) for a, t, name in ((x, E4M3, "input"), (grad, E5M2, "grad")))
    equal(out, x8 @ dequantised)
    equal(of_x, grad8 @ dequantised.T)
    assert seen.keys() == {"input", "grad"}


# ---- scales of several uses, and of time ------------------------------------------------------------------------------------------------------------------


def test_several_uses_take_the_maximum():
    x, kernel, _ = operands(jnp.float32)
    uses = jnp.stack([x, 3 * x, 2 * x])

    def total(scales):
        scales = taking_maxima(scales)
        one = lambda carry, x: (carry + jnp.sum(gemm(HYBRID, "q_proj", x, kernel, scales)), None)  # noqa: E731
        return jax.lax.scan(one, 0.0, uses)[0]

    seen = jax.jit(jax.grad(total))(SCALES)
    equal(seen["input"], jnp.max(jnp.abs(uses)))
    equal(seen["kernel"], jnp.max(jnp.abs(kernel)))
    equal(seen["grad"], 1)


@pytest.mark.parametrize(("algo", "followed"), [("most_recent", [8, 2, 4, 4, 1]), ("max", [8, 8, 8, 4, 4])])
def test_history(algo, followed):
    """Three steps are remembered; a step that saw nothing keeps the scale, if it alone counts."""
    recipe = Recipe(history_len=3, algo=algo)
    scales, histories = {"q/input_scale": jnp.ones(1)}, {"q/input_scale": jnp.zeros((1, 3))}
    for amax, expected in zip([8, 2, 4, 0, 1], followed, strict=True):
        scales, histories = advance(recipe, scales, histories, {"q/input_scale": jnp.full(1, amax, jnp.float32)})
        equal(scales["q/input_scale"], scale_for(jnp.float32(expected), jnp.float32(0), E4M3))
    equal(histories["q/input_scale"], [[1, 0, 4]])


def test_scales_of_gradients_are_for_their_own_format():
    amaxes = {"q/input_scale": jnp.ones(2), "q/grad_scale": jnp.ones(2)}
    histories = {path: jnp.zeros((2, 1)) for path in amaxes}
    ones = {path: jnp.ones(2) for path in amaxes}
    hybrid, e4m3, wide = (advance(recipe, ones, histories, amaxes)[0] for recipe in (Recipe(), Recipe(gradients=E4M3), Recipe(margin=2)))
    assert (hybrid["q/input_scale"] == 128 * hybrid["q/grad_scale"]).all()
    equal(e4m3["q/grad_scale"], e4m3["q/input_scale"])
    equal(wide["q/grad_scale"], 4 * hybrid["q/grad_scale"])


# ---- the model -----------------------------------------------------------------------------------------------------------------------------------------


class Pair(nnx.Module):
    def __init__(self):
        self.a = Linear(16, 16, axes=(None, None), bias=True, rngs=nnx.Rngs(0))
        self.b = Linear(16, 16, axes=(None, None), bias=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.b(self.a(x))


def test_only_what_is_named_is_replaced():
    plain, model = Pair(), apply_fp8(Pair(), HYBRID, find_kernels(["a/kernel", "a/bias", "b/kernel"], "^a$"), ())
    assert type(model.a) is Fp8Linear and type(model.b) is Linear
    x = jax.random.normal(jax.random.key(0), (4, 16))
    for scale in (model.a.input_scale, model.a.kernel_scale):
        scale.set_value(jnp.float32(2**-7))
    assert 0 < jnp.max(jnp.abs(model(x) - plain(x))) < 0.1 * jnp.max(jnp.abs(plain(x)))


def test_a_quantised_kernel_takes_a_kernels_place():
    plain, model = Pair(), apply_fp8(Pair(), CURRENT, ("a/kernel", "b/kernel"), ("a/kernel", "b/kernel"))
    graphdef, state = nnx.split(model)
    pure = nnx.to_pure_dict(state)
    for name in ("a", "b"):
        pure[name]["kernel"] = quantise(pure[name]["kernel"])
    model, x = nnx.merge(graphdef, pure), jax.random.normal(jax.random.key(0), (4, 16))
    assert isinstance(model.a.kernel.get_value(), Quantised)
    assert 0 < jnp.max(jnp.abs(model(x) - plain(x))) < 0.15 * jnp.max(jnp.abs(plain(x)))
