"""Writes a Hugging Face directory: weights in shards, config.json, generation_config.json, and the files that others hand in (hf_processor).

Tensors are streamed into the shards one at a time (the safetensors library would hold a shard in memory), and the directory appears under its name when it is
whole. Given up: what transformers' Llama and LLaVA cannot compute, each by an error that names it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from neva_jax.convert import hf
from neva_jax.convert.keymap import KeyMap, some
from neva_jax.convert.weights import all_finite
from neva_jax.errors import UserError
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.multimodal import NevaConfig
from neva_jax.models.siglip import SiglipVisionConfig

DTYPES = {"float32": (np.float32, "F32"), "float16": (np.float16, "F16"), "bfloat16": (ml_dtypes.bfloat16, "BF16")}
CODES = {np.dtype(dtype): (name, code) for name, (dtype, code) in DTYPES.items()}
TABLES = ("llm.embed_tokens.weight", "llm.lm_head.weight")
OURS = "neva_jax"  # a section of config.json: how many rows of the vocabulary are not new
MULTIPLE = 64  # of the rows, as llava-hf's, where there are new ones
MARGIN = 2**20  # bytes of disk for headers and indices


@dataclass(frozen=True)
class TokenIds:
    """What the configs say of tokens; None where there is none. image: <image>; ends: what generation stops at."""

    image: int | None = None
    pad: int | None = None
    bos: int | None = None
    ends: tuple[int, ...] = ()
    unknown: int | None = None


@dataclass(frozen=True)
class Report:
    """files: {name: bytes}; notes: what another program will not do as we do; new_rows: of the vocabulary, for tokens that the model did not have."""

    directory: Path
    files: dict[str, int]
    num_tensors: int
    num_bytes: int
    new_rows: int
    notes: tuple[str, ...]


def write_huggingface(
    output: str | Path, config: NevaConfig, arrays: dict, ids: TokenIds, *, files: dict[str, bytes] | None = None, notes: tuple[str, ...] = (),
    dtype: str | None = None, kind: str = "llama", max_positions: int = 4096, max_shard_bytes: int = 5 * 10**9,
) -> Report:  # fmt: skip
    """output: a directory that does not exist. config: with vision None a language model alone is written, with llm None a tower alone.

    arrays: {path: array, or what a KeyMap reads lazily}, all of the config's weights and no others. dtype: of all tensors, None keeps each one's own.
    files, notes, ids: of hf_processor.processor_files. kind: "llama" or "mistral". max_positions: max_position_embeddings.
    Raises UserError for a model that transformers cannot compute, weights that are not numbers, and a disk without room, before or without anything left.
    """
    output = Path(output)
    keys = _key_map(config, arrays)
    rows = _rows(config, ids)
    outline = _outline(keys, arrays, rows, dtype)
    configs = _configs(config, ids, rows, kind, max_positions, _widest(outline))
    texts = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in configs.items()} | (files or {})
    num_bytes = sum(_size(*entry) for entry in outline.values())
    if os.path.lexists(output):
        raise UserError(f"{output} exists; remove it, or choose another name")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_room(output, num_bytes + sum(map(len, texts.values())) + MARGIN)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            made = Path(work) / "made"
            made.mkdir()
            _write_shards(made, outline, _tensors(keys, arrays, outline, config), max_shard_bytes, alone=not (config.llm and config.vision))
            for name, content in texts.items():
                (made / name).write_bytes(content)
            sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
            os.rename(made, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing was left of it") from None
    return Report(output, sizes, len(outline), num_bytes, rows - config.llm.vocab_size if config.llm else 0, tuple(notes))


def describe(report: Report) -> str:
    """The report in lines, for a person."""
    lines = [f"{report.directory}: {report.num_tensors} tensors, {report.num_bytes:,} bytes of weights"]
    lines += [f"  {size:>16,}  {name}" for name, size in report.files.items()]
    if report.new_rows:
        lines.append(f"{report.new_rows} rows of the vocabulary are new: the mean of the others, whose logit is never the largest")
    return "\n".join(lines + [f"note: {note}" for note in report.notes])


# ---- what is written ---------------------------------------------------------------------------------------------------------------------------------


def _key_map(config: NevaConfig, arrays: dict) -> KeyMap:
    if config.llm and config.vision and config.projector != "mlp2x_gelu":
        raise UserError(
            f"mm_mlp_adapter_type {config.projector}: transformers' LLaVA always has two Linears with GELU between them, which is mlp2x_gelu; "
            "export this model as .nemo, or the language model alone"
        )
    keys = hf.key_map(config)
    missing, extra = sorted(keys.rules.keys() - arrays.keys()), sorted(arrays.keys() - keys.rules.keys())
    if missing or extra:
        found = f"missing {some(missing) or 'none'}; not part of the model {some(extra) or 'none'}"
        raise UserError(f"weights to export: {found}; merge adapters before the export")
    return keys


def _rows(config: NevaConfig, ids: TokenIds) -> int:
    """Rows of the exported vocabulary: ours, and new ones if a token has none yet."""
    if config.llm is None:
        return 0
    last = max(i for i in (-1, ids.image, ids.pad, *ids.ends) if i is not None)
    return config.llm.vocab_size if last < config.llm.vocab_size else -(-(last + 1) // MULTIPLE) * MULTIPLE


def _outline(keys: KeyMap, arrays: dict, rows: int, dtype: str | None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    outline = {}
    for name, (shape, own) in keys.outline(arrays).items():
        outline[name] = (rows, *shape[1:]) if name in TABLES else tuple(shape), np.dtype(DTYPES[dtype][0]) if dtype else own
    if odd := {str(own) for _, own in outline.values() if own not in CODES}:
        raise UserError(f"weights of type {', '.join(sorted(odd))}; set dtype to one of {', '.join(DTYPES)}")
    return outline


def _widest(outline: dict) -> str:
    """What a reader has to compute in to lose nothing."""
    return CODES[np.result_type(*{dtype for _, dtype in outline.values()})][0]


def _tensors(keys: KeyMap, arrays: dict, outline: dict, config: NevaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(canonical name, tensor), in the order of `outline`. New rows of the vocabulary are the mean of the others: the mean of logits is below their largest."""
    for name, array in keys.parts(arrays):
        shape, dtype = outline[name]
        new = shape[0] - len(array) if name in TABLES else 0
        if new:
            mean = np.mean(array, axis=0, dtype=np.float32).astype(array.dtype)
            array = np.concatenate([array, np.broadcast_to(mean, (new, len(mean)))])
        with np.errstate(over="ignore"):
            written = array.astype(dtype, copy=False)
        if not all_finite(written):
            cause = "take a checkpoint from before it went wrong" if not all_finite(array) else f"{dtype} cannot hold its numbers; choose bfloat16"
            raise UserError(f"{name} holds values that are not finite numbers; {cause}")
        yield name, written


