"""The step of a config for devices that need not be there: described with abstract arrays alone (no weights, no data), compiled, and read.

Given up: validation's step and generation, which need less memory than training's.
"""

import dataclasses
import functools
import math
import time
from collections import Counter

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from neva_jax.build import model as build_model
from neva_jax.build import run as build_run
from neva_jax.data.pipeline import pad_examples
from neva_jax.data.plan import Bucket
from neva_jax.layers.mlp import ACTIVATIONS
from neva_jax.parallel import hlo
from neva_jax.parallel.deviceless import COMPILER_OPTIONS
from neva_jax.parallel.mesh import batch_shards
from neva_jax.parallel.sharding import also_over_data, batch_sharding, replicated
from neva_jax.training.optimizer import SHARDED_OVER_DATA
from neva_jax.transforms.lora import SCOPE as ADAPTER_SCOPE

SCOPE = "llm_layers"  # models/llama.py
# This pass writes out the zeros that accumulated gradients start from, in the memory of the machine that compiles: 27 GB for 7B unsharded. What it moves out of
# the loop over micro-batches, the reduction of the embedding's and the head's gradients, is little; above so many bytes it is left out.
ZEROS_PASS, ZEROS = "while-loop-all-reduce-code-motion", 6 * 2**30
KINDS = ("frozen", "trainable", "optimizer", "gradients", "activations_and_temporary")


@dataclasses.dataclass(frozen=True)
class Step:
    """What training would jit, and the arguments it would call it with, as ShapeDtypeStructs."""

    config: ConfigDict
    model: build_model.Model
    mesh: Mesh
    bucket: Bucket
    jitted: object
    state: dict
    frozen: dict
    batch: dict
    scalars: tuple

    @property
    def micro_batches(self) -> int:
        return self.config.model.global_batch_size // (self.config.model.micro_batch_size * batch_shards(self.mesh))

    @property
    def bubble(self) -> float:
        """What a pipeline's idle ticks add to the work of a step."""
        idle = self.model.pipeline.bubble
        return idle / (1 - idle)

    def fixed_bytes(self) -> dict[str, int]:
        """What lies in a device's memory whatever the batch."""
        optim, trainable = self.config.model.optim, local_bytes(self.state["params"])
        lies = also_over_data if optim.name in SHARDED_OVER_DATA else lambda sharding, shape: sharding  # XLA keeps gradients as their optimizer state
        add = lambda p: jax.ShapeDtypeStruct(p.shape, build_run.ACCUMULATE[optim.grad_accum_dtype], sharding=lies(p.sharding, p.shape))  # noqa: E731
        gradients = local_bytes(jax.tree.map(add, self.state["params"]))
        return {"frozen": local_bytes(self.frozen), "trainable": trainable, "optimizer": local_bytes(self.state) - trainable, "gradients": gradients}

    @property
    def needed_gemms(self) -> int:
        """GEMMs of a layer that the mathematics asks for: each projection forward, for its activation's gradient, and for its weight's if that trains."""
        projections = 7 if ACTIVATIONS[self.model.config.llm.activation][1] else 6
        return projections * (2 + ("llm" in self.model.trained_parts))


def describe_step(config: ConfigDict, devices: list, vocab_size: int, bucket: Bucket) -> Step:
    """The step of build_run.build_step on a mesh of `devices`, absent ones too. UserErrors as training would raise them."""
    mesh = build_run.build_mesh(config, devices)
    with jax.set_mesh(mesh):
        model = build_model.build_model(config, build_model.neva_config(config, vocab_size), mesh)
        optimizer, _ = build_run.build_optimizer(config, model)
        state = build_run.abstract_state(config, model, optimizer, mesh)
        frozen = {path: model.target(path) for path in model.weights if path not in model.rows}
        state, frozen = model.pipeline.live((state, frozen))
        jitted = build_run.build_step(config, model, optimizer, mesh)
    stop = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    learning_rate = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
    batch = abstract_batch(config, model.config.vision.image_size, mesh, bucket)
    return Step(config, model, mesh, bucket, jitted, state, frozen, batch, (learning_rate, stop))


