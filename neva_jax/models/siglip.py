"""SigLIP's vision tower (Zhai et al. 2023) as LLaVA and NeVA read it: CLIP's blocks without a class token and without a norm before them, patches with a bias.

Blocks above `vision_select_layer` and the norm behind them are stored, so that the tower can be written back, and never computed. Given up: the pooling head,
which only SigLIP's own training reads, and its initial values (a tower born here has CLIP's).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.initializers import normal
from neva_jax.layers.linear import Embedding, Linear
from neva_jax.layers.norm import LayerNorm
from neva_jax.layers.stack import run_stack, stack
from neva_jax.models.clip import ClipBlock, ClipVision, ClipVisionConfig


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(ClipVisionConfig):
    """CLIP's fields with SigLIP's defaults; there is no class token that could be kept."""

    hidden_act: str = "gelu_pytorch_tanh"
    layernorm_epsilon: float = 1e-6
    keep_class_token: ClassVar[bool] = False  # no field here
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def num_positions(self) -> int:
        return self.grid**2


class SiglipVision(nnx.Module):
    def __init__(self, config: SiglipVisionConfig, *, attend, runner, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.config, self.runner = config, runner
        self.patch_embedding = Linear(config.patch_size**2 * 3, dim, axes=(None, "embed"), bias=True, rngs=rngs)
        self.position_embedding = Embedding(config.num_positions, dim, axes=(None, "embed"), init=normal(dim**-0.5), rngs=rngs)
        self.layers = stack(lambda rngs: ClipBlock(config, attend, rngs=rngs), config.num_layers, rngs=rngs)
        self.post_layernorm = LayerNorm(dim, config.layernorm_epsilon, rngs=rngs)

    normalize = ClipVision.normalize

    def __call__(self, media: jax.Array) -> jax.Array:
        """media: uint8 or float32[M, H, W, 3] -> features [M, S, E]"""
        c, p, g = self.config, self.config.patch_size, self.config.grid
        if media.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"media must be [M, H, W, 3] with H = W = {c.image_size}; found {list(media.shape)}")
        pixels = self.normalize(media[:, : g * p, : g * p]).astype(jnp.dtype(c.dtype))  # 14 x 27 of 384: the rest is not seen, as in a strided convolution
        patches = pixels.reshape(-1, g, p, g, p, 3).swapaxes(2, 3).reshape(-1, g * g, p * p * 3)
        x = self.patch_embedding(patches)
        x = x + self.position_embedding.embedding[...].astype(x.dtype)
        return run_stack(self.layers, x, None, runner=self.runner, num_layers=c.num_computed_layers)
