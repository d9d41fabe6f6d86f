"""The one opener of weights: a run of ours or a step of it, a Hugging Face directory, a .nemo, or a file of a projector's weights, as a list of sources.

A source has `shapes` ({path: shape, or None where that is not known yet}), `load(targets) -> {path: array}`, `lazy(path, shape)`, which is read when it is
asked for, and `published` (None, or how to find it again: directory and digest).
"""

import json
import tarfile
from pathlib import Path

import jax

from neva_jax.checkpoint.base import SavedTree, read_base
from neva_jax.convert import source
from neva_jax.convert.keymap import some
from neva_jax.convert.peft import is_adapter_dir
from neva_jax.convert.source import PARTS
from neva_jax.convert.weights import full_digest, headers_digest
from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig
from neva_jax.transforms.lora import Lora

FORMATS = {  # what a path holds: in words
    "orbax": "a run of this program (config.json with checkpoints/ or base/), or a step of it",
    "hf": "a Hugging Face model directory (config.json and *.safetensors or pytorch_model*.bin)",
    "nemo": "a .nemo file or its unpacked directory",
    "peft": "a LoRA adapter of Hugging Face's peft (adapter_config.json and adapter_model.safetensors or .bin)",
    "tensors": "a file of weights (.safetensors, .bin), such as LLaVA's mm_projector.bin",
}
OPENERS = {"peft": source.peft_adapter, "hf": source.huggingface, "nemo": source.nemo_file, "tensors": source.huggingface}


def format_of(path: str | Path, field: str = "the path") -> str:
    """Which of FORMATS a path holds. field: what an error calls the path."""
    path = Path(path)
    if path.is_dir():
        if is_adapter_dir(path):
            return "peft"
        if checkpoints_of(run_of(path)) is not None:
            return "orbax"
        if (path / "model_config.yaml").exists() or (path / "context").is_dir():
            return "nemo"
        if (path / "config.json").exists():
            return "hf"
    elif path.is_file():
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            return "tensors"
        if path.suffix == ".nemo" or tarfile.is_tarfile(path):
            return "nemo"
    else:
        raise UserError(f"{field}: there is no {path}; expected a local path (nothing is downloaded)")
    raise UserError(f"{field}: {path} is none of these: {'; '.join(FORMATS.values())}")


# ---- runs --------------------------------------------------------------------------------------------------------------------------------------------


def run_of(path: Path) -> Path:
    """A run, of itself, of its checkpoints/ or of a step of them."""
    candidates = (path, path.parent, path.parent.parent) if not (path / "config.json").exists() else (path,)
    return next((run for run in candidates if (run / "base.json").exists()), path)


def checkpoints_of(path: Path) -> Path | None:
    """Where a run of ours keeps its checkpoints; None: the path is no run."""
    try:
        params = json.loads((path / "config.json").read_text())["exp_manager"]["checkpoint_callback_params"]
    except (OSError, ValueError, KeyError, TypeError):  # a Hugging Face directory has a config.json too
        return None
    directory = Path(params["dirpath"] or path / "checkpoints")
    return directory if directory.is_dir() or (path / "base.json").exists() else None


def is_run(path: Path) -> bool:
    return checkpoints_of(path) is not None


def open_run(path: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS, bases=()) -> list:
    """The trainable weights of the newest checkpoint, or of the step that is named, then what the run stands on. bases: see open_base."""
    run = run_of(path)
    directory = checkpoints_of(run)
    steps = sorted((int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True) if directory.is_dir() else []
    if path.name.isdigit() and path != run:
        steps = [int(path.name)]
    if not steps and not read_base(run).get("whole"):
        raise UserError(f"{run}: this run has no checkpoint yet")
    return [SavedTree(directory / str(step) / "trainable", parts) for step in steps[:1]] + open_base(run, config, parts, bases)


def open_base(run: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS, bases=()) -> list:
    """The sources that a run's base.json names; a published one must still be what it was. bases: other places where it may lie now."""
    base = read_base(run)
    sources: list = [SavedTree(run / "base", parts)] if base["copied"] else []
    for entry in base["published"]:
        places = [place for place in (entry["directory"], *bases) if Path(place).exists() and headers_digest(place) == entry["digest"]]
        if not places:
            elsewhere = f", and --base {', '.join(map(str, bases))} is not what they were" if bases else "; put them back, or name where they are by --base"
            raise UserError(f"{run}: stands on the weights in {entry['directory']}, which are gone or have changed since{elsewhere}")
        if wanted := tuple(part for part in entry["parts"] if part in parts):
            sources.append(OPENERS[format_of(places[0])](Path(places[0]), config, wanted))
    return sources


def verify_base(run: Path, bases=()) -> int:
    """Reads every byte of the published weights that a run stands on and compares their hashes -> how many sources were compared."""
    entries = read_base(run)["published"]
    for entry in entries:
        places = [place for place in (entry["directory"], *bases) if Path(place).exists() and headers_digest(place) == entry["digest"]]
        if not places or full_digest(places[0]) != entry["sha256"]:
            raise UserError(f"{run}: stands on the weights in {entry['directory']}, whose bytes are no longer those that it was trained on; put them back")
    return len(entries)


# ---- any -----------------------------------------------------------------------------------------------------------------------------------------------


def open_weights(path: str | Path, config: NevaConfig, field: str, parts: tuple[str, ...] = PARTS, bases=(), lora: Lora | None = None) -> list:
    """Sources for a path that `field` of the config names. bases: see open_base. lora: the adapters of the model that they are for."""
    path, kind = Path(path), format_of(path, field)
    if kind == "orbax":
        return open_run(path, config, parts, bases)
    found = OPENERS[kind](path, config, parts, lora)
    if not found.shapes:
        raise UserError(f"{field}: {path} holds no weights of {' or '.join(parts)}; found {some(sorted(found.names)) or 'none'}")
    return [found]


def load_base(run: Path, targets: dict[str, jax.ShapeDtypeStruct], config: NevaConfig, store=None) -> dict[str, jax.Array]:
    """The frozen weights of a run that is resumed. store: see load_weights."""
    arrays, _ = load_weights(targets, open_base(run, config), store)
    if missing := sorted(targets.keys() - arrays.keys()):
        raise UserError(f"{run}: the run trained {some(missing)} and is now asked to freeze it; restore the freeze fields, or start a new run")
    return arrays


def origins(paths, sources: list) -> dict[str, object]:
    """{path: the first source that has it}, of those that some source has."""
    found = {path: next((s for s in sources if path in s.shapes), None) for path in paths}
    return {path: source for path, source in found.items() if source is not None}


def load_weights(targets: dict[str, jax.ShapeDtypeStruct], sources: list, store=None) -> tuple[dict[str, jax.Array], dict[str, object]]:
    """Every target that some source has, from the first that has it -> arrays, and {path: its source}.

    store: {path: function of the array that was read}, whose result takes the array's place before the next one is read.
    """
    origin, store = origins(targets, sources), store or {}
    arrays: dict[str, jax.Array] = {}
    for one in sources:
        mine = {path: targets[path] for path, s in origin.items() if s is one}
        at_once = {path: target for path, target in mine.items() if path not in store}
        arrays |= one.load(at_once) if at_once else {}
        for path in [path for path in mine if path in store]:
            arrays[path] = store[path](one.load({path: mine[path]})[path])
    return arrays, origin
