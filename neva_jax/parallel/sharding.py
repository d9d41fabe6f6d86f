"""Logical axes -> mesh axes: the one table, and the two ways to apply it (at rest: `weight_sharding`, on the way: `constrain`).

A weight says what its dimensions are (`axes=("embed", "heads")` beside its shape), this table says where that goes, and nothing else says anything.
A stacked weight has more dimensions than axes: the leading ones are layers. Where a part of a model is laid out differently, it says so around itself
(`axis_rules`) and of its weights (`weight_sharding`), with changes to the table, never with a flag in a layer.
"""

import contextlib
import contextvars
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neva_jax.errors import UserError

LOGICAL_AXIS_RULES = {
    # weights
    "layers": "pipeline",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": "tensor",  # of adapters, where the other side does not take the axis
    # activations
    "batch": ("data", "fsdp", "pipeline"),  # rows outside of a pipelined stack; inside, a stage has all rows of its micro-batch
    "length": None,
    "sequence": "tensor",  # length of the residual stream between blocks, where a model is built for sequence_parallel
}

ROWS = {"batch": ("data", "fsdp")}  # changes inside a pipelined stack
WHOLE = {"batch": ("data", "fsdp", "pipeline", "tensor")} | dict.fromkeys(("layers", "heads", "kv_heads", "mlp"))  # the vision tower's: rows over every device

_rules = contextvars.ContextVar("axis_rules", default=LOGICAL_AXIS_RULES)

FIELDS = {"tensor": "model.tensor_model_parallel_size", "fsdp": "model.fsdp_parallel_size", "pipeline": "model.pipeline_model_parallel_size"}


@contextlib.contextmanager
def axis_rules(changes: dict):
    """Within it, while a function is traced, activations follow the table with these changes."""
    token = _rules.set(_rules.get() | changes)
    try:
        yield
    finally:
        _rules.reset(token)


def partition_spec(axes: tuple[str | None, ...], rules: dict | None = None) -> PartitionSpec:
    """Logical axes of an array -> its PartitionSpec; a mesh axis that two dimensions ask for goes to the first."""
    used: set[str] = set()
    spec = []
    for axis in axes:
        mesh_axes = (_rules.get() if rules is None else rules)[axis] if axis else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
        names = tuple(name for name in names if name not in used)
        used.update(names)
        spec.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in use (`jax.set_mesh`); without one, x itself. A dimension is split over those of its mesh axes that divide it."""
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes:
        return x
    spec = [_dividing(size, names, sizes) for size, names in zip(x.shape, partition_spec(axes), strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _dividing(size: int, names, sizes: dict[str, int]):
    """The mesh axes, in order, over which `size` can be split evenly."""
    chosen: tuple[str, ...] = ()
    for name in (names,) if isinstance(names, str) else names or ():
        if size % math.prod(sizes[n] for n in (*chosen, name)) == 0:
            chosen = (*chosen, name)
    return chosen or None


def spread_rows(x: jax.Array) -> tuple[jax.Array, callable]:
    """Rows [B, ...] over all axes of "batch" in use, filled up with zeros where they do not divide, so that none is computed twice
    -> rows, and the function that takes away what was filled up: [B', ...] -> [B, ...].
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    home = math.prod(sizes[name] for name in ROWS["batch"]) if sizes else 1
    home = home if x.shape[0] % home == 0 else 1
    mine, parts = x.shape[0] // home, math.prod(sizes.values()) // home
    more = -mine % parts
    padded = jnp.pad(x.reshape(home, mine, *x.shape[1:]), [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 1))
    gather = lambda y: y.reshape(home, mine + more, *y.shape[1:])[:, :mine].reshape(x.shape[0], *y.shape[1:])  # noqa: E731
    return constrain(padded.reshape(-1, *x.shape[1:]), "batch", *(None,) * (x.ndim - 1)), gather


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """Heads [B, T, G, C] over the "heads" of the mesh. Key/value heads that are fewer than those devices are repeated, so that each device has a copy of
    the one that its query heads (of num_heads) read."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axis = _rules.get()["heads"]
    size = sizes[axis] if sizes and axis else 1
    if x.shape[2] % size and num_heads % size == 0:
        x = jnp.repeat(constrain(x, "batch", "length", None, None), size // math.gcd(x.shape[2], size), axis=2)
    return constrain(x, "batch", "length", "heads", None)


def weight_sharding(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, changes: dict | None = None) -> NamedSharding:
    """Where a weight lives, by the table with changes. A dimension that cannot be split evenly is an error that names the weight and the field to change."""
    spec = partition_spec(axes, LOGICAL_AXIS_RULES | (changes or {}))
    for dim, size, names in zip(axes, shape, spec, strict=True):
        for name in (names,) if isinstance(names, str) else names or ():
            if size % mesh.shape[name]:
                raise UserError(
                    f"{path}: its dimension {dim!r} of size {size} cannot be split over the {mesh.shape[name]} devices of the {name} axis; "
                    f"change {FIELDS.get(name, name)} to a divisor of {size}"
                )
    return NamedSharding(mesh, spec)


def also_over_data(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The same, split over the data axis too along the first dimension whose parts can be: for optimizer state that no forward pass reads.

    The leading one, of layers, comes last: XLA keeps gradients as their optimizer state lies, and would gather all layers to add one's.
    """
    spec, sizes = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec)), sharding.mesh.shape
    for i in (*range(1, len(shape)), *range(min(1, len(shape)))):
        dim, names = shape[i], spec[i]
        held = (names,) if isinstance(names, str) else tuple(names or ())
        if dim % (sizes["data"] * math.prod(sizes[name] for name in held)) == 0:
            spec[i] = (*held, "data")
            break
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [M, B, ...]: M micro-batches one after the other, B split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def place(array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array where its target says, in its dtype. array: `[slices]` reads a block: each device's own is read, and one that several devices hold only once."""
    blocks: dict[str, np.ndarray] = {}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in blocks:
            blocks[str(index)] = np.asarray(array[index]).astype(target.dtype, copy=False)
        return blocks[str(index)]

    return jax.make_array_from_callback(target.shape, target.sharding, block)