# ---- files -------------------------------------------------------------------------------------------------------------------------------------------


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def _check_room(output: Path, need: int) -> None:
    if (free := shutil.disk_usage(output.parent).free) < need:
        raise UserError(f"{output}: needs {need / 2**30:.2f} GiB of disk, {output.parent} has {free / 2**30:.2f}; make room, or choose another disk")


def _shards(outline: dict, limit: int) -> list[list[str]]:
    """Names in order, as many a shard as fit; a tensor larger than the limit has a shard to itself."""
    shards, filled = [[]], 0
    for name, entry in outline.items():
        if shards[-1] and filled + _size(*entry) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(*entry)
    return shards


def _write_shards(directory: Path, outline: dict, tensors: Iterator[tuple[str, np.ndarray]], limit: int, alone: bool) -> None:
    shards = _shards(outline, limit)
    total, weight_map = len(shards), {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"
        spelt = [hf.spelt(name, alone) for name in names]
        weight_map |= dict.fromkeys(spelt, file)
        with open(directory / file, "wb") as opened:
            opened.write(_header({theirs: outline[name] for theirs, name in zip(spelt, names, strict=True)}))
            for expected in names:
                name, array = next(tensors)
                if (name, array.shape) != (expected, outline[expected][0]):
                    raise ValueError(f"{name} {list(array.shape)} came where {expected} {list(outline[expected][0])} was announced")
                opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if total > 1:
        index = {"metadata": {"total_size": sum(_size(*entry) for entry in outline.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header(entries: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """What a safetensors file opens with: the length of a JSON object in 8 bytes, and the object, which says where each tensor lies behind it."""
    described: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in entries.items():
        start, end = end, end + _size(shape, dtype)
        described[name] = {"dtype": CODES[dtype][1], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the library has it
    return len(text).to_bytes(8, "little") + text


# ---- configs -----------------------------------------------------------------------------------------------------------------------------------------


def _configs(config: NevaConfig, ids: TokenIds, rows: int, kind: str, max_positions: int, dtype: str) -> dict[str, dict]:
    """{file: content} of config.json, and of generation_config.json where text is generated."""
    ends = ids.ends[0] if len(ids.ends) == 1 else list(ids.ends) or None
    tokens = {name: value for name, value in {"bos_token_id": ids.bos, "eos_token_id": ends, "pad_token_id": ids.pad}.items() if value is not None}
    if config.llm is None:
        return {"config.json": hf.vision_config(config.vision) | {"torch_dtype": dtype}}
    text = hf.text_config(config.llm, kind, rows, max_positions) | {"torch_dtype": dtype}
    text |= {"bos_token_id": ids.bos, "eos_token_id": ends, "pad_token_id": ids.pad}  # a null is no Llama's default
    whole = text if config.vision is None else _llava_config(config, ids, text, dtype)
    if rows > config.llm.vocab_size:
        whole[OURS] = {"vocab_size": config.llm.vocab_size}
    return {"config.json": whole, "generation_config.json": tokens | {"do_sample": False}}


def _llava_config(config: NevaConfig, ids: TokenIds, text: dict, dtype: str) -> dict:
    if ids.image is None:
        raise UserError("a LLaVA needs the id of its <image> token")
    vision = config.vision
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text, "vision_config": hf.vision_config(vision),
        "image_token_index": ids.image, "image_seq_length": config.media_length, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer, "vision_feature_select_strategy": image_tokens(vision)["vision_feature_select_strategy"],
        "pad_token_id": ids.pad, "tie_word_embeddings": config.llm.tied, "torch_dtype": dtype,
    }  # fmt: skip


def image_tokens(vision: ClipVisionConfig | SiglipVisionConfig) -> dict:
    """What transformers' LLaVA drops of a tower's vectors, and how its processor counts them; "default" drops the first, whatever it is."""
    if isinstance(vision, SiglipVisionConfig):
        return {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    return {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "full" if vision.keep_class_token else "default"}
