"""Rotary position embedding, in Hugging Face's (and NeMo's) half-split convention: [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin]. Su et al. 2021.

Frequencies are numbers known at build time (numpy); angles are computed once a step, outside the layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """head_dim: C. percentage: share of C that is rotated. interpolation: positions are divided by it (Chen et al. 2023).
    llama3: (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings) of Llama-3.1's scaling, or None.
    """

    head_dim: int
    base: float = 10000.0
    percentage: float = 1.0
    interpolation: float = 1.0
    llama3: tuple[float, float, float, int] | None = None

    def frequencies(self) -> np.ndarray:
        """float32[R / 2], R = int(C * percentage): radians a position. Rounded where torch rounds: at position 4,096 one last bit of a frequency
        moves its angle by 2e-4, and the weights were trained with theirs."""
        dim = int(self.head_dim * self.percentage)
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        frequencies = 1 / np.power(self.base, exponents, dtype=np.float64).astype(np.float32)
        if self.llama3:
            frequencies = _llama3(frequencies, *self.llama3)
        return (frequencies / self.interpolation).astype(np.float32)

    def angles(self, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """position_ids: int32[B, T] -> cos, sin: float32[B, T, 1, R / 2]."""
        angle = position_ids[..., None].astype(jnp.float32) * self.frequencies()
        return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def _llama3(frequencies, factor, low, high, original_length):
    """Llama 3.1: short waves stay, long waves are divided by `factor`, those between are blended."""
    wavelength = 2 * math.pi / frequencies
    blend = np.clip((original_length / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x: [B, T, H, C]; its first R dimensions are rotated, the rest pass. In fp32, back in the dtype of x."""
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    x1, x2 = x1.astype(jnp.float32), x2.astype(jnp.float32)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], -1) if rest.shape[-1] else rotated
