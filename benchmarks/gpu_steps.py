"""What benchmarks/gpu.py measures, and how: the step of a stage, its weights and batches; whether it is right, and how fast it is."""

import contextlib
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")  # as launch/ has it; JAX takes 0.75 by itself

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import finetune, peft, pretrain  # noqa: E402
from neva_jax import config as library  # noqa: E402
from neva_jax.build import model as build_model  # noqa: E402
from neva_jax.build import run as build_run  # noqa: E402
from neva_jax.build.estimated import Estimated  # noqa: E402
from neva_jax.build.fp8 import CheckedStep  # noqa: E402
from neva_jax.build.planned import Step, describe_step  # noqa: E402
from neva_jax.build.weights import start_weights  # noqa: E402
from neva_jax.data.example import Example  # noqa: E402
from neva_jax.data.pipeline import pad_examples  # noqa: E402
from neva_jax.data.plan import Bucket  # noqa: E402
from neva_jax.data.tokenize import IGNORE  # noqa: E402
from neva_jax.errors import UserError  # noqa: E402
from neva_jax.parallel.devices import PLANNED, Device, peak_flops  # noqa: E402
from neva_jax.parallel.sharding import batch_sharding  # noqa: E402
from neva_jax.transforms.select import nest  # noqa: E402

GIB = 2**30
STEPS, ROUNDS, BATCHES = 5, 5, 4  # steps of a round, rounds that are timed, different batches
STAGES, PRECISIONS = {"pretrain": pretrain, "finetune": finetune, "peft": peft}, ("bf16", "fp8")


class Shape(NamedTuple):
    """What a stage runs at. K is what follows the picture, in chunks of 64."""

    bucket: Bucket
    micro_batch_size: int
    global_batch_size: int


TINY = {  # weights large enough that attention counts
    "model.hidden_size": 256, "model.ffn_hidden_size": 512, "model.init_method_std": 0.05, "model.mm_cfg.vision_encoder.hidden_size": 128,
    "model.mm_cfg.vision_encoder.ffn_hidden_size": 256, "model.mm_cfg.vision_encoder.num_layers": 2,
    "model.mm_cfg.vision_encoder.num_attention_heads": 2, "model.mm_cfg.vision_encoder.crop_size": (56, 56),
}  # fmt: skip
SIZES = {  # {size: (language model, vocabulary, changes, {stage: Shape})}; 32,008 is Llama 2's with NeVA's eight tokens
    "7b": (
        "llama2_7b", 32008, {},
        {"pretrain": Shape(Bucket(336, 128, 1), 32, 32), "finetune": Shape(Bucket(2048, 1792, 1), 2, 8), "peft": Shape(Bucket(2048, 1792, 1), 2, 8)},
    ),
    "tiny": (
        "tiny", 512, TINY, {"pretrain": Shape(Bucket(64, 64, 1), 4, 4), "finetune": Shape(Bucket(64, 64, 1), 2, 4), "peft": Shape(Bucket(64, 64, 1), 2, 4)},
    ),
}  # fmt: skip
# {(one, the other): tolerances}. Of losses and gradient norms relative, of logits to the largest logit. "cpu": on the CPU backend.
TOLERANCES = {
    ("fp32", "fp32 cpu"): {"loss": 1e-4, "grad_norm": 1e-3, "logits": 1e-4},
    ("bf16", "fp32"): {"loss": 5e-3, "grad_norm": 2e-2, "logits": 3e-2},
    ("bf16", "bf16 xla"): {"loss": 5e-3, "grad_norm": 2e-2, "logits": 3e-2},  # cuDNN's attention against XLA's
    ("fp8", "fp8 cpu"): {"loss": 5e-3, "grad_norm": 5e-2, "logits": 1e-1},  # a sum's last bit may round to another float8, a sixteenth away
    ("fp8", "bf16"): {"loss": 2e-2, "grad_norm": 1e-1, "logits": 2e-1},
}
RUNS = {  # {name: changes}
    "fp32": {"trainer__precision": "32"}, "bf16": {}, "bf16 xla": {"model__use_flash_attention": False}, "fp8": {"model__fp8": True},
}  # fmt: skip


# ---- a step, its weights, its batches ------------------------------------------------------------------------------------------------------------------


def configure(size: str, stage: str, **changes):
    """A checked config; changes with __ for the dots."""
    name, _, own, shapes = SIZES[size]
    shape, config = shapes[stage], STAGES[stage].get_config(name)
    own = own | {"model.micro_batch_size": shape.micro_batch_size, "model.global_batch_size": shape.global_batch_size}
    own |= {"model.mm_cfg.allow_random_frozen": True} | {path.replace("__", "."): value for path, value in changes.items()}
    for path, value in own.items():
        library.assign(config, path, value)
    config.lock()
    library.check(config)
    return config


