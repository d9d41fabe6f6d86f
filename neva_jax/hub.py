"""The one opener of weights: a run of ours or a Hugging Face directory, as a list of sources.

A source has `shapes` ({path: shape}), `load(targets) -> {path: array}` and `published` (None, or how to find it again: directory and digest).
"""

import json
from pathlib import Path

import jax
import numpy as np

from neva_jax.checkpoint.base import SavedTree, read_base
from neva_jax.convert import hf
from neva_jax.convert.keymap import some
from neva_jax.convert.weights import headers_digest
from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig

PARTS = ("llm", "vision_encoder", "projector")


class HuggingFaceSource:
    """Weights of a Hugging Face directory, read tensor by tensor through the key map. parts: what to take of it, e.g. ("llm",).

    Names that belong to no part are kept, for `load` to complain of: weights that nobody recognises are not dropped in silence.
    """

    def __init__(self, directory: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS):
        self.directory = Path(directory)
        skipped = set(PARTS) - set(parts)
        self.tensors = {name: t for name, t in hf.open_tensors(directory).items() if name.split(".")[0] not in skipped}
        if config.llm.tied:
            self.tensors.pop("llm.lm_head.weight", None)  # some files repeat the table; transformers reads past it as well
        self.key_map = hf.key_map(config, self.tensors)
        present = {name.split(".")[0] for name in self.tensors}
        self.paths = [path for path in self.key_map.rules if path.split("/")[0] in present]
        self.published = {"directory": str(self.directory.absolute()), "digest": headers_digest(directory), "parts": list(parts)}

    @property
    def shapes(self) -> dict[str, None]:
        """Paths only; each tensor's shape is checked when it is read."""
        return dict.fromkeys(self.paths)

    def load(self, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        unwanted = set(PARTS) - {path.split("/")[0] for path in targets}
        tensors = {name: t for name, t in self.tensors.items() if name.split(".")[0] not in unwanted}
        paths = [path for path in self.paths if path.split("/")[0] not in unwanted]
        self.key_map.check(tensors, paths, str(self.directory))
        return {path: self._load(path, target) for path, target in targets.items()}

    def _load(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.asarray(self.key_map.read(self.tensors, path, target.shape, str(self.directory)), target.dtype)
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: array[index])


def checkpoints_of(path: Path) -> Path | None:
    """Where a run of ours keeps its checkpoints; None: the path is no run."""
    try:
        params = json.loads((path / "config.json").read_text())["exp_manager"]["checkpoint_callback_params"]
    except (OSError, ValueError, KeyError, TypeError):  # a Hugging Face directory has a config.json too
        return None
    directory = Path(params["dirpath"] or path / "checkpoints")
    return directory if directory.is_dir() else None


def is_run(path: Path) -> bool:
    return checkpoints_of(path) is not None


def open_weights(path: str | Path, config: NevaConfig, field: str, parts: tuple[str, ...] = PARTS) -> list:
    """Sources for a path that `field` of the config names."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{field}: no directory {path}; expected a run of this program or a Hugging Face model directory (nothing is downloaded)")
    if is_run(path):
        return open_run(path, config, parts)
    if (path / "config.json").exists():
        source = HuggingFaceSource(path, config, parts)
        if not source.paths:
            raise UserError(f"{field}: {path} holds no weights of {' or '.join(parts)}; found {some(sorted(hf.open_tensors(path)))}")
        return [source]
    raise UserError(f"{field}: {path} is neither a run (config.json and checkpoints/) nor a Hugging Face model directory (config.json and *.safetensors)")


def open_run(run: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS) -> list:
    """The newest checkpoint's trainable weights first, then what the run stands on."""
    directory = checkpoints_of(run)
    steps = sorted((int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True)
    if not steps:
        raise UserError(f"{run}: this run has no checkpoint yet")
    return [SavedTree(directory / str(steps[0]) / "trainable", parts), *open_base(run, config, parts)]


def open_base(run: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS) -> list:
    """The sources that a run's base.json names; a published one must still be what it was."""
    base = read_base(run)
    sources: list = [SavedTree(run / "base", parts)] if base["copied"] else []
    for entry in base["published"]:
        if not Path(entry["directory"]).is_dir() or headers_digest(entry["directory"]) != entry["digest"]:
            raise UserError(f"{run}: stands on the weights in {entry['directory']}, which are gone or have changed since; put them back")
        if wanted := tuple(part for part in entry["parts"] if part in parts):
            sources.append(HuggingFaceSource(Path(entry["directory"]), config, wanted))
    return sources


def load_base(run: Path, targets: dict[str, jax.ShapeDtypeStruct], config: NevaConfig) -> dict[str, jax.Array]:
    """The frozen weights of a run that is resumed."""
    arrays, _ = load_weights(targets, open_base(run, config))
    if missing := sorted(targets.keys() - arrays.keys()):
        raise UserError(f"{run}: the run trained {some(missing)} and is now asked to freeze it; restore the freeze fields, or start a new run")
    return arrays


def load_weights(targets: dict[str, jax.ShapeDtypeStruct], sources: list) -> tuple[dict[str, jax.Array], dict[str, object]]:
    """Every target that some source has, from the first that has it -> arrays, and {path: its source}."""
    found = {path: next((s for s in sources if path in s.shapes), None) for path in targets}
    origin = {path: source for path, source in found.items() if source is not None}
    arrays: dict[str, jax.Array] = {}
    for source in sources:
        mine = {path: targets[path] for path, s in origin.items() if s is source}
        arrays |= source.load(mine) if mine else {}
    return arrays, origin
