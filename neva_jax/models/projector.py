"""From the tower's width to the language model's, under NeMo's `mm_mlp_adapter_type` names:
identity, linear, mlp{N}x_gelu, mlp_downsample (2x2 neighbours become one token; two orders of the resulting tokens exist in the wild).

Layers are named as NeMo and LLaVA number them: mlp2x_gelu has "0" and "2", mlp_downsample "1", "2" and "4".
"""

import re

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.errors import UserError
from neva_jax.layers.initializers import uniform_fan_in
from neva_jax.layers.linear import Linear
from neva_jax.layers.mlp import gelu
from neva_jax.layers.norm import LayerNorm


class Projector(nnx.Module):
    """features: [..., S, E] -> [..., S', D]; S' = S, but for mlp_downsample. A chain of named layers, with GELU (erf) between Linears."""

    def __init__(self, kind: str, in_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.kind = kind
        self.linear_names = linear_names(kind)
        if kind.startswith("mlp_downsample"):
            in_dim = 4 * in_dim
            setattr(self, "1", LayerNorm(in_dim, 1e-5, rngs=rngs))
        for i, name in enumerate(self.linear_names):
            setattr(self, name, Linear(out_dim if i else in_dim, out_dim, axes=(None, "embed"), bias=True, init=uniform_fan_in, rngs=rngs))
        if kind == "identity" and in_dim != out_dim:
            raise UserError(f"mm_mlp_adapter_type identity joins equal widths; found a tower of width {in_dim} and a language model of width {out_dim}")

    def __call__(self, features: jax.Array) -> jax.Array:
        x = features
        if self.kind.startswith("mlp_downsample"):
            x = getattr(self, "1")(downsample(x, column_major=self.kind == "mlp_downsample"))
        for i, name in enumerate(self.linear_names):
            x = getattr(self, name)(gelu(x) if i else x)
        return x


def linear_names(kind: str) -> tuple[str, ...]:
    """The Linears of a kind, in order, under the numbers that NeMo and LLaVA give them."""
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        return tuple(str(2 * i) for i in range(int(match[1])))
    kinds = {"identity": (), "linear": ("linear",), "mlp_downsample": ("2", "4"), "mlp_downsample_rowmajor": ("2", "4")}
    if kind not in kinds:
        raise UserError(f"mm_mlp_adapter_type {kind!r} is not one of {', '.join(kinds)}, mlp<N>x_gelu; change model.mm_cfg.mm_mlp_adapter_type")
    return kinds[kind]


def downsample(x: jax.Array, *, column_major: bool) -> jax.Array:
    """[..., h * h, E] -> [..., ceil(h/2)**2, 4E]: an odd grid is padded with zeros at its end; channels are (r0c0, r0c1, r1c0, r1c1).

    column_major: blocks come out column by column, as NeMo 1.x writes them; else row by row, as NeMo 2 and VILA do.
    """
    *lead, length, width = x.shape
    grid = round(length**0.5)
    if grid * grid != length:
        raise UserError(
            f"mm_mlp_adapter_type mlp_downsample joins the neighbours of a square grid; found {length} features an image; "
            "set model.mm_cfg.vision_encoder.vision_select_feature to patch (no class token)"
        )
    half = -(-grid // 2)
    x = x.reshape(*lead, grid, grid, width)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, 2 * half - grid)] * 2 + [(0, 0)])
    x = x.reshape(*lead, half, 2, half, 2, width)
    n = len(lead)
    rows, columns = (n + 2, n) if column_major else (n, n + 2)
    x = x.transpose(*range(n), rows, columns, n + 1, n + 3, n + 4)
    return x.reshape(*lead, half * half, 4 * width)
