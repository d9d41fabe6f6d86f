"""LoRA (Hu et al. 2021): Linears that a path pattern finds also give (x A) B * alpha / rank, and A and B train in their stead.

`q_proj/kernel` stays what and where it was; beside it stand `q_proj/lora_A` [in, rank] and `q_proj/lora_B` [rank, out], stacked over layers like it and sharded
as its two sides are. Where tensor parallel devices share its columns they share A's too, as NeMo has it, if the rank can be divided: what an adapter gives to
the gradient of x is then a sum over devices like the base's, and is reduced together with it. Products are in the dtype of x, also beside a float8 kernel.

Projections that share an input may share one A (NeMo's fused adapters of q, k, v and of gate, up): it lies with the first of them by name. Layers that have no
adapter have zeros in A and in B, from where no gradient leads away.
"""

import dataclasses
import difflib
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.errors import UserError
from neva_jax.layers.linear import Linear
from neva_jax.parallel.layer_runner import keep
from neva_jax.transforms.fp8 import Fp8Linear

PATTERN = r"/lora_[AB]$"  # finds the path of an adapter's weight
SCOPE = "lora"  # in the name of every operation of an adapter, so that a compiled program's other GEMMs can be counted without them

INITIALIZERS = {  # NeMo's names -> (key, shape [..., in, out]) -> values
    "xavier": lambda key, shape: (2 / (shape[-2] + shape[-1])) ** 0.5 * jax.random.normal(key, shape),
    "normal": lambda key, shape: 0.2 * jax.random.normal(key, shape),
    "kaiming": lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) * shape[-2] ** -0.5,
    "zero": lambda key, shape: jnp.zeros(shape),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """pattern: finds (re.search) paths of Linears, as llm/layers/self_attn/q_proj. shares_input: those it finds in one module have one A."""

    pattern: str
    shares_input: bool = False


@dataclasses.dataclass(frozen=True)
class Lora:
    """layers: those that have adapters, counted from 0; None: all. init_A, init_B: names of INITIALIZERS. dropout: the share of what goes into an adapter
    ("pre") or comes out of it ("post") that training drops; see `DropoutKey`."""

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    layers: tuple[int, ...] | None = None
    init_A: str = "xavier"
    init_B: str = "zero"
    dropout: float = 0.0
    dropout_position: str = "post"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class DropoutKey(nnx.Variable):
    """A PRNG key, one a layer: given anew for every micro-batch."""


class _Adapter:
    """What a Linear's class is mixed with."""

    def __init__(self, linear: nnx.Module, lora: Lora, lora_A: nnx.Param, lora_B: nnx.Param, lora_key: DropoutKey | None):
        """linear: the one that it replaces; its weights and numbers are taken over."""
        for name, value in vars(linear).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.lora, self.lora_A, self.lora_B, self.lora_key = lora, lora_A, lora_B, lora_key

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope(SCOPE):
            h = keep(self._drop(x, "pre") @ self.lora_A[...].astype(x.dtype))
            more = self._drop(h @ self.lora_B[...].astype(x.dtype), "post") * self.lora.scale
        return super().__call__(x) + more

    def _drop(self, x: jax.Array, position: str) -> jax.Array:
        if not self.lora.dropout or position != self.lora.dropout_position:
            return x
        kept = jax.random.bernoulli(self.lora_key.get_value(), 1 - self.lora.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.lora.dropout), 0)


class LoraLinear(_Adapter, Linear):
    pass


class LoraFp8Linear(_Adapter, Fp8Linear):
    pass


ADAPTED = {Linear: LoraLinear, Fp8Linear: LoraFp8Linear}


def apply_lora(model: nnx.Module, lora: Lora, rngs: nnx.Rngs) -> nnx.Module:
    """The same model with adapters; without any dropout it computes what it did, as long as init_B is "zero"."""
    linears = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if type(module) in ADAPTED}
    owners, new = find_targets(linears, lora.targets), functools.partial(_new, layers=lora.layers, rngs=rngs)
    lora_As: dict[str, nnx.Param] = {}
    keys: dict[str, DropoutKey] = {}
    for path, owner in owners.items():
        linear = linears[path]
        (*stack, in_dim, out_dim), (in_axis, out_axis) = linear.kernel.shape, linear.kernel.get_metadata("axes")
        if owner not in lora_As:
            lora_As[owner] = new(lora.init_A, (*stack, in_dim, lora.rank), axes=(in_axis, "rank"))
        width = sum(linears[other].kernel.shape[-1] for other in owners if owners[other] == owner)  # of all that share the A, as xavier counts them
        lora_B = new(lora.init_B, (*stack, lora.rank, width), axes=(None, out_axis), columns=out_dim)
        home = owner if lora.dropout_position == "pre" else path  # what goes into several adapters is dropped once
        if lora.dropout and home not in keys:
            keys[home] = DropoutKey(jax.random.split(jax.random.key(0), stack))
        adapted = ADAPTED[type(linear)](linear, lora, lora_As[owner], lora_B, keys.get(home))
        *parents, name = path.split("/")
        setattr(functools.reduce(getattr, parents, model), name, adapted)
    return model


def _new(init: str, shape: tuple[int, ...], *, axes: tuple, layers, rngs: nnx.Rngs, columns: int | None = None) -> nnx.Param:
    """columns: how many of the shape's last dimension are this Linear's own."""
    values = INITIALIZERS[init](rngs.params(), shape)[..., :columns].astype(jnp.float32)
    if layers is not None:
        values *= jnp.zeros((shape[0], 1, 1)).at[jnp.array(layers)].set(1)
    return nnx.Param(values, axes=axes)


def find_targets(linears, targets: tuple[Target, ...]) -> dict[str, str]:
    """linears: paths of Linears -> {path of one that gets an adapter: path of the Linear with which its A lies}. A pattern that finds nothing is an error."""
    owners: dict[str, str] = {}
    for target in targets:
        found = sorted(path for path in linears if re.search(target.pattern, path))
        if not found:
            near = difflib.get_close_matches(target.pattern, linears, n=3, cutoff=0.2)
            raise UserError(f"LoRA: the pattern {target.pattern!r} finds no Linear of the model; near misses: {', '.join(near) or 'none'}")
        for path in found:
            together = [other for other in found if other.rpartition("/")[0] == path.rpartition("/")[0]]
            owners.setdefault(path, together[0] if target.shares_input else path)
    return dict(sorted(owners.items()))


def adapters_of(weights, lora: Lora | None) -> dict[str, tuple[str, str]]:
    """weights: paths of a model's weights -> {path of a kernel: (path of its A, path of its B)}"""
    linears = [path.removesuffix("/kernel") for path in weights if path.endswith("/kernel")]
    owners = find_targets(linears, lora.targets) if lora else {}
    return {f"{path}/kernel": (f"{owner}/lora_A", f"{path}/lora_B") for path, owner in owners.items()}


def is_adapter(path: str) -> bool:
    return re.search(PATTERN, path) is not None


# ---- dropout -----------------------------------------------------------------------------------------------------------------------------------------


def describe_keys(make) -> tuple[nnx.GraphDef, dict[str, tuple[int, ...]]]:
    """make() -> module with adapters that drop; nothing is computed. -> (graphdef, {path of a DropoutKey: shape})"""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state) if isinstance(v, DropoutKey)}


def draw_keys(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """{path of a DropoutKey: its value}, from one key a micro-batch."""
    return {path: jax.random.split(jax.random.fold_in(key, number), shape) for number, (path, shape) in enumerate(sorted(shapes.items()))}
