"""A model as a flat dictionary {path: array}, and the one ordered table that says what of it trains.

Paths read like "llm/layers/self_attn/q_proj/kernel". Gradients, optimizer, checkpoints and the start-up print all read the same table.
"""

import dataclasses
import difflib
import re

import jax
from flax import nnx

from neva_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Weight:
    """What is known of a weight before it exists. axes: logical, one a dimension; a stacked weight's first is "layers"."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def describe(make) -> tuple[nnx.GraphDef, dict[str, Weight]]:
    """make() -> module; nothing is computed. -> (graphdef, {path: Weight})"""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    weights = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata("axes")
        weights["/".join(map(str, path))] = Weight(variable.shape, ("layers",) * (len(variable.shape) - len(axes)) + axes)
    return graphdef, weights


def nest(flat: dict[str, jax.Array]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}, which `nnx.merge(graphdef, ...)` takes as it is."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def flatten(tree: dict, prefix: str = "") -> dict[str, jax.Array]:
    """The inverse of `nest`."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `model.trainable`: paths that `pattern` (re.search) finds train at lr_factor times the learning rate; factor 0 keeps them frozen.
    weight_decay None: the optimizer's own, and none for norms and biases."""

    pattern: str
    lr_factor: float = 1.0
    weight_decay: float | None = None


def trainable(paths, rows: list[Row]) -> dict[str, Row]:
    """{path: its row} for every path that trains; the first row that matches counts. A pattern that finds nothing is an error with near misses."""
    paths = list(paths)
    chosen = {}
    for path in paths:
        row = next((row for row in rows if re.search(row.pattern, path)), None)
        if row is not None and row.lr_factor != 0:
            chosen[path] = row
    for row in rows:
        if not any(re.search(row.pattern, path) for path in paths):
            near = difflib.get_close_matches(row.pattern, paths, n=3, cutoff=0.2)
            raise UserError(f"model.trainable: the pattern {row.pattern!r} finds no weight; near misses: {', '.join(near) or 'none'}")
    if not chosen:
        raise UserError("nothing trains: every part is frozen; set model.mm_cfg.llm.freeze to False, or model.trainable to what should train")
    return chosen


def decays(path: str) -> bool:
    """Whether weight decay applies by default: not to norms, biases and CLIP's class token (all of them vectors)."""
    return not (path.endswith(("/bias", "/scale")) or path.endswith("class_embedding"))
