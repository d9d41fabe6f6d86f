"""How long a step should take on a card, by formula: what a datasheet allows (ideal), and what well-tuned programs reach (expected).

    expected = stages' bubble x (max(compute, hidden communication) + exposed communication) + update
    compute  = GEMMs: the larger of FLOPs / (GEMM share x peak) and weights read / (MEMORY share x bandwidth), + attention FLOPs / (ATTENTION share x peak)
               + what lies between the GEMMs: 2 bytes x tokens x layers x (40 D + 14 F + 5 W) / (MEMORY share x bandwidth); W: in + out of adapted projections
    communication of an axis = bytes that one GPU sends / (LINK share x link); tensor and pipeline are exposed, data and fsdp hide behind the compute;
               the link is that between machines where an axis and those inside it (the mesh's last lie closest) have more than NODE devices
    update   = (28 + 12 x micro-batches) bytes for each trained weight of this GPU / (MEMORY share x bandwidth)

The shares are set by two published runs of Llama-2-7B on 8 H100, T 4096: MaxText's bf16 (11,361 tokens/s/GPU) and NeMo 24.09's FP8 (16,934), which the formula
gives within 5 %. It knows no kernel, no launch and no input pipeline: an estimate of what to aim at, not a measurement.
"""

import math
from typing import NamedTuple

from neva_jax.parallel.devices import Device

GEMM = {"bf16": 0.6, "fp8": 0.5, "fp32": 0.6}
ATTENTION, MEMORY, LINK = 0.4, 0.8, 0.75
NODE, BETWEEN_NODES = 8, 50e9  # GPUs of a machine; bytes a second and GPU between machines: one 400 Gb/s port each
HIDDEN = ("data", "fsdp")
SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}  # x (n - 1) / n of the payload, in rings


class Work(NamedTuple):
    """Of one GPU and one step. flops: {precision: FLOPs of GEMMs}, what is computed again included; model_flops: {precision: FLOPs} of the model alone,
    attention included in bf16; between: bytes that elementwise kernels move; weights: bytes that GEMMs read of weights; trained: weights that this GPU
    updates; collectives: [(op, axis, devices that take part, bytes)]; bubble: the share that pipeline stages wait, on top."""

    flops: dict[str, float]
    attention: float
    model_flops: dict[str, float]
    between: float
    weights: float
    trained: float
    micro_batches: int
    collectives: list[tuple[str, str, int, float]]
    bubble: float = 0.0


def between_gemms(tokens: float, layers: float, hidden: int, ffn: float, adapted: float = 0) -> float:
    """Bytes that norms, rotations, residuals and activation functions read and write, forward and backward, and adapters, whose small GEMMs are all reading
    and writing. ffn: of this GPU; adapted: widths in + out of what has an adapter."""
    return 2 * tokens * layers * (40 * hidden + 14 * ffn + 5 * adapted)


def peaks(device: Device) -> dict[str, float]:
    return {"bf16": device.bf16, "fp8": device.fp8 or device.bf16, "fp32": device.bf16 / 2}


def sent(op: str, num_devices: int, payload: float) -> float:
    """Bytes that one GPU sends."""
    return SENT[op] * payload * (num_devices - 1) / num_devices if op in SENT else payload


def link_of(device: Device, axes: set[str], mesh: dict[str, int]) -> float:
    """Bytes a second that a GPU sends along axes of a mesh {axis: size}."""
    names = list(mesh)
    span = math.prod(mesh[name] for name in names[min(map(names.index, axes)) :])
    return device.link if span <= NODE else min(device.link, BETWEEN_NODES)


def step_time(device: Device, work: Work, mesh: dict[str, int]) -> dict[str, float]:
    """Seconds: ideal, expected, and what the latter is made of. mesh: {axis: size}, neighbouring devices along the last axis."""
    peak, memory = peaks(device), MEMORY * device.bandwidth
    gemms = max(sum(flops / (GEMM[kind] * peak[kind]) for kind, flops in work.flops.items()), work.weights / memory)
    attention, between = work.attention / (ATTENTION * device.bf16), work.between / memory
    moved = {"hidden": 0.0, "exposed": 0.0}
    for op, axis, size, payload in work.collectives:
        axes = set(axis.split("+"))
        moved["hidden" if axes <= set(HIDDEN) else "exposed"] += sent(op, size, payload) / (LINK * link_of(device, axes, mesh))
    update = (28 + 12 * work.micro_batches) * work.trained / memory
    compute = gemms + attention + between
    return {
        "ideal": sum(flops / peak[kind] for kind, flops in work.model_flops.items()),
        "expected": (1 + work.bubble) * (max(compute, moved["hidden"]) + moved["exposed"]) + update,
        "gemms": gemms, "attention": attention, "between_gemms": between, "communication_hidden": moved["hidden"],
        "communication_exposed": moved["exposed"], "update": update,
    }  # fmt: skip
