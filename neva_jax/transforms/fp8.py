"""FP8 GEMMs: Linears that a path pattern finds become ones that multiply in float8, with one scale a tensor and layer; e4m3 forward, e5m2 or e4m3 gradients.

Delayed scaling: a layer reads scales (`Fp8Scale`) that follow from the amaxes of past steps, and the "gradient" of a scale is the largest magnitude that was
seen; `advance` pushes it once a step. Scales enter a differentiated function through `taking_maxima`, or JAX would sum what several uses of a layer saw.
Current scaling: the tensor's own amax, no state. Frozen weights may be stored as `Quantised`: half the bytes, no amax.

Scales are powers of two, rounded up: a float loses nothing by that but range, and in every dtype scaling is exact, so that a CPU computes what a GPU does.
Given up: scales a row or a block, FP8 outside of Linear, a transposed copy of the weights.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import fp8_ops

from neva_jax.layers.linear import Linear
from neva_jax.transforms.select import Weight

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
MARK = "fp8_gemm"  # in the name of every operation of a GEMM, so that a compiled program can be searched for those that are not FP8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """scaling: "delayed" or "current". gradients: E5M2 (hybrid) or E4M3. history_len, algo ("most_recent", "max"): which past amaxes a delayed scale
    follows. margin: scales are 2**margin times what is needed."""

    scaling: str = "delayed"
    gradients: str = E5M2
    history_len: int = 1
    algo: str = "most_recent"
    margin: int = 0


class Fp8Scale(nnx.Variable):
    """float32, one a layer: what a tensor is divided by before it becomes float8."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel stored in float8. values: e4m3[..., in, out], scale: float32[...]; it stands for values * scale."""

    values: jax.Array
    scale: jax.Array


def quantise(kernel: jax.Array) -> Quantised:
    """kernel: [..., in, out], stacked over layers."""
    scale = scale_for(jnp.max(jnp.abs(kernel), (-2, -1)).astype(jnp.float32), jnp.float32(1), E4M3)
    return Quantised(fp8_ops.quantize(kernel, jnp.dtype(E4M3), scale[..., None, None], kernel.dtype), scale)


def scale_for(amax: jax.Array, scale: jax.Array, dtype: str, margin: int = 0) -> jax.Array:
    """The power of two that brings `amax` (float32) to at most the largest number of dtype; `scale` where amax is 0 or not finite."""
    wanted = fp8_ops.compute_scale(amax, scale, jnp.finfo(dtype).max.astype(jnp.float32), margin)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(wanted, jnp.finfo(jnp.float32).tiny), jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


# ---- one GEMM ------------------------------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gemm(recipe: Recipe, name: str, x: jax.Array, kernel: jax.Array | Quantised, scales: dict) -> jax.Array:
    """x: [..., in], kernel: [in, out] -> [..., out] in the dtype of x. scales: {"input", "kernel" (unless Quantised), "grad": Fp8Scale's value}, or {}.
    name: of the projection."""
    return _forward(recipe, name, x, kernel, scales)[0]


def _forward(recipe, name, x, kernel, scales):
    with jax.named_scope(f"{MARK}.{name}.forward"):
        amax = {}
        x8, amax["input"] = _to_float8(recipe, x, scales.get("input"), E4M3)
        if isinstance(kernel, Quantised):
            return _dot(x8, kernel, ((x.ndim - 1,), (0,)), x.dtype), (None, kernel, None, scales, amax)
        kernel8, amax["kernel"] = _to_float8(recipe, kernel.astype(x.dtype), scales.get("kernel"), E4M3)
        return _dot(x8, kernel8, ((x.ndim - 1,), (0,)), x.dtype), (x8, kernel8, jnp.zeros((), kernel.dtype), scales, amax)


def _backward(recipe, name, residuals, grad):
    x8, kernel8, master, scales, amax = residuals
    with jax.named_scope(f"{MARK}.{name}.backward"):
        grad8, amax["grad"] = _to_float8(recipe, grad, scales.get("grad"), recipe.gradients)
        of_x = _dot(grad8, kernel8, ((grad.ndim - 1,), (1,)), grad.dtype)
        rows = tuple(range(grad.ndim - 1))
        of_kernel = None if x8 is None else _dot(x8, grad8, (rows, rows), grad.dtype).astype(master.dtype)
    return of_x, of_kernel, {operand: jax.lax.convert_element_type(amax[operand], scale.dtype) for operand, scale in scales.items()}


gemm.defvjp(_forward, _backward)


