"""The adapters of an opened model in another program's format: a directory of Hugging Face's peft, or a .nemo as NeMo's LoRA saves it.

The projector goes along where it was trained beside them. An adapter remembers a few numbers of its base, so that it can refuse another one.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np

from neva_jax.build.export import Written, nemo_tree, num_bytes
from neva_jax.build.opened import Opened
from neva_jax.convert import nemo, peft
from neva_jax.convert.adapters import base_record
from neva_jax.convert.keymap import some
from neva_jax.convert.nemo_write import write_nemo
from neva_jax.errors import UserError
from neva_jax.fields import LORA_TARGETS
from neva_jax.hub import format_of
from neva_jax.transforms.lora import Lora, Target, adapters_of, is_adapter

log = logging.getLogger(__name__)

TOGETHER = {"attention_qkv": ("q_proj", "k_proj", "v_proj"), "mlp_fc1": ("gate_proj", "up_proj")}  # what NeMo's canonical variant adapts together


def adapter_arrays(opened: Opened, dtype: str | None, tell) -> dict[str, Written]:
    """{path: array} of adapters, and of a projector that lies where they do."""
    paths = sorted({path for pair in opened.adapters.values() for path in pair})
    if missing := [path for path in paths if path not in opened.origin]:
        raise UserError(f"{opened.path}: {len(missing)} weights of its adapters are missing ({', '.join(missing[:3])}); copy it again")
    home = {id(opened.origin[path]) for path in paths}
    if more := sorted(path for path in opened.trained if not path.startswith("projector/")):
        raise UserError(f"{opened.path}: other weights trained beside its adapters ({some(more, 2)}), which go into no adapter; add --merge_lora")
    paths += [path for path in opened.weights if path.startswith("projector/") and path in opened.origin and id(opened.origin[path]) in home]
    for source in {id(opened.origin[path]): opened.origin[path] for path in paths}.values():
        source.check({path: opened.weights[path].shape for path in paths if opened.origin[path] is source})
    return {path: Written(path, opened.origin[path].lazy(path, opened.weights[path].shape), dtype, tell) for path in paths}


def unshared(opened: Opened, arrays: dict) -> tuple[Lora, dict]:
    """The same adapters with an A for each projection, as peft has them, and NeMo's canonical variant."""
    lora = dataclasses.replace(opened.lora, targets=tuple(Target(target.pattern) for target in opened.lora.targets))
    own = {ours[0]: arrays[theirs[0]] for ours, theirs in zip(adapters_of(opened.weights, lora).values(), opened.adapters.values(), strict=True)}
    return lora, arrays | own


def record_of(opened: Opened) -> dict:
    """What the adapters are to remember of their base: where it is not here, what they remembered."""
    kernels = opened.kernels()
    return base_record(kernels, opened.float8_of) if kernels else opened.record or base_record({}, opened.float8_of)


def stands_alone(opened: Opened) -> bool:
    """Whether the adapters are of a language model by itself."""
    return not {"vision_encoder", "projector"} & {*opened.parts}


# ---- Hugging Face's peft -------------------------------------------------------------------------------------------------------------------------------


def to_peft(opened: Opened, output: Path, *, dtype: str | None = None, tell=lambda count: None) -> dict:
    lora, arrays = unshared(opened, adapter_arrays(opened, dtype, tell))
    with_projector, alone = any(path.startswith("projector/") for path in arrays), stands_alone(opened)
    keys = peft.key_map(opened.neva, lora, ["projector."] if with_projector else [])
    if with_projector and opened.neva.projector != "mlp2x_gelu":
        kind = opened.neva.projector
        raise UserError(f"mm_mlp_adapter_type {kind}: transformers' LLaVA has mlp2x_gelu alone, so that peft could not load it; convert --to nemo")
    base = base_directory(opened, alone, with_projector)
    count = peft.write_peft(output, keys, {path: arrays[path] for path in keys.rules}, lora, base=base, record=record_of(opened), alone=alone)
    if base is None:
        log.info(f"note: {peft.CONFIG} names no base; peft takes it from the model that the adapter is put on (convert the base by itself --to hf)")
    return {"num_tensors": count, "num_bytes": num_bytes(arrays)}


