"""What the tests of compiled graphs compile: Llama-2-7B's width with two layers, three stages, both precisions, six meshes; and whole models, for their memory.

memory.json is the committed table of what each takes: python tests/gpu_graph/rows.py writes it anew (with the repository on PYTHONPATH).
"""

import functools
import json
import os
from pathlib import Path

import pytest

from neva_jax import cli
from neva_jax.build.planned import Compiled, compile_step, describe_step
from neva_jax.data.plan import Bucket
from neva_jax.parallel.deviceless import NoCudaWheels, absent_devices, stay_on_cpu
from neva_jax.parallel.devices import planned

LAYERS, MICRO_BATCH, MICRO_BATCHES, TOKENS, VOCABULARY = 2, 8, 2, 768, 32008  # 768 is no width of the model, nor a part of one
MESHES = {
    "1 GPU": {},
    "DP 8": {"trainer.devices": 8},
    "FSDP 8": {"trainer.devices": 8, "model.fsdp_parallel_size": 8},
    "TP 2": {"trainer.devices": 2, "model.tensor_model_parallel_size": 2},
    "FSDP 4 x TP 2": {"trainer.devices": 8, "model.fsdp_parallel_size": 4, "model.tensor_model_parallel_size": 2},
    "PP 2": {"trainer.devices": 2, "model.pipeline_model_parallel_size": 2},
}
STAGES = {  # {name: (config, changes)}
    "pretrain": ("configs/pretrain.py", {}),
    "finetune": ("configs/finetune.py", {}),
    "peft": ("configs/peft.py", {}),
}
PRECISIONS = ("bf16", "fp8")
SHARDS = {"DP 8": 8, "FSDP 8": 8, "FSDP 4 x TP 2": 4}  # that the rows of a batch are split into
ROWS = [(stage, precision, mesh) for stage in STAGES for precision in PRECISIONS for mesh in MESHES]
SMALL = {"model.num_layers": LAYERS, "model.mm_cfg.vision_encoder.num_layers": 3, "model.micro_batch_size": MICRO_BATCH}

