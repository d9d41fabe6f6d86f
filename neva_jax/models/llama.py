"""Llama, and what NeMo's GPT config can make of it: RMSNorm or LayerNorm(1p), rotary embedding of all or part of a head, grouped heads, gated or plain MLP.

Touvron et al. 2023. Names of weights are Hugging Face's, names of numbers NeMo's. Given up: dropout, learned positions, post-norm blocks, experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.attention import Attention
from neva_jax.layers.initializers import normal
from neva_jax.layers.linear import Embedding, Linear, matmul_to_fp32
from neva_jax.layers.mlp import ACTIVATIONS, MLP, gelu_tanh
from neva_jax.layers.norm import NORMS
from neva_jax.layers.rope import Rope
from neva_jax.layers.stack import run_stack, stack
from neva_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """vocab_size: pieces of the tokenizer; padded_vocab_size: rows of the table (rows above vocab_size never win)."""

    vocab_size: int
    padded_vocab_size: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    rope: Rope
    normalization: str = "rmsnorm"
    layernorm_epsilon: float = 1e-5
    activation: str = "fast-swiglu"
    openai_gelu: bool = False
    bias: bool = False
    qkv_bias: bool = False
    tied: bool = False
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    init_std: float = 0.02
    output_init_std: float = 0.02
    dtype: str = "float32"  # of the computation
    residual_dtype: str = "float32"
    residual_axes: tuple[str | None, ...] = ("batch", "length", None)


class LlamaBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x: [B, T, D]; side: (cos, sin), segment_ids."""

    def __init__(self, config: LlamaConfig, attend, *, rngs: nnx.Rngs):
        norm = NORMS[config.normalization]
        activation, gated = ACTIVATIONS[config.activation]
        activation = gelu_tanh if config.openai_gelu else activation
        std = {"std": config.init_std, "out_std": config.output_init_std}
        self.input_layernorm = norm(config.hidden_size, config.layernorm_epsilon, rngs=rngs)
        self.self_attn = Attention(
            config.hidden_size, num_heads=config.num_attention_heads, num_kv_heads=config.num_query_groups, head_dim=config.head_dim, attend=attend,
            is_causal=True, bias=config.bias, qkv_bias=config.qkv_bias, scale=config.attention_scale, rngs=rngs, **std,
        )  # fmt: skip
        self.post_attention_layernorm = norm(config.hidden_size, config.layernorm_epsilon, rngs=rngs)
        self.mlp = MLP(config.hidden_size, config.ffn_hidden_size, activation=activation, gated=gated, bias=config.bias, rngs=rngs, **std)
        self.dtype, self.residual_axes = jnp.dtype(config.dtype), config.residual_axes

    def __call__(self, x: jax.Array, side) -> jax.Array:
        angles, segment_ids = side
        x = constrain(x, *self.residual_axes)
        x = x + self.self_attn(self.input_layernorm(x, self.dtype), angles=angles, segment_ids=segment_ids)
        return x + self.mlp(self.post_attention_layernorm(x, self.dtype))


class Llama(nnx.Module):
    """embed -> decode -> logits, apart, because a multimodal model puts media between the first two and a loss picks positions before the last."""

    def __init__(self, config: LlamaConfig, *, attend, runner, rngs: nnx.Rngs):
        rows, dim, init = config.padded_vocab_size, config.hidden_size, normal(config.init_std)
        self.config, self.runner = config, runner
        self.embed_tokens = Embedding(rows, dim, axes=("vocab", "embed"), init=init, rngs=rngs)
        self.layers = stack(lambda rngs: LlamaBlock(config, attend, rngs=rngs), config.num_layers, rngs=rngs)
        self.norm = NORMS[config.normalization](dim, config.layernorm_epsilon, rngs=rngs)
        self.lm_head = None if config.tied else Linear(dim, rows, axes=("embed", "vocab"), bias=False, init=init, rngs=rngs)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32[B, T] -> [B, T, D]"""
        return self.embed_tokens(tokens, jnp.dtype(self.config.residual_dtype))

    def decode(self, embeddings: jax.Array, position_ids: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """embeddings: [B, T, D], position_ids and segment_ids: int32[B, T] (0: padding) -> hidden [B, T, D], before the last norm."""
        with jax.named_scope("llm_layers"):  # by this name the planner finds the layers' GEMMs in a compiled step
            return run_stack(self.layers, embeddings, (self.config.rope.angles(position_ids), segment_ids), runner=self.runner)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] of `decode` -> float32[..., V padded]; rows above vocab_size are the smallest float."""
        hidden = self.norm(hidden, jnp.dtype(self.config.dtype))
        kernel = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        logits = matmul_to_fp32(hidden, kernel.astype(hidden.dtype))
        logits = constrain(logits, *(("batch",) + (None,) * (logits.ndim - 2) + ("vocab",)))
        padding = jnp.arange(self.config.padded_vocab_size) >= self.config.vocab_size
        return jnp.where(padding, jnp.finfo(jnp.float32).min, logits)

    def __call__(self, tokens: jax.Array, position_ids: jax.Array | None = None, segment_ids: jax.Array | None = None) -> jax.Array:
        """tokens: int32[B, T] -> logits float32[B, T, V padded]: the whole language model, for text alone."""
        position_ids = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if position_ids is None else position_ids
        return self.logits(self.decode(self.embed(tokens), position_ids, segment_ids))
