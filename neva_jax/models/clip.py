"""CLIP's vision tower (Radford et al. 2021) as LLaVA and NeVA read it: hidden states of one layer, class token kept or dropped, no last norm.

Blocks above `vision_select_layer` are stored, so that the tower can be written back whole, and never computed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.errors import UserError
from neva_jax.layers.attention import Attention
from neva_jax.layers.initializers import normal
from neva_jax.layers.linear import Embedding, Linear
from neva_jax.layers.mlp import MLP, gelu, gelu_tanh, quick_gelu
from neva_jax.layers.norm import LayerNorm
from neva_jax.layers.stack import run_stack, stack

HIDDEN_ACTS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_pytorch_tanh": gelu_tanh}


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """select_layer: index into the hidden states, 0 = the embeddings, -1 = after the last block, -2 (LLaVA, NeVA) = after the last but one."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layernorm_epsilon: float = 1e-5
    select_layer: int = -2
    keep_class_token: bool = False
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"a vision tower of hidden_size {self.hidden_size} cannot have {self.num_attention_heads} heads of equal width; "
                "change model.mm_cfg.vision_encoder.hidden_size or num_attention_heads"
            )

    @property
    def num_computed_layers(self) -> int:
        layers = self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer
        if not 0 <= layers <= self.num_layers:
            raise UserError(f"vision_select_layer {self.select_layer} does not exist in a tower of {self.num_layers} layers")
        return layers

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Vectors that the blocks compute: the patches and the class token."""
        return self.grid**2 + 1

    @property
    def num_tokens(self) -> int:
        """S: vectors an image gives."""
        return self.grid**2 + self.keep_class_token


class ClipBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x: [M, S, E]."""

    def __init__(self, config: ClipVisionConfig, attend, *, rngs: nnx.Rngs):
        dim, heads = config.hidden_size, config.num_attention_heads
        deep = dim**-0.5 * (2 * config.num_layers) ** -0.5  # the paper's initial values
        self.layer_norm1 = LayerNorm(dim, config.layernorm_epsilon, rngs=rngs)
        self.self_attn = Attention(
            dim, num_heads=heads, head_dim=dim // heads, attend=attend, is_causal=False, bias=True, out_name="out_proj", std=deep, out_std=dim**-0.5, rngs=rngs
        )
        self.layer_norm2 = LayerNorm(dim, config.layernorm_epsilon, rngs=rngs)
        self.mlp = MLP(
            dim, config.ffn_hidden_size, activation=HIDDEN_ACTS[config.hidden_act], gated=False, bias=True, std=(2 * dim) ** -0.5, out_std=deep, rngs=rngs
        )

    def __call__(self, x: jax.Array, side) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipVision(nnx.Module):
    def __init__(self, config: ClipVisionConfig, *, attend, runner, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.config, self.runner = config, runner
        self.class_embedding = nnx.Param(normal(dim**-0.5)(rngs.params(), (dim,)), axes=(None,))
        self.patch_embedding = Linear(config.patch_size**2 * 3, dim, axes=(None, "embed"), bias=False, rngs=rngs)
        self.position_embedding = Embedding(config.num_positions, dim, axes=(None, "embed"), init=normal(dim**-0.5), rngs=rngs)
        self.pre_layrnorm = LayerNorm(dim, config.layernorm_epsilon, rngs=rngs)  # sic: CLIP's own spelling
        self.layers = stack(lambda rngs: ClipBlock(config, attend, rngs=rngs), config.num_layers, rngs=rngs)
        self.post_layernorm = LayerNorm(dim, config.layernorm_epsilon, rngs=rngs)

    def normalize(self, media: jax.Array) -> jax.Array:
        """uint8[..., H, W, 3] -> float32 pixel values; floats are taken as normalised already."""
        if media.dtype != jnp.uint8:
            return media
        return (media.astype(jnp.float32) / 255 - jnp.array(self.config.image_mean)) / jnp.array(self.config.image_std)

    def __call__(self, media: jax.Array) -> jax.Array:
        """media: uint8 or float32[M, H, W, 3] -> features [M, S, E]"""
        c, p, g = self.config, self.config.patch_size, self.config.grid
        if media.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"media must be [M, H, W, 3] with H = W = {c.image_size}; found {list(media.shape)}")
        pixels = self.normalize(media[:, : g * p, : g * p]).astype(jnp.dtype(c.dtype))  # a rest outside every patch is not seen, as in a strided convolution
        patches = pixels.reshape(-1, g, p, g, p, 3).swapaxes(2, 3).reshape(-1, g * g, p * p * 3)
        x = self.patch_embedding(patches)
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([class_token, x], 1) + self.position_embedding.embedding[...].astype(x.dtype)
        x = run_stack(self.layers, self.pre_layrnorm(x), None, runner=self.runner, num_layers=c.num_computed_layers)
        return x if c.keep_class_token else x[:, 1:]
