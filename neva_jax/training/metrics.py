"""What a run says while it runs: a progress bar on a terminal or plain lines elsewhere, `metrics.jsonl`, TensorBoard. Only process 0 writes.

Names are NeMo's (reduced_train_loss, global_step, consumed_samples, "train_step_timing in s", lr, grad_norm, val_loss), then ours.
"""

import dataclasses
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)

SHOWN = ("reduced_train_loss", "val_loss", "lr", "grad_norm", "train_step_timing in s", "samples/s/GPU", "MFU", "padding_share")  # on one line


class Metrics:
    """directory: of the run, or None where this process is not to write. Steps already logged beyond `first_step` (a run that was killed) are dropped."""

    def __init__(self, directory: Path | None, *, first_step: int, max_steps: int, tensorboard: bool = True):
        self.file = self.tensorboard = self.bar = None
        if directory is None:
            return
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["global_step"] <= first_step))
        self.file = path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        if sys.stderr.isatty():
            self.bar = tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line for people, one for scripts, one point a scalar for TensorBoard. NaN and infinity are null in the file."""
        if self.file is None:
            return
        values = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        whole = {name: int(value) if value is not None and value == int(value) and abs(value) > 1 else value for name, value in finite.items()}
        self.file.write(json.dumps({"global_step": step, **whole}) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        line = ", ".join(f"{name}={values[name]:.4g}" for name in SHOWN if name in values)
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        else:
            log.info(f"global_step={step}, {line}")

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """picture: uint8[H, W, 3]"""
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        for resource in (self.file, self.tensorboard, self.bar):
            if resource is not None:
                resource.close()


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does, in all processes together: samples, tokens that are not padding (as this process' rows have them), model FLOPs."""

    samples: float
    tokens: float
    flops: float

    @classmethod
    def of(cls, batch: dict, flops: float, share: float = 1.0) -> "Work":
        """batch, flops: of this process' rows, which are `share` of a global batch."""
        micro_batches, rows = batch["tokens"].shape[:2]
        return cls(micro_batches * rows / share, int((batch["segment_ids"] != 0).sum()) / share, flops / share)


class Clock:
    """Seconds and rates between two log lines."""

    def __init__(self, step: int):
        self.start(step)

    def start(self, step: int) -> None:
        self.began, self.step, self.waited = time.perf_counter(), step, 0.0
        self.samples = self.tokens = self.flops = 0.0

    def next(self, iterator):
        """next(iterator), its wait counted."""
        began = time.perf_counter()
        item = next(iterator)
        self.waited += time.perf_counter() - began
        return item

    def add(self, work: Work) -> None:
        """What a step did, once it is done."""
        self.samples += work.samples
        self.tokens += work.tokens
        self.flops += work.flops

    def rates(self, step: int, num_devices: int, peak_flops: float | None) -> dict[str, float]:
        """Since the last start; starts anew. num_devices: of all processes; MFU is left out where the peak is unknown."""
        seconds, steps = time.perf_counter() - self.began, max(1, step - self.step)
        rates = {
            "train_step_timing in s": seconds / steps,
            "samples/s/GPU": self.samples / seconds / num_devices,
            "tokens/s": self.tokens / seconds,
            "data_wait in s": self.waited / steps,
        }
        if peak_flops:
            rates["MFU"] = self.flops / seconds / num_devices / peak_flops
        self.start(step)
        return rates
