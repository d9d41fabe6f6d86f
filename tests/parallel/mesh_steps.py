"""The step of a tiny model on a mesh, as train.py builds it, on made-up rows that are the same however they are cut: no data, no logs, no files."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from runs import tiny

from neva_jax.build import model as build_model
from neva_jax.build import run as build_run
from neva_jax.parallel.mesh import batch_shards
from neva_jax.parallel.sharding import batch_sharding

ROWS, T, K, LR = 16, 32, 64, np.float32(1e-3)
SHAPE = {
    "model__num_layers": 8, "model__hidden_size": 32, "model__ffn_hidden_size": 64, "model__num_attention_heads": 4, "model__num_query_groups": 2,
    "model__micro_batch_size": 1, "model__global_batch_size": ROWS,
    "model__optim__eps": 1e-6,  # above rounding: with 1e-8 an element whose gradient is next to nothing goes a whole step by what rounding makes of it
}  # fmt: skip


def global_batch(seed: int, micro_batches: int) -> dict[str, np.ndarray]:
    """16 rows of different lengths and numbers of targets, one picture each, as [M, 16 / M, ...]."""
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(0, 300, (ROWS, T)).astype(np.int32), rng.integers(20, T + 1, ROWS)
    targets = (np.arange(T) >= lengths[:, None] - rng.integers(1, 9, ROWS)[:, None]) & (np.arange(T) < lengths[:, None])
    media_index = np.where((np.arange(T) >= 2) & (np.arange(T) < 6), np.arange(T) - 2, -1)
    rows = {
        "tokens": tokens,
        "labels": np.where(targets, np.roll(tokens, -1, 1), -100).astype(np.int32),
        "position_ids": np.tile(np.arange(T, dtype=np.int32), (ROWS, 1)),
        "segment_ids": (np.arange(T) < lengths[:, None]).astype(np.int32),
        "media_index": np.tile(media_index.astype(np.int32), (ROWS, 1)),
        "supervised_positions": np.stack([np.pad(np.flatnonzero(row), (0, K - row.sum()), constant_values=-1) for row in targets]).astype(np.int32),
        "media": rng.integers(0, 256, (ROWS, 1, 32, 32, 3), np.uint8),
        "bad_image": np.zeros(ROWS, np.int32),
    }
    return {name: array.reshape(micro_batches, ROWS // micro_batches, *array.shape[1:]) for name, array in rows.items()}


@dataclasses.dataclass
class Step:
    """A model on its mesh, and the step compiled for it."""

    mesh: jax.sharding.Mesh
    model: build_model.Model
    abstract_state: dict
    step: object
    micro_batches: int

    def weights(self) -> tuple[dict, dict]:
        """-> state at rest, frozen: the same numbers on every mesh. By numpy, since compiling the random numbers takes longer than the test."""
        rng = np.random.default_rng(0)
        arrays = {path: rng.normal(size=weight.shape).astype(np.float32) for path, weight in sorted(self.model.weights.items())}
        arrays = {path: 1 + 0.1 * a if path.endswith("/scale") else 0.2 * a for path, a in arrays.items()}
        place = lambda path: jax.device_put(arrays[path], self.model.shardings[path])  # noqa: E731
        state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), self.abstract_state)
        state["params"] = {path: place(path) for path in self.model.rows}
        state["scales"] = jax.tree.map(lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding), self.abstract_state["scales"])
        return state, self.model.stored({path: place(path) for path in arrays if path not in self.model.rows})

    def batch(self, seed: int) -> dict[str, jax.Array]:
        return jax.device_put(global_batch(seed, self.micro_batches), batch_sharding(self.mesh))

    @functools.cached_property
    def compiled(self):
        frozen = {path: self.model.target(path) for path in self.model.weights if path not in self.model.rows}
        described = self.model.pipeline.live((self.abstract_state, frozen))
        return self.step.lower(*described, self.batch(0), LR, np.zeros(self.mesh.size, np.int32)).compile()

    def train(self, steps: int, lr: float = LR) -> tuple[list[float], dict, dict, dict]:
        """-> losses, the first moments after the first step (a tenth of its gradients), the weights at the end, the state; all at rest"""
        state, frozen = self.model.pipeline.live(self.weights())
        losses, moments = [], None
        for seed in range(steps):
            state, metrics = self.compiled(state, frozen, self.batch(seed), np.float32(lr), np.zeros(self.mesh.size, np.int32))
            losses.append(float(metrics["reduced_train_loss"]))
            moments = moments or jax.device_get(self.model.pipeline.rest(state["opt_state"][0].mu))
        state = self.model.pipeline.rest(state)
        return losses, moments, jax.device_get(state["params"]), state


def make_step(directory: Path, **changes) -> Step:
    config = tiny(directory, **(SHAPE | changes))
    mesh = build_run.build_mesh(config)
    jax.set_mesh(mesh)
    model = build_model.build_model(config, build_model.neva_config(config, 300), mesh)
    optimizer, _ = build_run.build_optimizer(config, model)
    state = build_run.abstract_state(config, model, optimizer, mesh)
    step = build_run.build_step(config, model, optimizer, mesh)
    return Step(mesh, model, state, step, ROWS // config.model.micro_batch_size // batch_shards(mesh))
