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


class Embedding(nnx.Module):
    """Rows of a table [num, dim] by index."""

    def __init__(self, num: int, dim: int, *, axes: tuple[str | None, str | None], rngs: nnx.Rngs, init=NORMAL):
        self.embedding = nnx.Param(init(rngs.params(), (num, dim)), axes=axes)

    def __call__(self, ids: jax.Array, dtype) -> jax.Array:
        return jnp.take(self.embedding[...], ids, axis=0).astype(dtype)
