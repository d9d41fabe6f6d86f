"""Small runs for tests: the quickstart's data, a model of a few thousand weights, and what is left of a run when it ends."""

import json
import os
import signal
from pathlib import Path

import numpy as np

import train
from configs import quickstart
from neva_jax import config as library
from neva_jax.build.data import Split
from neva_jax.checkpoint.manager import load_tree, saved_paths

TINY = {
    "trainer.max_steps": 6, "trainer.log_every_n_steps": 1, "trainer.val_check_interval": 100, "trainer.limit_val_batches": 1,
    "model.num_layers": 1, "model.hidden_size": 16, "model.ffn_hidden_size": 32, "model.num_attention_heads": 2, "model.micro_batch_size": 4,
    "model.global_batch_size": 4, "model.data.buckets": (128,), "model.optim.sched.warmup_steps": 2, "evaluation.questions": None, "evaluation.num_samples": 0,
    "model.mm_cfg.vision_encoder.hidden_size": 16, "model.mm_cfg.vision_encoder.num_layers": 1, "model.mm_cfg.vision_encoder.ffn_hidden_size": 32,
    "model.mm_cfg.vision_encoder.num_attention_heads": 2, "model.mm_cfg.vision_encoder.patch_dim": 16, "exp_manager.create_tensorboard_logger": False,
}  # fmt: skip


def tiny(directory: Path, **changes):
    """A checked config of a tiny run in `directory`; changes with __ for the dots."""
    config = quickstart.get_config()
    for path, value in (TINY | {name.replace("__", "."): value for name, value in changes.items()}).items():
        library.assign(config, path, value)
    library.assign(config, "exp_manager.explicit_log_dir", str(directory))
    config.lock()
    library.check(config)
    return config


def run(directory: Path, **changes) -> dict[str, float]:
    return train.main(tiny(directory, **changes))


def run_until_stopped(monkeypatch, directory: Path, after: int, **changes) -> int:
    """The same run, sent SIGTERM while its batch `after` is read -> the exit code."""
    original = Split.batches

    def batches(self, start, stop):
        for i, batch in enumerate(original(self, start, stop)):
            if i == after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(Split, "batches", batches)
        try:
            run(directory, **changes)
        except SystemExit as end:
            return end.code
    return 0


def steps_of(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def saved(directory: Path, item: str, step: int | None = None) -> dict[str, np.ndarray]:
    """{path: array} of an item of a checkpoint (default: the newest), or of the run's base."""
    import jax

    folder = directory / "base" if item == "base" else directory / "checkpoints" / str(step or steps_of(directory)[-1]) / item
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = load_tree(folder, {path: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for path, shape in saved_paths(folder).items()})
    return {path: np.asarray(array) for path, array in tree.items()}


def logged(directory: Path, *names: str) -> list[tuple]:
    """[(global_step, values...)] of metrics.jsonl."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["global_step"], *(line[name] for name in names)) for line in lines]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].tobytes() == b[path].tobytes(), path
