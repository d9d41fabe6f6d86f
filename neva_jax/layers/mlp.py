"""The feed-forward half of a block: gated (gate_proj, up_proj, down_proj) or plain (up_proj, down_proj), by NeMo's activation names."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.layers.initializers import normal
from neva_jax.layers.linear import Linear
from neva_jax.parallel.layer_runner import keep
from neva_jax.parallel.sharding import constrain

gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


def quick_gelu(x):
    """CLIP's x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def squared_relu(x):
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {  # NeMo's names -> (function, gated). "fast-" says how NeMo fuses two matrices and changes no number
    "gelu": (gelu, False),
    "approx-gelu": (quick_gelu, False),  # NeMo's ApproxGELUActivation; the tanh form is its `openai_gelu`
    "squared-relu": (squared_relu, False),
    "geglu": (gelu, True),
    "swiglu": (jax.nn.silu, True),
    "reglu": (jax.nn.relu, True),
}
ACTIVATIONS |= {f"fast-{name}": ACTIVATIONS[name] for name in ("geglu", "swiglu", "reglu")}


class MLP(nnx.Module):
    """x: [B, T, D] -> [B, T, D]: down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated."""

    def __init__(self, dim: int, ffn_dim: int, *, activation, gated: bool, bias: bool, rngs: nnx.Rngs, std: float = 0.02, out_std: float = 0.02):
        self.gate_proj = Linear(dim, ffn_dim, axes=("embed", "mlp"), bias=bias, rngs=rngs, init=normal(std)) if gated else None
        self.up_proj = Linear(dim, ffn_dim, axes=("embed", "mlp"), bias=bias, rngs=rngs, init=normal(std))
        self.down_proj = Linear(ffn_dim, dim, axes=("mlp", "embed"), bias=bias, rngs=rngs, init=normal(out_std))
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        up = keep(self.up_proj(x))
        h = self.activation(up) if self.gate_proj is None else self.activation(keep(self.gate_proj(x))) * up
        return self.down_proj(constrain(h, "batch", "length", "mlp"))
