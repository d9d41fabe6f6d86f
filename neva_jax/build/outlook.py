"""What a planned step means: memory against the card, time by formula, samples a second, days; and what to change where it does not fit.

All numbers of one GPU, and of the largest batch shape where memory is meant. See training/step_time.py for what a time is worth.
"""

import contextlib
import logging
from collections.abc import Iterator

from ml_collections import ConfigDict

from neva_jax.build.estimated import Estimated
from neva_jax.build.model import flops_by_kind
from neva_jax.build.planned import Compiled, Step, local_bytes
from neva_jax.config import assign, check, from_json, to_json
from neva_jax.errors import UserError
from neva_jax.mesh_sizes import divisors
from neva_jax.parallel.devices import PLANNED, Device
from neva_jax.parallel.mesh import batch_shards
from neva_jax.training.optimizer import ADAMW, SHARDED_OVER_DATA
from neva_jax.training.step_time import NODE, Work, between_gemms, step_time
from neva_jax.transforms.lora import adapters_of

GIB = 2**30
SECONDS = 86400  # of a day


def outlook(device: Device, result: Compiled | Estimated) -> dict:
    """{key: value} as `--json` prints it."""
    step, memory, gemms = result.step, result.memory, result.gemms_per_layer
    flops = sample_flops(step)
    times = step_time(device, work_of(step, flops, gemms, result.collectives), dict(step.mesh.shape))
    model = step.config.model
    return {
        "fits": memory["total"] <= device.usable,
        "memory_gib": {kind: round(size / GIB, 2) for kind, size in memory.items()} | {"device": round(device.memory / GIB, 1)},
        "usable_gib": round(device.usable / GIB, 1),
        "flops_per_sample": sum(flops.values()),
        "flops_per_step": sum(flops.values()) * model.global_batch_size,
        "gemms_per_layer": gemms,
        "gemms_per_layer_needed": step.needed_gemms,
        "adapter_gemms_per_layer": result.adapter_gemms_per_layer,
        "collectives": result.collectives,
        "has_logits_tensor": result.has_logits_tensor,
        "step_time_s": times["expected"],
        "ideal_step_time_s": times["ideal"],
        "step_time_bubble": step.bubble,
        "step_time_parts_s": {name: seconds for name, seconds in times.items() if name not in ("ideal", "expected")},
        "samples_per_second_per_gpu": model.global_batch_size / times["expected"] / step.mesh.size,
        "model_flops_utilization": sum(flops.values()) * model.global_batch_size / step.mesh.size / times["expected"] / device.bf16,
        "compiled": isinstance(result, Compiled),
        "compile_seconds": round(result.seconds, 1),
        "mesh": dict(step.mesh.shape),
        "micro_batch_size": model.micro_batch_size,
        "global_batch_size": model.global_batch_size,
        "micro_batches": step.micro_batches,
        "batch_shape": step.bucket._asdict(),
    }


def sample_flops(step: Step) -> dict[str, float]:
    """Model FLOPs of one row of the planned shape, by kind."""
    bucket = step.bucket
    shape = {"tokens": bucket.tokens, "supervised": bucket.supervised, "media": bucket.media}
    return flops_by_kind(step.model, **shape)


def work_of(step: Step, flops: dict[str, float], gemms: dict[str, float], collectives: list[dict]) -> Work:
    """One GPU's share of a step. GEMMs of the layers take their precisions from the compiled counts, all others are in the compute dtype."""
    llm, shape = step.model.config.llm, step.mesh.shape
    share = step.config.model.global_batch_size / step.mesh.size
    other = "fp32" if llm.dtype == "float32" else "bf16"
    outside = share * (flops["head"] + flops["encoder"] + flops["adapters"])
    counted = sum(gemms.values()) or step.needed_gemms
    layers = {kind: share * flops["layers"] * count for kind, count in gemms.items()}
    hardware = {kind: amount / step.needed_gemms for kind, amount in layers.items()}
    model = {kind: amount / counted for kind, amount in layers.items()}
    for total, extra in ((hardware, outside), (model, outside + share * flops["attention"])):
        total[other] = total.get(other, 0.0) + extra
    tokens = step.config.model.global_batch_size / batch_shards(step.mesh) * step.bucket.tokens
    weights = (local_bytes(step.frozen) + local_bytes(step.state["params"]) / 2) * shape["fsdp"]  # gathered, then read
    return Work(
        flops=hardware, attention=share * flops["attention"], model_flops=model,
        between=between_gemms(
            tokens, llm.num_layers / shape["pipeline"], llm.hidden_size, llm.ffn_hidden_size / shape["tensor"], adapted_width(step) / shape["tensor"]
        ),
        weights=weights * step.micro_batches * counted / 7, trained=local_bytes(step.state["params"]) / 4, micro_batches=step.micro_batches,
        collectives=[(row["op"], row["axis"], row["num_devices"], row["bytes"]) for row in collectives], bubble=step.bubble,
    )  # fmt: skip


