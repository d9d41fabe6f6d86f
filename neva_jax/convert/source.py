"""Weights of other programs as sources that a run can start from: a path, what parts of a model lie there, and arrays that are read when they are asked for.

A source has `shapes` ({path: None}), `parts`, `load(targets)`, `lazy(path, shape)`, and `published`: how a run finds it again.
"""

import tempfile
from pathlib import Path

import jax

from neva_jax.convert import hf, nemo, peft
from neva_jax.convert.adapters import read_record
from neva_jax.convert.hf_write import TABLES
from neva_jax.convert.keymap import KeyMap, LazyArray, some
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.convert.weights import full_digest, headers_digest
from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig
from neva_jax.parallel.sharding import place
from neva_jax.transforms.lora import Lora

PARTS = ("llm", "vision_encoder", "projector")


class Source:
    """Tensors of another program, read through a key map. parts: what to take, e.g. ("llm",).

    Names that belong to no part are kept, for `check` to complain of: weights that nobody recognises are not dropped in silence.
    recorded_base: of adapters, what they remember of their base (convert/adapters.py).
    """

    recorded_base: dict | None = None

    def __init__(self, path: Path, tensors: dict, keys: KeyMap, parts: tuple[str, ...], part_of):
        """part_of: canonical name -> part, or None."""
        self.path, self.names = Path(path), list(tensors)
        self.tensors = {name: tensor for name, tensor in tensors.items() if part_of(name) in (*parts, None)}
        self.key_map, self._part_of = keys, part_of
        present = {part_of(name) for name in self.tensors}
        self.parts = tuple(part for part in PARTS if part in present)
        self.shapes = dict.fromkeys(path for path in keys.rules if path.split("/")[0] in present)
        self.published = {"directory": str(self.path.absolute()), "digest": headers_digest(path), "parts": list(parts)}

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Everything of the parts that `shapes` speaks of is there, has its shape, and nothing else is; else one error that lists it all."""
        wanted = {path.split("/")[0] for path in shapes}
        tensors = {name: tensor for name, tensor in self.tensors.items() if self._part_of(name) in (*wanted, None)}
        self.key_map.check(tensors, {path: shapes[path] for path in self.shapes if path in shapes}, str(self.path))

    def full_digest(self) -> str:
        return full_digest(self.path)

    def lazy(self, path: str, shape: tuple[int, ...]) -> LazyArray:
        return self.key_map.lazy(self.tensors, path, shape, str(self.path))

    def load(self, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Each array born where its target says, every device reading its own block."""
        self.check({path: target.shape for path, target in targets.items()})
        return {path: place(self.lazy(path, target.shape), target) for path, target in targets.items()}


def huggingface(path: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS, lora: Lora | None = None) -> Source:
    """A Hugging Face directory, or a file of weights under its names, such as LLaVA's mm_projector.bin. lora: of the model; no adapters
    are in such a file."""
    tensors = hf.open_tensors(path)
    _check_tables(path, tensors)
    if config.llm and config.llm.tied:
        tensors.pop("llm.lm_head.weight", None)  # some files repeat the table; transformers reads past it as well

    return Source(path, tensors, hf.key_map(config, tensors), parts, _part_of)


def _part_of(name: str) -> str | None:
    """The part of a model that a canonical name of Hugging Face's belongs to."""
    part = name.split(".")[0]
    return part if part in PARTS else None


def _check_tables(path: Path, tensors: dict) -> None:
    """The vocabulary may grow or shrink on its way into a run, so its rows are compared with the directory's own config."""
    text = hf.read_config(path)["text"] if (Path(path) / "config.json").is_file() else None
    rows = text and hf.text_fields(text)["vocab_size"]
    for name in TABLES:
        if text and name in tensors and tensors[name].shape[0] != rows:
            raise UserError(f"{path}: {tensors[name].name} has the shape {list(tensors[name].shape)}, its config.json says vocab_size {rows}; copy both again")


def nemo_file(path: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS, lora: Lora | None = None) -> Source:
    """A .nemo file or its unpacked directory: of a model, or of the adapters and the projector of one with `lora`. What lies in a tar is copied to a scratch
    directory, which goes when the source does."""
    scratch = tempfile.TemporaryDirectory(prefix="neva_jax_nemo_")
    file = NemoFile(path)
    tensors = file.tensors(Path(scratch.name))
    if adapters := [name for name in tensors if nemo.LORA.search(name)]:
        _expect_adapters(path, lora, adapters)
        keys = nemo.adapter_map(config, lora, with_projector=any(nemo.part_of(name) == "projector" for name in tensors))
    else:
        keys = nemo.key_map(config)
    source = Source(path, tensors, keys, parts, nemo.part_of)
    source.scratch = scratch
    return of_adapters(source, nemo_base(file)) if adapters else source


def nemo_base(file: NemoFile) -> dict | None:
    """What an adapter of ours remembers of its base (convert/adapters.py)."""
    ours = file.config.get(peft.OURS)
    return read_record(ours.get("base"), str(file.path)) if isinstance(ours, dict) else None


def peft_adapter(path: Path, config: NevaConfig, parts: tuple[str, ...] = PARTS, lora: Lora | None = None) -> Source:
    """A directory of Hugging Face's peft."""
    tensors = peft.open_tensors(path)
    _expect_adapters(path, lora, list(tensors))

    return of_adapters(Source(path, tensors, peft.key_map(config, lora, tensors), parts, _part_of), peft.recorded_base(path))


def of_adapters(source: Source, recorded_base: dict | None) -> Source:
    """What of them is frozen is copied into a run: they are no model that could be opened again by itself."""
    source.published, source.recorded_base = None, recorded_base
    return source


def _expect_adapters(path: Path, lora: Lora | None, names: list[str]) -> None:
    if lora is None:
        raise UserError(
            f"{path}: holds LoRA adapters ({some(sorted(names), 2)}), and the model has none: name it in model.peft.restore_from_path, beside its base, or "
            "merge it into its base (python convert_torch.py --merge_lora)"
        )