def describe(size: str, stage: str, devices: list, card: Device | None = None, **changes) -> Step:
    """The step, of as many layers (by fours) as fit onto the card by the planner's estimate, which is on the large side. card None: of all."""
    _, vocabulary, _, shapes = SIZES[size]
    for layers in range(configure(size, stage).model.num_layers, 0, -4):
        step = describe_step(configure(size, stage, model__num_layers=layers, **changes), devices, vocabulary, shapes[stage].bucket)
        if card is None or Estimated(step).memory["total"] <= card.usable:
            return step
    raise UserError(f"{stage} of {layers} layers does not fit onto {card.kind}; take a card with more memory")


def born(step: Step, weights: dict[str, np.ndarray] | None = None) -> tuple[dict, dict]:
    """-> state, frozen: as train.py makes them, random or of these weights."""
    model = step.model
    if weights is None:
        params, frozen, _ = start_weights(step.config, model)
    else:
        targets = {path: model.loaded(path) for path in model.weights}
        arrays = {path: jax.device_put(weights[path].astype(target.dtype), target.sharding) for path, target in targets.items()}
        params, frozen = {path: arrays[path] for path in model.rows}, {path: arrays[path] for path in arrays if path not in model.rows}
    optimizer, _ = build_run.build_optimizer(step.config, model)
    first = jax.jit(build_run.first_state(model, optimizer), donate_argnums=0, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, step.state))
    return first(params), model.stored(frozen)


