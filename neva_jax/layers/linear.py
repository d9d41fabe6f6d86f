"""The GEMM that everything else is made of, and the table of embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.initializers import normal, zeros

NORMAL = normal(0.02)


class Linear(nnx.Module):
    """y = x @ kernel + bias, in the dtype of x. kernel: [in_dim, out_dim] with logical `axes`."""

    def __init__(self, in_dim: int, out_dim: int, *, axes: tuple[str | None, str | None], bias: bool, rngs: nnx.Rngs, init=NORMAL):
        self.kernel = nnx.Param(init(rngs.params(), (in_dim, out_dim)), axes=axes)
        self.bias = nnx.Param(zeros(rngs.params(), (out_dim,)), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def matmul_to_fp32(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x: [..., D], kernel: [D, V], of one dtype -> float32[..., V]. Its gradients are GEMMs in that dtype too; JAX alone would run them in fp32, and slowly."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _forward(x, kernel):
    return matmul_to_fp32(x.value, kernel.value), (x.value if kernel.perturbed else None, kernel.value)


def _backward(residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(kernel.dtype)
    return gradient @ kernel.T, None if x is None else jnp.einsum("...d,...v->dv", x, gradient)


matmul_to_fp32.defvjp(_forward, _backward, symbolic_zeros=True)


class Embedding(nnx.Module):
    """Rows of a table [num, dim] by index."""

    def __init__(self, num: int, dim: int, *, axes: tuple[str | None, str | None], rngs: nnx.Rngs, init=NORMAL):
        self.embedding = nnx.Param(init(rngs.params(), (num, dim)), axes=axes)

    def __call__(self, ids: jax.Array, dtype) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0).astype(dtype)
