"""A run's checkpoints, by Orbax: asynchronous, atomic, the newest always kept beside the best `save_top_k`.

A step holds three items, so that each can be read without the others: `trainable` (weights by path), `optimizer` (moments and counters) and `meta` (JSON:
global_step, consumed_samples, global_batch_size, architecture). Frozen weights are not in it; see `base`.
"""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from neva_jax.checkpoint.stream import chunking, open_lazily
from neva_jax.errors import UserError
from neva_jax.parallel.sharding import place
from neva_jax.transforms.select import nest

log = logging.getLogger(__name__)

FP8_STATE = " (FP8's state, scales and amax_histories, is as model.fp8, fp8_scaling, fp8_frozen_weights and fp8_amax_history_len say)"


def named_leaves(tree) -> dict[str, jax.Array]:
    """Any tree as {path: leaf}: optax's states are tuples of named tuples, and a checkpoint wants names."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_leaves(tree, leaves: dict):
    """`tree` with the leaves of that name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path, simple=True, separator="/")], tree)


class Checkpoints:
    """directory: of the steps. monitor: a metric's name; mode: "min" or "max"; save_top_k: how many of the best stay (-1: all); save_last: the newest too."""

    def __init__(self, directory: str | Path, *, monitor: str = "val_loss", mode: str = "min", save_top_k: int = 1, save_last: bool = True):
        best = keep.BestN(get_metric_fn=lambda metrics: metrics[monitor], reverse=mode == "min", n=max(save_top_k, 0), keep_checkpoints_without_metrics=False)
        policy = keep.PreserveAll() if save_top_k < 0 else keep.AnyPreservationPolicy([keep.LatestN(1), best] if save_last else [best])
        self.directory, self.monitor = Path(directory).absolute(), monitor
        self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(preservation_policy=policy))

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: dict, meta: dict, metrics: dict[str, float]) -> None:
        """Starts writing `state` (see training/step.py) as checkpoint `step` and returns; a step that is there already is left alone."""
        if step in self._manager.all_steps():
            return
        rest = named_leaves({name: tree for name, tree in state.items() if name != "params"})
        items = {
            "trainable": ocp.args.StandardSave(nest(state["params"]), save_args=nest(chunking(state["params"]))),
            "optimizer": ocp.args.StandardSave(nest(rest), save_args=nest(chunking(rest))),
            "meta": ocp.args.JsonSave(meta),
        }
        known = {self.monitor: metrics[self.monitor]} if self.monitor in metrics else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=known, force=True)

    def meta(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract_state: dict) -> dict:
        """The state of a step, each array born where `abstract_state` (ShapeDtypeStructs with shardings) says, on whatever mesh."""
        step_directory, rest = self.directory / str(step), {name: tree for name, tree in abstract_state.items() if name != "params"}
        try:
            params = load_tree(step_directory / "trainable", abstract_state["params"], whole=True)
            return {"params": params, **with_leaves(rest, load_tree(step_directory / "optimizer", named_leaves(rest), whole=True))}
        except UserError as error:
            fp8 = FP8_STATE if any(name in str(error) for name in ("scales/", "amax_histories/")) else ""
            raise UserError(f"{error}{fp8}; or remove {step_directory} to resume from an older one") from error

    def close(self) -> None:
        """Waits for what is still being written; an error of a background write surfaces here."""
        self._manager.wait_until_finished()
        self._manager.close()


def saved_paths(directory: Path) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a tree of weights that was saved under `directory`."""
    return {path: array.shape for path, array in open_lazily(directory).items()}


def load_tree(directory: Path, targets: dict[str, jax.ShapeDtypeStruct], whole: bool = False) -> dict[str, jax.Array]:
    """Weights of a saved tree, each born where its target says, one after the other: the host holds no more than its own shards of one array.
    whole: the tree must hold nothing else."""
    saved = open_lazily(directory)
    missing, more = sorted(targets.keys() - saved.keys()), sorted(saved.keys() - targets.keys()) if whole else []
    if missing or more:
        found = [f"{len(paths)} {what} ({', '.join(paths[:4])}{', ...' * (len(paths) > 4)})" for paths, what in ((missing, "missing"), (more, "more")) if paths]
        raise UserError(f"{directory}: holds other weights than the config asks for: {', '.join(found)}; restore the config it was saved with")
    for path, target in targets.items():
        if saved[path].shape != target.shape:
            raise UserError(f"{directory}: {path} has the shape {list(saved[path].shape)}, the config says {list(target.shape)}")
    return {path: place(saved[path], target) for path, target in targets.items()}


def save_tree(directory: Path, weights: dict[str, jax.Array]) -> None:
    """Weights by path, written at once; what was there is replaced."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), nest(weights), save_args=nest(chunking(weights)), force=True)