def adapted_width(step: Step) -> int:
    """Widths that adapters read and write of a layer's activations: in + out, summed over the projections that have one."""
    weights = step.model.weights
    return sum(sum(weights[kernel].shape[-2:]) for kernel in adapters_of(weights, step.model.lora))


# ---- changes -----------------------------------------------------------------------------------------------------------------------------------------


def replaced(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    """A checked copy with changes. Raises UserErrors as the command line would."""
    copy = from_json(to_json(config))
    for path, value in changes.items():
        assign(copy, path, value)
    check(copy)
    return copy


def changed(config: ConfigDict, changes: dict[str, object]) -> ConfigDict | None:
    """The same, None where they cannot be made."""
    try:
        return replaced(config, changes)
    except UserError:
        return None


def check_device(config: ConfigDict, name: str, device: Device) -> None:
    if config.model.fp8 and device.fp8 is None:
        able = ", ".join(other for other, one in PLANNED.items() if one.fp8)
        raise UserError(f"model.fp8 is True, and --device {name} has no FP8; set model.fp8 to False, or plan for one of {able}")


@contextlib.contextmanager
def quiet():
    """What was said once of a config is not said again of its variations."""
    logger = logging.getLogger("neva_jax")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def families(config: ConfigDict, device: Device, num_devices: int) -> list[list[dict[str, object]]]:
    """Kinds of changes that save memory, those that cost least time first; within a kind from the smallest change to the largest."""
    m, found = config.model, []
    tensor, stages, fsdp, micro = m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.fsdp_parallel_size, m.micro_batch_size
    shards = num_devices // (tensor * stages)
    if m.optim.name in ADAMW and m.optim.name not in SHARDED_OVER_DATA and shards // fsdp > 1:
        found.append([{"model.optim.name": "distributed_fused_adam"}])
    found.append([{"model.fsdp_parallel_size": size} for size in divisors(shards) if size > fsdp])
    if m.optim.grad_accum_dtype == "fp32" and m.global_batch_size > micro * shards:
        found.append([{"model.optim.grad_accum_dtype": "bf16"}])
    if not m.fp8 and device.fp8:
        found.append([{"model.fp8": True}])
    full = {"model.activations_checkpoint_granularity": "full", "model.activations_checkpoint_method": "uniform"}
    if m.activations_checkpoint_granularity != "full":
        found.append([full | {"model.activations_checkpoint_num_layers": 1}])
    found.append([{"model.micro_batch_size": size} for size in reversed(divisors(micro)) if size < micro])
    found.append([{"model.tensor_model_parallel_size": size} for size in divisors(num_devices // stages) if size > tensor])
    if not m.mm_cfg.llm.freeze and m.peft.peft_scheme is None:
        found.append([{"model.peft.peft_scheme": "lora", "model.mm_cfg.llm.freeze": True}])
    return [family for family in found if family]


def together(kinds: list[list[dict[str, object]]]) -> Iterator[dict[str, object]]:
    """Changes of several kinds at once, for where none is enough alone: the largest of each that changes neither the numbers nor the method, one kind more at a
    time, then smaller micro-batches."""
    alters = {"model.fp8", "model.peft.peft_scheme", "model.tensor_model_parallel_size", "model.micro_batch_size"}
    sharded = {}
    for family in kinds:
        if not alters & family[-1].keys():
            sharded |= family[-1]
            yield dict(sharded)
    for change in next((family for family in kinds if "model.micro_batch_size" in family[0]), []):
        yield sharded | change


def meshes(config: ConfigDict, num_devices: int) -> list[dict[str, object]]:
    """Changes that give every mesh of so many devices worth comparing: tensor parallel sizes up to a machine, each with data and with fsdp."""
    stages = config.model.pipeline_model_parallel_size
    found = []
    for tensor in (size for size in divisors(num_devices // stages) if size <= NODE):
        shards = num_devices // (tensor * stages)
        for fsdp in sorted({1, shards}):
            found.append({"model.tensor_model_parallel_size": tensor, "model.fsdp_parallel_size": fsdp})
    return found


def days(seconds: float, steps: float) -> float:
    """Of so many steps."""
    return seconds * steps / SECONDS
