"""Plan a run without a GPU: python -m neva_jax.plan --config configs/finetune.py --device h100-80g --num_devices 8 [--json] [--sweep --output sweep.png]

Builds the very step that train.py would run, from its config alone (no weights, no data), compiles it for GPUs that are not there, and says what it takes:
memory by kind and whether it fits, GEMMs by precision, collectives, time by formula. If it does not fit, the nearest changes that do, each compiled as proof.
--sweep compiles every mesh and micro-batch of these devices instead, in one table and one picture.

Batches have T = the largest of model.data.buckets, else model.encoder_seq_length; with data whose lengths are indexed (python -m neva_jax.inspect_data
--lengths), its own. Compiling needs the wheels of jax[cuda12], not a GPU; without them all is estimated and marked so. Nothing here is timed.
"""

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path

from absl import flags
from PIL import Image
from tqdm import tqdm

from neva_jax import cli
from neva_jax.build.estimated import Estimated
from neva_jax.build.outlook import changed, check_device, days, families, meshes, outlook, quiet, replaced, together
from neva_jax.build.planned import compile_step, describe_step
from neva_jax.build.shapes import Facts, gather
from neva_jax.errors import UserError
from neva_jax.evaluation.plan_report import print_plan, print_sweep
from neva_jax.evaluation.plan_sheet import sweep_sheet
from neva_jax.mesh_sizes import divisors
from neva_jax.parallel.deviceless import NoCudaWheels, absent_devices, cpu_devices, stay_on_cpu
from neva_jax.parallel.devices import PLANNED, Device, planned
from neva_jax.training.step_time import NODE

log = logging.getLogger(__name__)

PATIENCE = 55  # seconds that a plan may take: a change that would not be compiled by then is not tried


