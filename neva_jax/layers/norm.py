"""Normalisation over the last dimension: statistics in fp32, output in the dtype asked for (so that an fp32 residual stream feeds bf16 GEMMs)."""

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.initializers import ones, zeros
from neva_jax.parallel.layer_runner import keep


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, cast before the scale as Hugging Face's LlamaRMSNorm does. Zhang and Sennrich 2019."""

    def __init__(self, dim: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(ones(rngs.params(), (dim,)), axes=(None,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        dtype = dtype or x.dtype
        x = keep(x).astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return x.astype(dtype) * self.scale[...].astype(dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias. Ba et al. 2016."""

    def __init__(self, dim: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(self.initial_scale(rngs.params(), (dim,)), axes=(None,))
        self.bias = nnx.Param(zeros(rngs.params(), (dim,)), axes=(None,))
        self.epsilon = epsilon

    initial_scale = staticmethod(ones)

    def gain(self) -> jax.Array:
        return self.scale[...].astype(jnp.float32)

    def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
        dtype = dtype or x.dtype
        x = keep(x).astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon)
        return (x * self.gain() + self.bias[...].astype(jnp.float32)).astype(dtype)


class LayerNorm1P(LayerNorm):
    """NeMo's layernorm1p: the gain is stored minus one."""

    initial_scale = staticmethod(zeros)

    def gain(self) -> jax.Array:
        return 1.0 + self.scale[...].astype(jnp.float32)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "layernorm1p": LayerNorm1P}
