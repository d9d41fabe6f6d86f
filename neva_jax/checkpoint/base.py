"""The frozen weights a run stands on. A run never needs a file of another run: what it takes frozen from one, or from a random start, it copies into its
own `base/`; weights in a published format (Hugging Face, .nemo) stay where they are and are recorded by path and hashes: a quick one, and one of every byte.

`base.json`: {"copied": [paths], "published": [{"directory", "digest", "sha256", "parts", "paths"}], "whole": True where base/ is a model by itself}.
"""

import functools
import json
import os
from pathlib import Path

import jax

from neva_jax.checkpoint.manager import load_tree, save_tree, saved_paths
from neva_jax.checkpoint.stream import open_lazily
from neva_jax.errors import UserError


class SavedTree:
    """A source of weights: a tree saved by us (a step's `trainable`, a run's `base`)."""

    published = None

    def __init__(self, directory: Path, parts: tuple[str, ...]):
        """parts: what to take of it, e.g. ("llm",)."""
        self.directory = Path(directory)
        self.shapes = {path: shape for path, shape in saved_paths(self.directory).items() if path.split("/")[0] in parts}

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for path, shape in shapes.items():
            if self.shapes[path] != shape:
                raise UserError(f"{self.directory}: {path} has the shape {list(self.shapes[path])}, the config says {list(shape)}")

    def lazy(self, path: str, shape: tuple[int, ...]):
        """An array that is read when it is asked for."""
        return self._lazy[path]

    @functools.cached_property
    def _lazy(self) -> dict:
        return open_lazily(self.directory)

    def load(self, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        return load_tree(self.directory, targets)


def record_base(run: Path, frozen: dict[str, jax.Array], sources: dict[str, object]) -> None:
    """Copies what must be copied and writes base.json. sources: {path: the source it came from, None: a random start}."""
    copied = {path: array for path, array in frozen.items() if getattr(sources.get(path), "published", None) is None}
    if copied:
        save_tree(run / "base", copied)
    if jax.process_index():
        return  # one process writes, and one reading of every byte is enough
    published: dict[int, dict] = {}
    for path, source in sources.items():
        if path in frozen and path not in copied:
            if id(source) not in published:
                published[id(source)] = {**source.published, "sha256": source.full_digest(), "paths": []}
            published[id(source)]["paths"].append(path)
    temporary = run / "base.json.tmp"
    temporary.write_text(json.dumps({"copied": sorted(copied), "published": list(published.values())}, indent=1))
    os.replace(temporary, run / "base.json")


def read_base(run: Path) -> dict:
    path = Path(run) / "base.json"
    if not path.exists():
        raise UserError(f"{run}: has checkpoints but no base.json, which names its frozen weights; it is not a whole run")
    try:
        base = json.loads(path.read_text())
        return base | {"copied": list(base["copied"]), "published": [dict(entry) for entry in base["published"]]}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: does not say what the run stands on ({type(error).__name__}: {error}); copy it again") from None
