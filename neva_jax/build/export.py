"""An opened model written in another format: Hugging Face, .nemo or our own. What lands under the output's name is whole or not there.

Each function returns {key: value} for the converter's report.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from neva_jax.build.data import build_encoder
from neva_jax.build.model import image_processor
from neva_jax.build.nemo_config import OURS, VOCAB, nemo_config
from neva_jax.build.opened import TOKENIZER_FILES, Opened
from neva_jax.checkpoint.stream import save_lazily
from neva_jax.config import to_json
from neva_jax.convert import hf, nemo
from neva_jax.convert.hf_processor import image_config, processor_files
from neva_jax.convert.hf_write import DTYPES, TokenIds, describe, write_huggingface
from neva_jax.convert.nemo_write import write_nemo
from neva_jax.convert.source import PARTS
from neva_jax.convert.weights import all_finite
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import UserError
from neva_jax.models.multimodal import NevaConfig

log = logging.getLogger(__name__)

PRECISION = {"float32": 32, "float16": 16, "bfloat16": "bf16"}
PUBLISHED_TOWERS = {  # (width, blocks, patch, pixels): the name that NeMo fetches it by
    (1024, 24, 14, 224): "openai/clip-vit-large-patch14",
    (1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
}


class Written:
    """A weight on its way out: read when it is asked for, in the dtype of the output, made of finite numbers; `tell` is called with the bytes of each part."""

    def __init__(self, path: str, array, dtype: str | None, tell):
        if dtype is None and array.dtype.name not in DTYPES:
            raise UserError(f"{path} is of type {array.dtype}; set --dtype to one of {', '.join(DTYPES)}")
        self.path, self.array, self.tell = path, array, tell
        self.shape, self.dtype = array.shape, np.dtype(DTYPES[dtype][0]) if dtype else array.dtype

    def __getitem__(self, index) -> np.ndarray:
        with np.errstate(over="ignore"):
            part = np.asarray(self.array[index]).astype(self.dtype, copy=False)
        if not all_finite(part):
            raise UserError(f"{self.path} holds values that are no finite numbers in {self.dtype}; choose another --dtype, or an older checkpoint")
        self.tell(part.nbytes)
        return part

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        part = self[(slice(None),) * len(self.shape)]
        return part if dtype is None else part.astype(dtype)


def to_write(opened: Opened, parts: tuple[str, ...], dtype: str | None, tell) -> dict[str, Written]:
    """{path: weight} of some parts, checked to be whole."""
    return {path: Written(path, array, dtype, tell) for path, array in opened.arrays(parts).items()}


def num_bytes(arrays: dict) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())


def config_of(opened: Opened, parts: tuple[str, ...]) -> NevaConfig:
    """The config without the parts that are not written; a projector's rules need both of its neighbours."""
    keep = PARTS if "projector" in parts else parts
    return dataclasses.replace(opened.neva, llm=opened.neva.llm if "llm" in keep else None, vision=opened.neva.vision if "vision_encoder" in keep else None)


def check_output(output: Path, dtype: str | None) -> None:
    if os.path.lexists(output):
        raise UserError(f"--output {output} exists; remove it, or choose another name")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")


# ---- ours ----------------------------------------------------------------------------------------------------------------------------------------------


def to_orbax(opened: Opened, output: Path, parts: tuple[str, ...], *, dtype: str | None = None, tell=None) -> dict:
    """A directory that opens like a run: config.json, base/ with all weights, the tokenizer's files, and how pictures are prepared."""
    arrays = to_write(opened, parts, dtype, tell)
    _check_room(output, num_bytes(arrays))
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        save_lazily(made / "base", arrays)
        config = to_json(opened.config)
        config["restore_from_path"] = None
        config["model"]["mm_cfg"]["pretrain_mm_mlp_adapter"] = None
        for part in ("llm", "vision_encoder"):
            config["model"]["mm_cfg"][part]["from_pretrained"] = None
        config["model"]["tokenizer"] |= _copy_tokenizer(opened, made)
        (made / "config.json").write_text(json.dumps(config, indent=1))
        base = {"copied": sorted(arrays), "published": [], "whole": True}
        base |= {"float8_of": opened.float8_of} if opened.lora else {}  # beside which the adapters were trained
        (made / "base.json").write_text(json.dumps(base, indent=1))
        if "vision_encoder" in parts:
            save_processor(opened.config, made)
        os.rename(made, output)
    return {"num_tensors": len(arrays), "num_bytes": num_bytes(arrays)}


def save_processor(config, directory: Path) -> None:
    """preprocessor_config.json: how this tower wants its pictures, for those who start from the directory."""
    (directory / "preprocessor_config.json").write_text(json.dumps(image_config(image_processor(config)), indent=1))


