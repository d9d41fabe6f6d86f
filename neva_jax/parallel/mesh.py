"""The device mesh. Axes are always `pipeline, data, fsdp, tensor`, always AxisType.Auto: XLA places collectives from the few constraints we give.

Given up: explicit-sharding meshes (an embedding gather with both operands sharded over fsdp is an error there).
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from neva_jax.errors import UserError

AXES = ("pipeline", "data", "fsdp", "tensor")


def make_mesh(*, fsdp: int = 1, tensor: int = 1, pipeline: int = 1, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). What fsdp, tensor and pipeline leave over is the data axis."""
    devices = list(jax.devices() if devices is None else devices)
    model = fsdp * tensor * pipeline
    if len(devices) % model:
        raise UserError(
            f"{len(devices)} devices cannot be divided into fsdp {fsdp} x tensor {tensor} x pipeline {pipeline} = {model}; "
            "change model.fsdp_parallel_size or model.tensor_model_parallel_size to numbers whose product divides the devices"
        )
    shape = (pipeline, len(devices) // model, fsdp, tensor)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is split: the data parallel size of NeMo's formula (data x fsdp)."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
