"""Self-attention (multi-head, grouped, multi-query) over `jax.nn.dot_product_attention`: cuDNN's flash kernel on a GPU, XLA elsewhere.

The kernel is chosen once, by `make_attend`, and handed to the model. Rows are right-padded: a row's valid length is the count of its non-zero
segment ids. More than one segment a row is refused by the data until packing comes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.initializers import normal
from neva_jax.layers.linear import Linear
from neva_jax.layers.rope import rotate
from neva_jax.parallel.layer_runner import keep
from neva_jax.parallel.sharding import split_heads


def attend(query, key, value, segment_ids=None, *, is_causal: bool, scale: float | None = None, implementation: str = "xla"):
    """query: [B, T, H, C], key and value: [B, T, G, C], segment_ids: int32[B, T] or None -> [B, T, H, C]. Softmax in fp32."""
    lengths = None if segment_ids is None else jnp.sum(segment_ids != 0, -1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, implementation=implementation, query_seq_lengths=lengths, key_value_seq_lengths=lengths
    )


def _cudnn_outputs(primitive, *_, **params) -> bool:
    """Output and softmax statistics. `jax.nn` does not name them, and its primitive is private: known by its name alone, which tests/gpu_graph watches."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _xla_outputs(primitive, *_, **params) -> bool:
    """The two products, the only ones of a block with batch dimensions."""
    return primitive.name == "dot_general" and params["dimension_numbers"][1] != ((), ())


KEEP_OUTPUTS = {"cudnn": _cudnn_outputs, "xla": _xla_outputs}  # policies for jax.checkpoint under which attention is not computed twice


def make_attend(*, platform: str, dtype, head_dim: int, use_flash_attention: bool = True):
    """The attention kernel for a platform ("gpu", "cpu"), and its name. cuDNN's wants 16-bit floats and C a multiple of 8, at most 128."""
    fits = platform in ("gpu", "cuda") and use_flash_attention and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    implementation = "cudnn" if fits else "xla"
    return functools.partial(attend, implementation=implementation), implementation


class Attention(nnx.Module):
    """x: [B, T, D] -> [B, T, D]. Weights under Hugging Face's names; heads appear only by reshape, so each kernel is one GEMM."""

    def __init__(
        self, dim: int, *, num_heads: int, head_dim: int, attend, is_causal: bool, rngs: nnx.Rngs, num_kv_heads: int | None = None,
        bias: bool = False, qkv_bias: bool = False, out_name: str = "o_proj", scale: float | None = None, std: float = 0.02, out_std: float = 0.02,
    ):  # fmt: skip
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads or num_heads, head_dim
        self.attend, self.is_causal, self.scale, self.out_name = attend, is_causal, scale, out_name
        q_dim, kv_dim, qkv_bias = num_heads * head_dim, self.num_kv_heads * head_dim, bias or qkv_bias
        self.q_proj = Linear(dim, q_dim, axes=("embed", "heads"), bias=qkv_bias, rngs=rngs, init=normal(std))
        self.k_proj = Linear(dim, kv_dim, axes=("embed", "kv_heads"), bias=qkv_bias, rngs=rngs, init=normal(std))
        self.v_proj = Linear(dim, kv_dim, axes=("embed", "kv_heads"), bias=qkv_bias, rngs=rngs, init=normal(std))
        setattr(self, out_name, Linear(q_dim, dim, axes=("heads", "embed"), bias=bias, rngs=rngs, init=normal(out_std)))

    def __call__(self, x: jax.Array, *, angles=None, segment_ids=None) -> jax.Array:
        batch, length = x.shape[:2]
        query = self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim)
        key = self.k_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        value = self.v_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        query, key, value = (keep(split_heads(part, self.num_heads)) for part in (query, key, value))
        out = self.attend(query, key, value, segment_ids, is_causal=self.is_causal, scale=self.scale)
        return getattr(self, self.out_name)(out.reshape(batch, length, -1))