def base_directory(opened: Opened, alone: bool, with_projector: bool) -> str | None:
    """The Hugging Face directory that is the whole model without what the adapter brings, if there is one."""
    frozen = [path for path in opened.origin if not is_adapter(path) and not (with_projector and path.startswith("projector/"))]
    homes = {getattr(opened.origin[path], "path", None) for path in frozen}
    place = homes.pop() if len(homes) == 1 else None
    is_whole = place is not None and format_of(place) == "hf" and (alone or "vision_encoder" in opened.parts)
    return str(place.absolute()) if is_whole else None


# ---- NeMo ----------------------------------------------------------------------------------------------------------------------------------------------


def to_nemo(
    opened: Opened, output: Path, *, tensor_parallel: int = 1, pipeline_parallel: int = 1, key_format: str = "mcore", dtype: str | None = None,
    tell=lambda count: None,
) -> dict:  # fmt: skip
    arrays = adapter_arrays(opened, dtype, tell)
    lora, arrays, tuning = as_nemo_has_them(opened, arrays)
    keys = nemo.adapter_map(opened.neva, lora, with_projector=any(path.startswith("projector/") for path in arrays))
    outline = keys.outline(arrays)
    if lora.rank % tensor_parallel:
        raise UserError(f"--tensor_parallel {tensor_parallel} does not divide the rank {lora.rank}, which NeMo's tensor ranks share; choose a divisor")
    if key_format == "legacy" and tuning["variant"] == "canonical":
        raise UserError("--key_format legacy has no adapters of q, k and v, or gate and up, by themselves: NeMo adapts the fused weights there; write mcore")
    tree, artifacts = nemo_tree(opened, ("llm",) if stands_alone(opened) else ("projector",), outline, tensor_parallel)
    tree["peft"]["lora_tuning"] |= tuning
    tree["neva_jax"]["base"] = record_of(opened)
    write_nemo(
        output, keys.parts(arrays), outline, tree, artifacts, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, key_format=key_format,
    )  # fmt: skip
    return {"num_tensors": len(outline), "num_bytes": num_bytes(arrays)}


def as_nemo_has_them(opened: Opened, arrays: dict) -> tuple[Lora, dict, dict]:
    """-> adapters that NeMo's names can tell, their arrays, and fields of `lora_tuning`. It adapts q, k and v, and gate and up, together, all with one A
    ("nemo") or each with its own ("canonical"): what lacks partners gets some that are zeros, which change nothing."""
    lora, pairs = opened.lora, {path.split("/")[-2]: pair for path, pair in opened.adapters.items()}
    gated = any(path.endswith("/gate_proj/kernel") for path in opened.weights)
    targets = [target for target, names in LORA_TARGETS.items() if not target.endswith("_proj") and {f"{name}_proj" for name in names} & pairs.keys()]
    together = [names for target, names in TOGETHER.items() if target in targets and (gated or target != "mlp_fc1")]
    fused = all({*names} <= pairs.keys() and len({pairs[name][0] for name in names}) == 1 for names in together)
    if not fused:
        lora, arrays = unshared(opened, arrays)
        wanted = [f"{name}_proj" for target in targets for name in LORA_TARGETS[target] if gated or name != "gate"]
        lora = dataclasses.replace(lora, targets=tuple(Target(rf"^llm/layers/\w+/{name}$") for name in wanted))
        for kernel, (lora_A, lora_B) in adapters_of(opened.weights, lora).items():
            (*stack, rows, columns), dtype = opened.weights[kernel].shape, next(iter(arrays.values())).dtype
            arrays.setdefault(lora_A, np.zeros((*stack, rows, lora.rank), dtype))
            arrays.setdefault(lora_B, np.zeros((*stack, lora.rank, columns), dtype))
    used = {path for pair in adapters_of(opened.weights, lora).values() for path in pair} | {path for path in arrays if path.startswith("projector/")}
    return lora, {path: arrays[path] for path in sorted(used)}, {"target_modules": targets, "variant": "nemo" if fused else "canonical"}