FULL = {"model.activations_checkpoint_granularity": "full", "model.activations_checkpoint_method": "uniform"}
ONE_CARD = {"model.micro_batch_size": 1} | FULL
BLOCK = {"model.activations_checkpoint_granularity": "full", "model.activations_checkpoint_method": "block", "model.activations_checkpoint_num_layers": 11}
FP8 = {"model.fp8": True}
FSDP_8 = MESHES["FSDP 8"] | {"model.micro_batch_size": 4, "model.global_batch_size": 128}
TP_2 = MESHES["TP 2"] | {"model.micro_batch_size": 4, "model.global_batch_size": 32}  # as NeVA's own table, which ran out of 80 GB at 32 layers
ONCE, BF16_SUMS = {"model.global_batch_size": 4}, {"model.optim.grad_accum_dtype": "bf16"}
LLAVAS = {"model.peft.lora_tuning.adapter_dim": 128, "model.peft.lora_tuning.target_modules": "all", "model.peft.lora_tuning.variant": "canonical"}
PRETRAIN = {"model.micro_batch_size": 32, "model.global_batch_size": 256}
WHOLE = {  # name: (config, T, K, changes, device, GiB that it must stay below)
    "7B pretrain, micro-batch 32, T 320": ("configs/pretrain.py", 320, 64, PRETRAIN, "h100-80g", 42),
    "7B pretrain, micro-batch 32, T 320, 11 layers recomputed": ("configs/pretrain.py", 320, 64, PRETRAIN | BLOCK, "h100-80g", 34),
    "7B pretrain, micro-batch 32, T 320, FP8": ("configs/pretrain.py", 320, 64, PRETRAIN | FP8, "h100-80g", 35.5),
    "7B pretrain, micro-batch 32, T 320, FP8, 11 layers recomputed": ("configs/pretrain.py", 320, 64, PRETRAIN | FP8 | BLOCK, "h100-80g", 28),
    "13B pretrain, micro-batch 4, T 320, FP8, RTX 4090": (
        "configs/pretrain.py:llama2_13b", 320, 64, FP8 | {"model.micro_batch_size": 4}, "rtx4090", 0.93 * 23.6,
    ),
    "7B finetune, TP 2, T 2048, recomputed, bf16 sums": ("configs/finetune.py", 2048, 2048, TP_2 | FULL | BF16_SUMS, "h100-80g", 62),
    "7B finetune, TP 2, T 2048, recomputed, one micro-batch": ("configs/finetune.py", 2048, 2048, TP_2 | FULL | ONCE, "h100-80g", 55),
    "7B finetune, TP 2, T 4096, recomputed": ("configs/finetune.py", 4096, 4096, TP_2 | FULL, "h100-80g", 72),
    "7B finetune, FSDP 8, T 2048, accumulation of 4, recomputed": ("configs/finetune.py", 2048, 2048, FSDP_8 | FULL, "h100-80g", 26),
    "7B LoRA, micro-batch 1, T 2048, FP8, recomputed, RTX 4090": ("configs/peft.py", 2048, 2048, ONE_CARD | {"model.fp8": True}, "rtx4090", 9),
    "7B LoRA, micro-batch 1, T 2048, recomputed, RTX 4090": ("configs/peft.py", 2048, 2048, ONE_CARD, "rtx4090", 0.93 * 23.6),
    "7B LoRA at all projections, rank 128, micro-batch 4, T 2048": ("configs/peft.py", 2048, 2048, LLAVAS, "h100-80g", 0.93 * 79.1),
    "13B LoRA, micro-batch 1, T 2048, FP8, recomputed, RTX 4090": (
        "configs/peft.py:llama2_13b", 2048, 2048, ONE_CARD | {"model.fp8": True}, "rtx4090", 0.93 * 23.6,
    ),
    "13B LoRA, micro-batch 4, T 2048, recomputed": ("configs/peft.py:llama2_13b", 2048, 2048, FULL, "h100-80g", 32),
} | {
    f"{layers} layers finetune, TP 2, T {tokens}{how}": ("configs/finetune.py", tokens, tokens, TP_2 | changes | {"model.num_layers": layers}, "h100-80g", 68)
    for layers in (16, 20, 24, 30, 32) for tokens in (1024, 2048) for how, changes in {"": {}, ", recomputed": FULL}.items()
}  # fmt: skip
TABLE = Path(__file__).with_name("memory.json")


@functools.cache
def compiled(stage: str, precision: str, mesh: str) -> Compiled:
    size = MICRO_BATCH * MICRO_BATCHES * SHARDS.get(mesh, 1)
    rounds = {"model.pipeline_round_size": MICRO_BATCHES} if mesh == "PP 2" else {}
    config, own = STAGES[stage]
    changes = SMALL | MESHES[mesh] | rounds | own | {"model.global_batch_size": size, "model.fp8": precision == "fp8"}
    return compile_config(config, Bucket(TOKENS, TOKENS, 1), changes)


def compile_config(path: str, bucket: Bucket, changes: dict, device: str = "h100-80g") -> Compiled:
    """The step of a config with changes {dotted path: value}, compiled for GPUs that are not there."""
    stay_on_cpu()
    config = cli.parse(["plan", "--config", path, *(f"--config.{name}={value}" for name, value in changes.items())])["config"]
    devices = absent_devices(planned(device), config.trainer.devices * config.trainer.num_nodes)
    return compile_step(describe_step(config, devices, VOCABULARY, bucket))


@functools.cache
def whole(name: str) -> Compiled:
    path, tokens, supervised, changes, device, _ = WHOLE[name]
    return compile_config(path, Bucket(tokens, supervised, 1), changes, device)


def gib(one: Compiled) -> float:
    return round(one.total / 2**30, 2)


def need_wheels() -> None:
    """Skips where nothing can be compiled for a GPU, but fails where that must not be, in the project's gate."""
    try:
        absent_devices(planned("h100-80g"), 1)
    except NoCudaWheels as missing:
        if os.environ.get("NEVA_REQUIRE_CUDA_WHEELS"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


if __name__ == "__main__":
    table = {", ".join(row): gib(compiled(*row)) for row in ROWS} | {name: gib(whole(name)) for name in WHOLE}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