def batch(step: Step, seed: int, *, ragged: bool = False) -> dict:
    """Rows of one picture and text that is all learnt. ragged: of different lengths, padded."""
    generator, model, image = np.random.default_rng(seed), step.model.config, step.model.config.vision.image_size
    text = 1 + model.media_length  # where it starts

    def row() -> Example:
        size = step.bucket.tokens - (int(generator.integers((step.bucket.tokens - text) // 2)) if ragged else 0)
        tokens = np.minimum(generator.zipf(1.3, size), model.llm.vocab_size - 1).astype(np.int32)
        index = np.concatenate([[-1], np.arange(model.media_length), np.full(size - text, -1)]).astype(np.int32)
        labels = np.where(np.arange(size) < text - 1, IGNORE, np.append(tokens[1:], IGNORE)).astype(np.int32)
        return Example(tokens, labels, index, generator.integers(0, 256, (1, image, image, 3), dtype=np.uint8))

    shape = step.batch["tokens"].shape[:2]
    fields = pad_examples([row() for _ in range(shape[0] * shape[1])], step.bucket, np.zeros((0, image, image, 3), np.uint8))
    return jax.device_put({name: array.reshape(*shape, *array.shape[1:]) for name, array in fields.items()}, batch_sharding(step.mesh))


def program(step: Step, *args):
    """The step compiled, and checked as training checks it."""
    compiled = step.jitted.lower(*args).compile()
    if isinstance(step.jitted, CheckedStep):
        step.jitted.check(compiled.as_text())
    return compiled


def scalars(step: Step, lr: float) -> tuple:
    return np.float32(lr), np.zeros(step.mesh.size, np.int32)  # no signal asks for an end


# ---- is it right? ----------------------------------------------------------------------------------------------------------------------------------------


def correctness(size: str):
    """Yields what it has found so far. The models are tiny at either size."""
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    runs = {name: (here, changes) for name, changes in RUNS.items()}
    if here != cpu:
        runs |= {f"{name} cpu": (cpu, RUNS[name]) for name in ("fp32", "fp8")}
    answers, weights, found = {}, None, {"device_kind": here.device_kind, "cudnn_attention": False, "checks": {}}
    for name, (device, changes) in runs.items():
        step = describe("tiny", "finetune", [device], **changes)
        with jax.set_mesh(step.mesh), jax.default_matmul_precision("highest") if name.startswith("fp32") else contextlib.nullcontext():
            answers[name], weights, text = answer(step, weights)
        found["cudnn_attention"] |= "__cudnn$fmha" in text
        ready = [pair for pair in TOLERANCES if name in pair and answers.keys() >= set(pair)]
        found["checks"] |= {f"{one} - {other}": compare(answers[one], answers[other], TOLERANCES[one, other]) for one, other in ready}
        yield found
    yield {"passed": all(one["passed"] for one in found["checks"].values()) and found["cudnn_attention"] == (here != cpu)} | found


def answer(step: Step, weights) -> tuple[dict[str, np.ndarray], dict, str]:
    """-> {losses and gradient norms of five steps, the first logits}, the weights it started from, the program."""
    state, frozen = born(step, weights)
    weights = weights or {path: np.asarray(array) for path, array in (state["params"] | frozen).items()}
    batches = [batch(step, seed, ragged=True) for seed in range(2)]

    def logits(params, frozen, micro):
        model = nnx.merge(step.model.graphdef, nest(params | frozen))
        return model.llm.logits(model(micro))[..., : step.model.config.llm.vocab_size]

    micro = {name: field[0] for name, field in batches[0].items()}
    options = build_run.compiler_options(step.config, step.mesh)
    first = np.asarray(jax.jit(logits, compiler_options=options)(state["params"] | state["scales"], frozen, micro))[np.asarray(micro["segment_ids"]) != 0]
    compiled, found = program(step, state, frozen, batches[0], *scalars(step, 1e-3)), []
    for i in range(STEPS):
        state, metrics = compiled(state, frozen, batches[i % 2], *scalars(step, 1e-3))
        found.append((float(metrics["reduced_train_loss"]), float(metrics["grad_norm"])))
    losses, norms = np.array(found).T
    return {"loss": losses, "grad_norm": norms, "logits": first}, weights, compiled.as_text()


def compare(ours: dict, theirs: dict, tolerances: dict) -> dict:
    scales = {name: np.abs(theirs[name]).max() if name == "logits" else np.abs(theirs[name]) for name in tolerances}
    found = {name: float((np.abs(ours[name] - theirs[name]) / scales[name]).max()) for name in tolerances}
    return {"passed": all(found[name] <= tolerances[name] for name in tolerances), **found, "tolerances": tolerances}


# ---- how fast is it? -------------------------------------------------------------------------------------------------------------------------------------


def speed(size: str, stage: str, precision: str):
    """Yields what it has found so far."""
    device = jax.devices()[0]
    if size != "tiny" and device.platform == "cpu":
        raise UserError(f"JAX sees a CPU here, and --size {size} is for a GPU; take --size tiny, or --plan a card")
    step = describe(size, stage, [device], next((card for card in PLANNED.values() if card.kind == device.device_kind), None), model__fp8=precision == "fp8")
    with jax.set_mesh(step.mesh):
        began = time.perf_counter()
        state, frozen = jax.block_until_ready(born(step))
        found = about(step) | {"start_seconds": time.perf_counter() - began, "memory_gib": {"start_peak": peak_gib(device)}}
        yield found
        batches, extra = [batch(step, seed) for seed in range(BATCHES)], scalars(step, step.config.model.optim.lr)
        began = time.perf_counter()
        compiled = program(step, state, frozen, batches[0], *extra)
        found |= {"compile_seconds": time.perf_counter() - began, "lr": step.config.model.optim.lr}
        memory = compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes
        found["memory_gib"]["program"] = total / GIB
        yield found
        seconds, losses = [], []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            for _ in range(STEPS):
                state, metrics = compiled(state, frozen, batches[len(losses) % BATCHES], *extra)
                losses.append(metrics["reduced_train_loss"])
            busy = smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")  # asked while the GPU works
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - began) / STEPS)
            found["memory_gib"]["peak"] = peak_gib(device)
            found |= {"losses": [float(loss) for loss in losses], "skipped_in_a_row": int(metrics["skipped_in_a_row"]), "nvidia_smi": busy()}
            yield found | (rates(step, seconds[1:]) if len(seconds) > 1 else {})


def about(step: Step) -> dict:
    """What was measured, or planned."""
    model = step.config.model
    names = ("num_layers", "micro_batch_size", "global_batch_size", "fp8")
    sizes = {name: model[name] for name in names} | {"peft_scheme": model.peft.peft_scheme, "batch_shape": step.bucket._asdict()}
    return {"device_kind": step.mesh.devices.flat[0].device_kind, **sizes}


def rates(step: Step, seconds: list[float]) -> dict:
    """seconds: of a step, of each round."""
    median, size = statistics.median(seconds), step.config.model.global_batch_size
    found = {"rounds": len(seconds), "step_seconds": {"median": median, "fastest": min(seconds), "slowest": max(seconds)}}
    found |= {"samples_per_second": size / median, "tokens_per_second": size * step.bucket.tokens / median}
    peak = peak_flops(step.mesh.devices.flat[0].device_kind)
    return found | {"mfu": build_model.batch_flops(step.model, step.batch) / median / peak if peak else None}


def peak_gib(device) -> float | None:
    stats = device.memory_stats()
    return stats["peak_bytes_in_use"] / GIB if stats else None


# ---- numbers ------------------------------------------------------------------------------------------------------------------------------------------


def smi(fields: str):
    """Asks nvidia-smi of the first GPU, -> function that waits for the answer, {field: value}, None where there is none."""
    try:
        asked = subprocess.Popen(["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return lambda: None
    return lambda: dict(zip(fields.split(","), asked.communicate()[0].strip().split(", "), strict=False)) or None


def rounded(value):
    """Five digits; what is not finite is null."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return (float(f"{value:.5g}") if math.isfinite(value) else None) if isinstance(value, float) else value
