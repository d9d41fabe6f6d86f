"""What a step takes by formula, where nothing can be compiled for a GPU: memory, GEMMs and collectives of a build.planned.Step.

Weights, optimizer and accumulated gradients are exact. What is kept for the backward pass is asked of JAX itself (the residuals of the very loss, recomputed as
the config says), as if attention were cuDNN's. Temporary memory is a formula, and collectives are those of the textbook: XLA may choose others.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from neva_jax.build.planned import KINDS, Step, local_bytes
from neva_jax.parallel.mesh import batch_shards
from neva_jax.training.loss import CHUNK
from neva_jax.training.step import micro_loss
from neva_jax.transforms.lora import adapters_of


@dataclasses.dataclass(frozen=True)
class Estimated:
    """The same as build.planned.Compiled says, uncompiled."""

    step: Step
    has_logits_tensor: bool = False  # by construction of training/loss.py
    seconds: float = 0.0

    @functools.cached_property
    def memory(self) -> dict[str, int]:
        fixed = self.step.fixed_bytes()
        activations = kept_bytes(self.step) + temporary_bytes(self.step)
        return {"total": sum(fixed.values()) + activations, **fixed, KINDS[-1]: activations}

    @property
    def gemms_per_layer(self) -> dict[str, float]:
        model, needed = self.step.config.model, self.step.needed_gemms
        forward = needed // (2 + ("llm" in self.step.model.trained_parts))
        again = 0.0
        if model.activations_checkpoint_granularity == "full" or self.step.bubble:
            chosen = model.activations_checkpoint_num_layers or 1 if model.activations_checkpoint_method == "block" and not self.step.bubble else math.inf
            again = forward * min(1.0, chosen / model.num_layers)
        return {"fp8": 0, "bf16": 0, "fp32": 0} | {_precision(self.step): needed + again}

    @property
    def adapter_gemms_per_layer(self) -> float:
        """To and from the rank forward, and four for each lora_B backward; a lora_A that projections share is applied once."""
        pairs = adapters_of(self.step.model.weights, self.step.model.lora).values()
        forward = len({lora_A for lora_A, _ in pairs}) + len(pairs)
        return forward + 4 * len(pairs) + forward * (self.step.config.model.activations_checkpoint_granularity == "full")

    @property
    def collectives(self) -> list[dict]:
        rows = [
            {"op": op, "axis": axis, "in_layers": axis != "data", "num_devices": self.step.mesh.shape[axis], "count": count, "bytes": int(payload)}
            for op, axis, count, payload in _collectives(self.step)
            if self.step.mesh.shape[axis] > 1
        ]
        return sorted(rows, key=lambda row: -row["bytes"])


def _precision(step: Step) -> str:
    return "fp8" if step.config.model.fp8 else "fp32" if step.model.config.llm.dtype == "float32" else "bf16"


def kept_bytes(step: Step) -> int:
    """Activations of a micro-batch that wait for the backward pass, on one device."""
    batch = jax.eval_shape(functools.partial(jax.tree.map, step.model.pipeline.fold), step.batch)
    micro = {name: jax.ShapeDtypeStruct(field.shape[1:], field.dtype) for name, field in batch.items()}
    plain = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)  # noqa: E731
    params, frozen = plain(step.state["params"] | step.state.get("scales", {})), plain(step.frozen)
    rows = jax.ShapeDtypeStruct((micro["tokens"].shape[0],), jnp.float32)

    def residuals(params, frozen, micro, rows):
        return jax.vjp(lambda p: micro_loss(step.model.graphdef, p, frozen, micro, rows), params)[1]

    weights = {leaf.shape for leaf in jax.tree.leaves((params, frozen))}
    kept, total = jax.tree.leaves(jax.eval_shape(residuals, params, frozen, micro, rows)), 0
    for leaf in kept:
        if leaf.shape in weights or leaf.shape.count(step.bucket.tokens) > 1:  # a weight is counted already, and cuDNN keeps no scores
            continue
        split = step.mesh.shape["tensor"] if leaf.shape[-1:] != (step.model.config.llm.hidden_size,) else 1
        total += leaf.size * leaf.dtype.itemsize / (batch_shards(step.mesh) * step.mesh.shape["pipeline"] * split)
    return int(total)


def temporary_bytes(step: Step) -> int:
    """Of one layer at work, of a chunk of logits, and of the gradients of one micro-batch before they are added up."""
    llm, shape = step.model.config.llm, step.mesh.shape
    rows, tensor = step.config.model.micro_batch_size, shape["tensor"]
    layer = rows * step.bucket.tokens * (10 * llm.hidden_size + 6 * llm.ffn_hidden_size / tensor) * 2
    logits = rows * CHUNK * llm.padded_vocab_size / tensor * 4 * 3
    return int(layer + logits + local_bytes(step.state["params"]) / 2)


def _collectives(step: Step) -> list[tuple[str, str, int, float]]:
    """(op, axis, count, bytes) of a step."""
    shape, llm, micro_batches = step.mesh.shape, step.model.config.llm, step.micro_batches
    trained, weights = local_bytes(step.state["params"]) / 2, local_bytes(step.frozen) + local_bytes(step.state["params"]) / 2
    activations = step.config.model.micro_batch_size * step.bucket.tokens * llm.hidden_size * 2
    turns = micro_batches * llm.num_layers / shape["pipeline"]
    return [
        ("all-reduce", "data", micro_batches, micro_batches * trained),
        ("all-gather", "fsdp", int(2 * 7 * turns), 2 * micro_batches * weights * shape["fsdp"]),
        ("reduce-scatter", "fsdp", int(7 * turns), micro_batches * trained * shape["fsdp"]),
        ("all-reduce", "tensor", int(4 * turns), 4 * turns * activations),
        ("collective-permute", "pipeline", int(2 * micro_batches), 2 * micro_batches * activations),
    ]
