"""A run's checkpoints, by Orbax: asynchronous, atomic, the newest always kept beside the best `save_top_k`.

A step holds three items, so that each can be read without the others: `trainable` (weights by path), `optimizer` (moments and counters) and `meta` (JSON:
global_step, consumed_samples, global_batch_size, architecture). Frozen weights are not in it; see `base`.
"""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from neva_jax.errors import UserError
from neva_jax.transforms.select import flatten, nest

log = logging.getLogger(__name__)


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
        items = {
            "trainable": ocp.args.StandardSave(nest(state["params"])),
            "optimizer": ocp.args.StandardSave(nest(named_leaves({"opt_state": state["opt_state"], "skipped": state["skipped"]}))),
            "meta": ocp.args.JsonSave(meta),
        }
        known = {self.monitor: metrics[self.monitor]} if self.monitor in metrics else None
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=known, force=True)

    def meta(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract_state: dict) -> dict:
        """The state of a step, each array born where `abstract_state` (ShapeDtypeStructs with shardings) says, on whatever mesh."""
        rest = {"opt_state": abstract_state["opt_state"], "skipped": abstract_state["skipped"]}
        args = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(nest(abstract_state["params"])), optimizer=ocp.args.StandardRestore(nest(named_leaves(rest)))
        )
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0][:300]
            raise UserError(f"{self.directory / str(step)}: cannot be restored ({reason}); remove it to resume from an older one") from error
        rest = with_leaves(rest, flatten(found["optimizer"]))
        return {"params": flatten(found["trainable"]), **rest}

    def close(self) -> None:
        """Waits for what is still being written; an error of a background write surfaces here."""
        self._manager.wait_until_finished()
        self._manager.close()


def saved_paths(directory: Path) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a tree of weights that was saved under `directory`."""
    metadata = ocp.StandardCheckpointer().metadata(directory.absolute())
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def load_tree(directory: Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some weights of a saved tree, each born where its target says."""
    restore_args = jax.tree.map(lambda t: ocp.ArrayRestoreArgs(sharding=t.sharding, dtype=t.dtype, global_shape=t.shape), nest(targets))
    args = ocp.args.PyTreeRestore(item=nest(targets), restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return flatten(checkpointer.restore(directory.absolute(), args=args))


def save_tree(directory: Path, weights: dict[str, jax.Array]) -> None:
    """Weights by path, written at once; what was there is replaced."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), nest(weights), force=True)
