"""How fast training is on one GPU, how much memory it takes, and whether what it computes is right: all in one run of under nine minutes.

    python benchmarks/gpu.py [--minutes 9] [--output benchmarks/results/gpu.json]
    python benchmarks/gpu.py --size tiny                     # the same program, tiny models, on a CPU too: proves nothing but that it runs
    python benchmarks/gpu.py --plan h200 h100-80g            # with the wheels of jax[cuda12] and no GPU: what the steps should take, results/gpu_plan.json

Sections, each in a process of its own, so that peaks of memory are its own and one that runs out of it ends nothing else:
- correctness: a tiny model on the GPU against the CPU (fp32, FP8), cuDNN's attention against XLA's, bf16 and FP8 against each other and fp32: losses and
  gradient norms of five steps and first logits, within the TOLERANCES of gpu_steps.py;
- Llama-2-7B with CLIP-L/14 at 224 pixels, weights born random, in bf16 and FP8: stage 1 at T 336, micro-batch 32; stage 2 and LoRA at T 2048, four
  micro-batches of 2. A card too small for stage 2's fp32 masters and moments trains as many layers as fit: num_layers says how many, and nothing is scaled up.

The step is train.py's own, and so are the weights' birth and FP8's check of the compiled program. Batches lie on the GPU, four in turn: full rows, tokens of a
Zipf distribution; reading data is left out. A round is five steps, and the clock stops once the last is done; one round warms up, five are timed: their median,
fastest and slowest. MFU is of the bf16 peak, in FP8 too. FP8 and bf16 have the same weights and batches, so that their losses of these 30 steps stand side by
side. memory_gib: peak is the allocator's, the birth of the weights included, start_peak that before the step, program is XLA's account of the step. planned is
what --plan said of the step before it ran.

The file is written anew with every round: a run that is killed keeps what it has measured; a section that has ended says its seconds, one that was left out for
want of time says so. The exit code is 1 where a section failed or a check did not pass. On a machine without a package index, bring what is missing there:
`pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d wheels
grain array-record portpicker ml-collections`, and there `pip install --no-index --no-deps --target site wheels/*.whl` and PYTHONPATH=site (train.py itself also
wants tensorboardX).
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib import metadata
from pathlib import Path

import numpy as np
from gpu_steps import PRECISIONS, ROOT, SIZES, STAGES, STEPS, about, correctness, describe, rounded, smi, speed

from neva_jax.build.outlook import outlook
from neva_jax.build.planned import compile_step
from neva_jax.cli import log_to_stderr
from neva_jax.parallel.deviceless import absent_devices, stay_on_cpu
from neva_jax.parallel.devices import PLANNED, planned
from neva_jax.parallel.xla_flags import filter_environment

SECTIONS = {  # {name: seconds it takes at the least on an H200}: with less left, it is not begun
    "correctness": 40, "pretrain bf16": 40, "pretrain fp8": 40, "finetune bf16": 75, "finetune fp8": 75, "peft bf16": 50, "peft fp8": 50
}  # fmt: skip
LIBRARIES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "flax", "optax", "numpy")
PLANS = ROOT / "benchmarks" / "results" / "gpu_plan.json"
NUMBERS = ("fits", "memory_gib", "step_time_s", "ideal_step_time_s", "samples_per_second_per_gpu", "model_flops_utilization", "gemms_per_layer")


# ---- what it should take -----------------------------------------------------------------------------------------------------------------------------------


def plan(names: list[str]) -> dict:
    """{card: {section: numbers}} of PLANS, these cards anew."""
    stay_on_cpu()
    found = planned_before()
    for name in names:
        devices, found[name] = absent_devices(planned(name), 1), {}
        for stage, precision in itertools.product(STAGES, PRECISIONS):
            step = describe("7b", stage, devices, planned(name), model__fp8=precision == "fp8")
            judged = outlook(planned(name), compile_step(step))
            found[name][f"{stage} {precision}"] = rounded(about(step) | {number: judged[number] for number in NUMBERS})
    keep(PLANS, found)
    return found


def planned_before() -> dict:
    return json.loads(PLANS.read_text()) if PLANS.exists() else {}


def with_plan(found: dict) -> dict:
    """What was measured, beside what PLANS has of the same step on the same card."""
    same = [one for card in planned_before().values() for one in card.values() if found.items() >= {k: one[k] for k in one if k not in NUMBERS}.items()]
    if not same:
        return found
    ratio = {"measured_to_planned": round(found["step_seconds"]["median"] / same[0]["step_time_s"], 3)} if "step_seconds" in found else {}
    return found | {"planned": {number: same[0][number] for number in NUMBERS}} | ratio


# ---- all of it -----------------------------------------------------------------------------------------------------------------------------------------


def one_section(name: str, size: str) -> int:
    """In a process of its own: a line of JSON for every state of what is found."""
    log_to_stderr()
    filter_environment()
    found = {}
    try:
        for found in correctness(size) if name == "correctness" else speed(size, *name.split()):
            print(json.dumps(rounded(found)), flush=True)
    except Exception as error:  # whatever it is, it is this section's alone
        traceback.print_exc()
        print(json.dumps(rounded(found | {"error": f"{type(error).__name__}: {error}"[:1000]})), flush=True)
        return 1
    return 0


def watch(command: list[str], seconds: float):
    """Yields what a section's process says, and in the end why it ended early if it did."""
    found, start = {}, time.monotonic()
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    found = json.loads(line)
                    yield found
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        errors.seek(0)
        said, late = errors.read(), time.monotonic() - start >= seconds
        if code:
            print(said, file=sys.stderr)
            found = {"error": f"stopped after {seconds:.0f} s: the time was up" if late else f"ended with code {code}: {said[-1000:]}"} | found
        yield found | {"seconds": round(time.monotonic() - start, 1)}


