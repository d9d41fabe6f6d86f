"""Logical axes -> mesh axes: the one table, and the two ways to apply it (at rest: `weight_sharding`, on the way: `constrain`).

A weight says what its dimensions are (`axes=("embed", "heads")` beside its shape), this table says where that goes, and nothing else says anything.
A stacked weight has more dimensions than axes: the leading ones are layers.
"""

import jax
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
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "sequence": "tensor",  # length of the residual stream between blocks, where a model is built for sequence_parallel
}

FIELDS = {"tensor": "model.tensor_model_parallel_size", "fsdp": "model.fsdp_parallel_size", "pipeline": "model.pipeline_model_parallel_size"}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes of an array -> its PartitionSpec; a mesh axis that two dimensions ask for goes to the first."""
    used: set[str] = set()
    spec = []
    for axis in axes:
        mesh_axes = LOGICAL_AXIS_RULES[axis] if axis else None
        names = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
        names = tuple(name for name in names if name not in used)
        used.update(names)
        spec.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in use (`jax.set_mesh`); without one, x itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def weight_sharding(path: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """Where a weight lives. A dimension that cannot be split evenly is an error that names the weight and the field to change."""
    spec = partition_spec(axes)
    for dim, size, names in zip(axes, shape, spec, strict=True):
        for name in (names,) if isinstance(names, str) else names or ():
            if size % mesh.shape[name]:
                raise UserError(
                    f"{path}: its dimension {dim!r} of size {size} cannot be split over the {mesh.shape[name]} devices of the {name} axis; "
                    f"change {FIELDS.get(name, name)} to a divisor of {size}"
                )
    return NamedSharding(mesh, spec)


def also_over_data(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The same, split over the data axis too along the first dimension that is free and divides: for optimizer state that no forward pass reads."""
    spec = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
    size = sharding.mesh.shape["data"]
    free = next((i for i, (dim, names) in enumerate(zip(shape, spec, strict=True)) if names is None and dim % size == 0), None)
    if free is not None:
        spec[free] = "data"
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