@dataclasses.dataclass(frozen=True)
class Planner:
    """Judges configs. devices: what the step is compiled for, or CPUs where nothing can be (compiles False)."""

    device: Device
    facts: Facts
    devices: list
    compiles: bool

    def estimate(self, config) -> Estimated:
        return Estimated(describe_step(config, self.devices, self.facts.vocab_size, self.facts.bucket))

    def judge(self, config, estimate: Estimated | None = None) -> dict:
        """What `--json` prints of a config. Memory is that of the largest batch shape; times and FLOPs are means over the data's, where they are known."""
        estimate = estimate or self.estimate(config)
        found = outlook(self.device, compile_step(estimate.step) if self.compiles else estimate)
        share = self.facts.mean_share(estimate.step)
        for name in ("flops_per_sample", "flops_per_step", "step_time_s", "ideal_step_time_s"):
            found[name] *= share
        found["samples_per_second_per_gpu"] /= share
        records = self.facts.num_records
        found["days_for_max_steps"] = days(found["step_time_s"], config.trainer.max_steps) if config.trainer.max_steps > 0 else None
        found["days_for_dataset"] = days(found["step_time_s"], records / config.model.global_batch_size) if records else None
        return found

    def judge_change(self, config, changes: dict, most: float) -> dict | None:
        """The judgement of a changed config, None where it cannot be. What is estimated at more than `most` bytes is not compiled: None too."""
        with quiet():
            copy = changed(config, changes)
            try:
                if copy is None or (estimate := self.estimate(copy)).memory["total"] > most:
                    return None
                return {"changes": changes} | self.judge(copy, estimate)
            except UserError:  # a size that this mesh does not divide
                return None

    def suggest(self, config, found: dict, until: float) -> list[dict]:
        """The nearest changes that fit: the smallest of each kind, or where none is enough alone, several kinds together."""
        fitting, slowest = [], found["compile_seconds"]
        most = 1.15 * self.device.usable * self.estimate(config).memory["total"] / (found["memory_gib"]["total"] * 2**30)
        kinds = families(config, self.device, len(self.devices))
        for number, kind in enumerate([*kinds, list(together(kinds))]):
            if number == len(kinds) and fitting:
                break
            for changes in kind:
                if time.monotonic() + slowest > until:
                    log.warning(f"not all changes could be tried within {PATIENCE} s; --sweep tries every mesh")
                    return fitting
                trial = self.judge_change(config, changes, most)
                slowest = max(slowest, trial["compile_seconds"] if trial else 0)
                if trial and trial["fits"]:
                    fitting.append(trial)
                    break
        return sorted(fitting, key=lambda trial: -trial["samples_per_second_per_gpu"])

    def sweep(self, config) -> list[dict]:
        """Every mesh with micro-batches of growing size, until one does not fit."""
        rows, size = [], config.model.global_batch_size
        for mesh in tqdm(meshes(config, len(self.devices)), "meshes", disable=None):
            shards = len(self.devices) // (mesh["model.tensor_model_parallel_size"] * config.model.pipeline_model_parallel_size)
            for micro in (n for n in divisors(max(1, size // shards)) if n & (n - 1) == 0):
                row = self.judge_change(config, mesh | {"model.micro_batch_size": micro}, float("inf"))
                rows += [row] if row else []
                if row is None or not row["fits"]:
                    break
        if not rows:
            raise UserError(f"no mesh of {len(self.devices)} devices divides model.global_batch_size {size} and the model's heads; change one of them")
        return rows


def open_planner(config, name: str, num_devices: int) -> Planner:
    device = planned(name)
    check_device(config, name, device)
    try:
        devices, compiles = absent_devices(device, num_devices), True
    except NoCudaWheels as error:
        log.warning(f"{error}; what follows is estimated by formulas, not compiled")
        devices, compiles = cpu_devices(num_devices), False
    return Planner(device, gather(config), devices, compiles)


def main(config, **options) -> None:
    stay_on_cpu()
    start = time.monotonic()
    config = replaced(config, {})  # a copy that is not locked
    count = config.trainer.devices * config.trainer.num_nodes if config.trainer.devices not in (-1, "auto") else 1
    planner = open_planner(config, options["device"], count)
    about = {"device": options["device"], "num_devices": count, "padding_share": planner.facts.padding_share, "num_records": planner.facts.num_records}
    about |= {"notes": list(planner.facts.notes)}
    if options["sweep"]:
        found = about | {"sweep": planner.sweep(config)}
        path = writable(options["output"] or "sweep.png")
        Image.fromarray(sweep_sheet(found["sweep"], options["device"], count)).save(path, "PNG")
        log.info(f"wrote {path}")
    else:
        found = planner.judge(config) | about
        found["suggestions"] = [] if found["fits"] else planner.suggest(config, found, start + PATIENCE)
    found["seconds"] = round(time.monotonic() - start, 1)
    if options["json"]:
        print(json.dumps(found))
    else:
        (print_sweep if options["sweep"] else print_plan)(found)


def writable(name: str) -> Path:
    try:
        with open(name, "ab"):
            return Path(name)
    except OSError as error:
        raise UserError(f"--output {name}: cannot be written ({error.strerror}); name a file in a folder that is there and writable") from None


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("device", None, f"the GPU: {', '.join(PLANNED)}", flag_values=values, required=True)
    flags.DEFINE_integer("num_devices", None, "how many (default: trainer.devices x num_nodes)", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("sweep", False, "compare meshes and micro-batches", flag_values=values)
    flags.DEFINE_string("output", None, "with --sweep: the picture (default: sweep.png)", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object on standard output", flag_values=values)


def with_devices(argv: list[str]) -> list[str]:
    """--num_devices N as the fields that training reads, machines of eight: the config is checked against them like any other."""
    text = next((after for before, after in zip(argv, [*argv[1:], ""], strict=True) if before in ("--num_devices", "-num_devices")), None)
    text = next((one.partition("=")[2] for one in argv if one.lstrip("-").startswith("num_devices=")), text)
    if text is None or not text.isdecimal() or int(text) < 1:
        return argv
    nodes = int(text) // NODE if int(text) % NODE == 0 else 1
    return [*argv, f"--config.trainer.devices={int(text) // nodes}", f"--config.trainer.num_nodes={nodes}"]


if __name__ == "__main__":
    cli.run(main, define_flags, with_devices(sys.argv))