def abstract_batch(config: ConfigDict, image_size: int, mesh: Mesh, bucket: Bucket) -> dict:
    """A global batch of that bucket, fields [M, B, ...] as the data makes them."""
    row = pad_examples([None], bucket, np.zeros((0, image_size, image_size, 3), np.uint8))
    width = config.model.micro_batch_size * batch_shards(mesh)
    shape = (config.model.global_batch_size // width, width)
    return {name: jax.ShapeDtypeStruct((*shape, *array.shape[1:]), array.dtype, sharding=batch_sharding(mesh)) for name, array in row.items()}


def local_bytes(tree) -> int:
    """Bytes of a device's share."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---- compiled ----------------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step compiled, as text and as XLA's account of a device's memory in bytes. donated: bytes of the state whose place the new state takes."""

    step: Step
    text: str
    total: int
    donated: int
    seconds: float

    @functools.cached_property
    def module(self) -> hlo.Module:
        return hlo.parse(self.text)

    @functools.cached_property
    def layers(self) -> frozenset[str]:
        """The computations of the language model's layers."""
        return hlo.loops_of(self.module, SCOPE)

    @property
    def memory(self) -> dict[str, int]:
        """{kind: bytes on a device}, which sum up to `total`. Gradients are those that are accumulated; those of one micro-batch are temporary."""
        fixed = self.step.fixed_bytes()
        return {"total": self.total, **fixed, KINDS[-1]: self.total - sum(fixed.values())}

    @property
    def gemms_per_layer(self) -> dict[str, float]:
        """GEMMs that a layer runs for a micro-batch, by precision, without those of adapters; what is computed again counts again."""
        return self._gemms(of_adapters=False)

    @property
    def adapter_gemms_per_layer(self) -> float:
        """The small ones: to and from the rank."""
        return sum(self._gemms(of_adapters=True).values())

    def _gemms(self, of_adapters: bool) -> dict[str, float]:
        model, counts = self.step.config.model, Counter()
        for gemm in hlo.gemms(self.module):
            if gemm.computation in self.layers and not gemm.batched and (f"{ADAPTER_SCOPE}/" in gemm.op_name) is of_adapters:
                counts[gemm.precision] += gemm.count
        stages = self.step.mesh.shape["pipeline"]
        runs = model.num_layers / stages * self.step.micro_batches * (1 + self.step.bubble)
        return {precision: _whole(counts[precision] / runs) for precision in ("fp8", "bf16", "fp32")}

    @property
    def collectives(self) -> list[dict]:
        """One row for each op, axis and place: count and bytes of a step, on one device. in_layers: inside the language model's layers."""
        rows = {}
        for one in hlo.collectives(self.module, dict(self.step.mesh.shape)):
            key = one.op, one.axis, one.computation in self.layers
            row = rows.setdefault(key, {"op": one.op, "axis": one.axis, "in_layers": key[2], "num_devices": one.num_devices, "count": 0, "bytes": 0})
            row["count"] += one.count
            row["bytes"] += one.count * one.bytes
        return sorted(rows.values(), key=lambda row: -row["bytes"])

    @property
    def has_logits_tensor(self) -> bool:
        """Whether a tensor of a micro-batch's rows x T x vocabulary exists on some device."""
        llm, shape = self.step.model.config.llm, self.step.mesh.shape
        rows = self.step.config.model.micro_batch_size * self.step.bucket.tokens
        weights = frozenset(llm.hidden_size // parts for parts in (1, shape["fsdp"], shape["data"], shape["fsdp"] * shape["data"]))
        widths = {llm.padded_vocab_size // parts for parts in (1, shape["tensor"])}
        return any(hlo.holds_tensor(self.text, width=width, rows=rows, but_not=weights) for width in widths)


def _whole(count: float) -> float:
    return round(count) if abs(count - round(count)) < 1e-6 else round(count, 2)


def compile_step(step: Step) -> Compiled:
    start, large = time.perf_counter(), local_bytes(step.state["params"]) > ZEROS
    with jax.set_mesh(step.mesh):
        lowered = step.jitted.lower(step.state, step.frozen, step.batch, *step.scalars)
        compiled = lowered.compile(COMPILER_OPTIONS | ({"xla_disable_hlo_passes": ZEROS_PASS} if large else {}))
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(step, compiled.as_text(), total, memory.alias_size_in_bytes, time.perf_counter() - start)