def _copy_tokenizer(opened: Opened, made: Path) -> dict:
    """Files beside the weights, and model.tokenizer's fields that say so, relative to the directory."""
    t = opened.config.model.tokenizer
    if opened.tokenizer is None:
        return {"model": None, "type": None}
    folder = made / "tokenizer"
    folder.mkdir()
    if t.library == "huggingface":
        for name in TOKENIZER_FILES:
            if (file := Path(t["type"]) / name).is_file():
                (folder / name).write_bytes(file.read_bytes())
        return {"type": "tokenizer"}
    fields = {}
    for name in ("model", "vocab_file", "merge_file"):
        if t[name]:
            (folder / Path(t[name]).name).write_bytes(Path(t[name]).read_bytes())
            fields[name] = f"tokenizer/{Path(t[name]).name}"
    return fields


def _check_room(output: Path, need: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < need * 1.02 + 2**20:
        raise UserError(f"{output}: needs {need / 2**30:.2f} GiB of disk, {output.parent} has {free / 2**30:.2f}; make room, or choose another disk")


# ---- NeMo ----------------------------------------------------------------------------------------------------------------------------------------------


def to_nemo(
    opened: Opened, output: Path, parts: tuple[str, ...], *, tensor_parallel: int = 1, pipeline_parallel: int = 1, key_format: str = "mcore",
    dtype: str | None = None, tell=None,
) -> dict:  # fmt: skip
    arrays = to_write(opened, parts, dtype, tell)
    keys = nemo.key_map(config_of(opened, parts))
    outline = keys.outline(arrays)
    tree, artifacts = nemo_tree(opened, parts, outline, tensor_parallel)
    write_nemo(
        output, keys.parts(arrays), outline, tree, artifacts, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, key_format=key_format,
    )  # fmt: skip
    return {"num_tensors": len(outline), "num_bytes": num_bytes(arrays)}


def nemo_tree(opened: Opened, parts: tuple[str, ...], outline: dict, tensor_parallel: int) -> tuple[dict, dict[str, bytes]]:
    """model_config.yaml of a file that holds `parts` whole, and the files of the tokenizer. outline: {name: (shape, dtype)} of what it holds."""
    config = opened.config.copy_and_resolve_references()
    widest = np.result_type(*{own for _, own in outline.values()}).name
    config.unlock()
    config.model.mm_cfg.llm.freeze = "llm" not in parts  # as NeMo has it: what is frozen is not in the file
    config.model.mm_cfg.vision_encoder.freeze = "vision_encoder" not in parts
    config.model.mm_cfg.vision_encoder.from_pretrained = tower_name(opened)
    config.model.mm_cfg.llm.from_pretrained = None if "llm" in parts else opened.named.get("llm") or config.model.mm_cfg.llm.from_pretrained
    config.model.mm_cfg.pretrain_mm_mlp_adapter = None
    tokenizer, section, artifacts = _nemo_tokenizer(opened)
    tree = nemo_config(
        config, parts=parts, tokenizer=section, precision=PRECISION.get(widest, 32), media_length=opened.neva.media_length,
        with_tower="vision_encoder" in opened.parts,
    )  # fmt: skip
    vocab, multiple = opened.neva.llm.vocab_size, config.model.make_vocab_size_divisible_by * tensor_parallel
    tree["override_vocab_size"] = None
    if tokenizer is None or -(-tokenizer.vocab_size // multiple) != -(-vocab // multiple):
        tree["override_vocab_size"] = -(-vocab // multiple) * multiple
    tree[OURS][VOCAB] = vocab
    return tree, artifacts


def nemo_parts(opened: Opened) -> tuple[str, ...]:
    """What NeMo itself would save: everything but a tower that was frozen."""
    trained = not opened.config.model.mm_cfg.vision_encoder.freeze
    return tuple(part for part in opened.parts if part != "vision_encoder" or trained or opened.parts == ("vision_encoder",))


def tower_name(opened: Opened) -> str | None:
    """Where NeMo finds the tower: as the model's own files have it, or a directory that is nothing else, or the published one of this shape."""
    v = opened.neva.vision
    given = opened.named.get("vision_encoder") or opened.config.model.mm_cfg.vision_encoder.from_pretrained
    if given and (not Path(given).is_dir() or not hf.read_config(given)["text"]):
        return given
    return PUBLISHED_TOWERS.get((v.hidden_size, v.num_layers, v.patch_size, v.image_size))


def _nemo_tokenizer(opened: Opened) -> tuple[object, dict, dict[str, bytes]]:
    """The tokenizer as NeMo will have it (a sentencepiece model alone, also of a Hugging Face directory that has one), its section, and its files."""
    t, given = opened.config.model.tokenizer, opened.tokenizer
    if given is None:
        return None, {"model": None, "type": None}, {}
    beside = given.path.parent / "tokenizer.model"
    if isinstance(given, SentencePieceTokenizer) or beside.is_file():
        tokenizer = SentencePieceTokenizer(given.path if isinstance(given, SentencePieceTokenizer) else beside)
        artifacts = _artifacts({"model": tokenizer.path})
        section = {"library": "sentencepiece", "type": None, "vocab_file": None, "merge_file": None}
    else:
        tokenizer, artifacts = given, _artifacts({name: Path(t[name]) for name in ("vocab_file", "merge_file") if t[name]})
        section = {"library": t.library, "type": t["type"], "model": None}
    return tokenizer, section | {name: f"nemo:{member}" for name, (member, _) in artifacts.items()}, dict(artifacts.values())


def _artifacts(files: dict[str, Path]) -> dict[str, tuple[str, bytes]]:
    """{field: (member of the .nemo, content)}, named as NeMo names them, by 32 hexadecimal digits."""
    contents = {name: (file, file.read_bytes()) for name, file in files.items()}
    return {name: (f"{hashlib.md5(content).hexdigest()}_{file.name}", content) for name, (file, content) in contents.items()}


# ---- Hugging Face --------------------------------------------------------------------------------------------------------------------------------------


def to_huggingface(opened: Opened, output: Path, parts: tuple[str, ...], *, dtype: str | None = None, tell=None) -> dict:
    if parts == ("projector",):
        raise UserError("a projector alone is no model of Hugging Face's; give --base PATH, a model with the other parts, or convert --to nemo or orbax")
    arrays, config = to_write(opened, parts, dtype, tell), config_of(opened, parts)
    files, ids, notes = {}, _ids_in_config(opened), ["no tokenizer is written, since there is none; give --tokenizer PATH to have one"]
    if opened.tokenizer is not None and config.llm:
        made = processor_files(_encoder(opened), config, image_processor(opened.config) if config.vision else None)
        files, ids, notes = made.files, made.ids, made.notes
        if opened.template is None:
            files, notes = _own_chat_template(opened, dict(files))
        if ends := [end for end in _ids_in_config(opened).ends if end not in ids.ends]:
            ids = dataclasses.replace(ids, ends=(*ids.ends, *ends))
    elif config.vision:
        files = {"preprocessor_config.json": (json.dumps(image_config(image_processor(opened.config)), indent=2) + "\n").encode()}
        notes = notes if config.llm else []
    report = write_huggingface(
        output, config, arrays, ids, files=files, notes=tuple(notes), kind=_kind(opened), max_positions=opened.config.model.encoder_seq_length,
    )  # fmt: skip
    log.info(describe(report))
    return {"num_tensors": report.num_tensors, "num_bytes": report.num_bytes, "files": report.files}


def _encoder(opened: Opened):
    config = opened.config.copy_and_resolve_references()
    if opened.template is None:
        config.unlock()
        config.model.data.conv_template = "interleaved"  # no conversation: no chat template is written
    return build_encoder(config, opened.tokenizer, opened.neva)


def _own_chat_template(opened: Opened, files: dict[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """A language model's own chat template goes along where no template of ours is named."""
    folder = opened.path if opened.format == "hf" else None
    config = json.loads((folder / "tokenizer_config.json").read_text()) if folder and (folder / "tokenizer_config.json").is_file() else {}
    chat = (folder / "chat_template.jinja").read_text() if folder and (folder / "chat_template.jinja").is_file() else config.get("chat_template")
    if not isinstance(chat, str):
        return files, ["no chat template is written, since the model's files name none; give --conv_template NAME, or write prompts by hand"]
    changed = json.loads(files["tokenizer_config.json"]) | {"chat_template": chat}
    return files | {"tokenizer_config.json": json.dumps(changed, indent=2).encode(), "chat_template.jinja": chat.encode()}, []


def _ids_in_config(opened: Opened) -> TokenIds:
    """Token ids that a Hugging Face directory says; what ends an answer is in generation_config.json too."""
    if opened.format != "hf":
        return TokenIds()
    config, generation = hf.read_config(opened.path), opened.path / "generation_config.json"
    top, text = config["top"], config["text"] or {}
    try:
        more = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        ends = [end for found in (top.get("eos_token_id", text.get("eos_token_id")), more) for end in (found if isinstance(found, list) else [found])]
        ids = TokenIds(
            top.get("image_token_index", top.get("image_token_id")), top.get("pad_token_id", text.get("pad_token_id")),
            top.get("bos_token_id", text.get("bos_token_id")), tuple(dict.fromkeys(end for end in ends if end is not None)),
        )  # fmt: skip
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{generation}: not JSON as transformers writes it ({error}); copy it again") from None
    found = [i for i in (ids.image, ids.pad, ids.bos, *ids.ends) if i is not None]
    limit = opened.neva.llm.vocab_size + 4096
    if bad := [i for i in found if not isinstance(i, int) or not 0 <= i < limit]:
        raise UserError(f"{opened.path / 'config.json'}: names the token {bad[0]!r}, in a vocabulary of {opened.neva.llm.vocab_size}; copy it again")
    return ids


def _kind(opened: Opened) -> str:
    text = hf.read_config(opened.path)["text"] if opened.format == "hf" else None
    return "mistral" if text and "mistral" in text.get("model_type", "") else "llama"