def main(size: str, minutes: float, sections: list[str], output: Path | None) -> dict:
    start = time.monotonic()
    results = hardware(size) | {"sections": {}}
    for name in sections:
        left = 60 * minutes - (time.monotonic() - start)
        command = [sys.executable, __file__, "--size", size, "--section", name]
        skipped = {"skipped": f"{max(0, left):.0f} s of {60 * minutes:.0f} were left, and it takes {SECTIONS[name]}"}
        for found in watch(command, left) if left >= SECTIONS[name] else [skipped]:
            results["sections"][name] = found = with_plan(found)
            results |= {"losses": losses(results["sections"]), "seconds": round(time.monotonic() - start, 1)}
            keep(output, results)
        print(name, json.dumps({key: value for key, value in found.items() if key != "losses"}), file=sys.stderr, flush=True)
    return results


def losses(sections: dict) -> dict:
    """FP8's against bf16's, step by step, of the same weights and batches: the largest relative difference, and that of the last round's mean."""
    found = {}
    for stage in STAGES:
        bf16, fp8 = (sections.get(f"{stage} {precision}", {}) for precision in ("bf16", "fp8"))
        if len(bf16.get("losses", ())) == len(fp8.get("losses", ())) > 0 and bf16["num_layers"] == fp8["num_layers"]:
            a, b = np.array(bf16["losses"], float), np.array(fp8["losses"], float)  # null is not a number
            last = float(abs(b[-STEPS:].mean() / a[-STEPS:].mean() - 1))
            found[stage] = rounded({"steps": len(a), "largest_difference": float(np.abs(b / a - 1).max()), "last_round": last})
    return found


def hardware(size: str) -> dict:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    card = smi("name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem")()
    return {
        "command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}".strip(), "date": datetime.date.today().isoformat(), "size": size,
        "gpu": card, "cpu": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(), "versions": found,
    }  # fmt: skip


def keep(path: Path | None, results: dict) -> None:
    """Written whole or not at all."""
    if path:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(results, indent=2) + "\n")
        new.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--minutes", type=float, default=9, help="what is not begun with enough time left is skipped, what runs is ended")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, help="default: results/gpu.json; of --size tiny none")
    parser.add_argument("--plan", nargs="+", metavar="CARD", help=f"of {', '.join(PLANNED)}: no GPU is used")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # what a section's own process is called with
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that a section does not outlive this
    if options.section:
        sys.exit(one_section(options.section, options.size))
    if options.plan:
        print(json.dumps(plan(options.plan)))
    else:
        output = options.output or (PLANS.with_name("gpu.json") if options.size != "tiny" else None)
        results = main(options.size, options.minutes, options.sections, output)
        print(json.dumps(results))
        sys.exit(any("error" in one or not one.get("passed", True) for one in results["sections"].values()))