def _to_float8(recipe: Recipe, x: jax.Array, scale: jax.Array | None, dtype: str) -> tuple[Quantised, jax.Array]:
    """-> x in float8 with the scale that is given, or its own, and its amax."""
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32)
    if scale is None:
        scale = jnp.where(jnp.isfinite(amax), scale_for(amax, jnp.float32(1), dtype, recipe.margin), amax)  # what is not finite stays so
    else:
        scale = jax.lax.convert_element_type(scale, jnp.float32)
    return Quantised(fp8_ops.quantize(x, jnp.dtype(dtype), scale, x.dtype), scale), amax


def _dot(a: Quantised, b: Quantised, contract, dtype) -> jax.Array:
    """Written as XLA's rewriter wants to find it: float8, converted, times a scalar, on both sides."""
    a, b = (fp8_ops.dequantize(q.values, dtype, q.scale) for q in (a, b))
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=dtype)


# ---- the model ---------------------------------------------------------------------------------------------------------------------------------------


class Fp8Linear(nnx.Module):
    """y = x @ kernel + bias, the product in float8. kernel: a master in any float, or Quantised."""

    def __init__(self, linear: Linear, recipe: Recipe, name: str, *, is_quantised: bool):
        self.kernel, self.bias, self.recipe, self.name = linear.kernel, linear.bias, recipe, name
        operands = ("input", "grad") if is_quantised else ("input", "kernel", "grad")
        self.operands = operands if recipe.scaling == "delayed" else ()
        for operand in self.operands:
            setattr(self, f"{operand}_scale", Fp8Scale(jnp.ones(linear.kernel.shape[:-2], jnp.float32), axes=()))

    def __call__(self, x: jax.Array) -> jax.Array:
        scales = {operand: getattr(self, f"{operand}_scale").get_value() for operand in self.operands}
        y = gemm(self.recipe, self.name, x, self.kernel.get_value(), scales)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def apply_fp8(model: nnx.Module, recipe: Recipe, kernels, quantised) -> nnx.Module:
    """The same model, in which the Linears whose kernels' paths are in `kernels` are FP8; those in `quantised` hold Quantised kernels."""
    for path, module in list(nnx.iter_modules(model)):
        if f"{'/'.join(map(str, path))}/kernel" in kernels:
            parent = functools.reduce(lambda node, key: getattr(node, str(key)), path[:-1], model)
            is_quantised = f"{'/'.join(map(str, path))}/kernel" in quantised
            setattr(parent, str(path[-1]), Fp8Linear(module, recipe, str(path[-1]), is_quantised=is_quantised))
    return model


def describe_fp8(make) -> tuple[nnx.GraphDef, dict[str, Weight]]:
    """make() -> module with FP8 in it; nothing is computed. -> (graphdef, {path of a scale: Weight})"""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    scales = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(state) if isinstance(v, Fp8Scale)}
    return graphdef, {path: Weight(v.shape, ("layers",) * len(v.shape)) for path, v in scales.items()}


def find_kernels(paths, pattern: str) -> tuple[str, ...]:
    """Those of a model's paths that are kernels whose Linear `pattern` (re.search) finds."""
    return tuple(path for path in paths if path.endswith("/kernel") and re.search(pattern, path.removesuffix("/kernel")))


# ---- the state of delayed scaling ----------------------------------------------------------------------------------------------------------------------


def taking_maxima(scales: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Scales as a differentiated function must take them in: where a layer is used several times, the gradient is the maximum of what was seen."""
    return {path: jax.lax.convert_element_type(scale, fp8_ops.fm32) for path, scale in scales.items()}


def init_histories(recipe: Recipe | None, scales: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{path of a scale: float32[..., history_len]}: nothing was seen yet."""
    return {path: jnp.zeros((*scale.shape, recipe.history_len), jnp.float32) for path, scale in scales.items()}


def advance(recipe: Recipe | None, scales: dict, histories: dict, amaxes: dict) -> tuple[dict, dict]:
    """-> (scales, histories) after a step in which `amaxes` were seen; the newest stands first. All: {path of a scale: float32}."""
    histories = {path: jnp.concatenate([amax[..., None], histories[path][..., :-1]], -1) for path, amax in amaxes.items()}
    seen = {path: history[..., 0] if recipe.algo == "most_recent" else jnp.max(history, -1) for path, history in histories.items()}
    dtypes = {path: recipe.gradients if path.endswith("/grad_scale") else E4M3 for path in scales}
    return {path: scale_for(seen[path], scale, dtypes[path], recipe.margin) for path, scale in scales.items()}, histories
