"""A model by its path, in whatever format: its config, tokenizer and weights, nothing of them read before it is asked for.

What the path lacks (a frozen tower that NeMo leaves out, the language model of a stage-1 file) comes from other paths: `bases`, or those that the model's own
files name and that are here.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from neva_jax.build.architecture import fields_of, guesses_of, template_of
from neva_jax.build.data import build_tokenizer
from neva_jax.build.fp8 import PROJECTIONS
from neva_jax.build.lora import build_lora, with_adapters
from neva_jax.build.model import COMPUTE, neva_config
from neva_jax.build.nemo_config import LLM_FROM, TOWER_FROM, VOCAB
from neva_jax.build.weights import weight_paths
from neva_jax.checkpoint.base import read_base
from neva_jax.config import assign, check, from_json
from neva_jax.convert.adapters import MergedKernels, check_record
from neva_jax.convert.keymap import some
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.convert.source import PARTS
from neva_jax.errors import UserError
from neva_jax.fields import ADAPTERS, FOLLOWERS, VISION
from neva_jax.hub import format_of, load_weights, open_weights, origins, run_of
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.transforms.fp8 import find_kernels
from neva_jax.transforms.lora import Lora, adapters_of, is_adapter
from neva_jax.transforms.select import Weight, describe

log = logging.getLogger(__name__)

TOKENIZER = "model.tokenizer"
TABLES = {"llm/embed_tokens/embedding", "llm/lm_head/kernel"}
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclasses.dataclass
class Opened:
    """format: one of hub.FORMATS. parts: which of llm, vision_encoder, projector there are. origin: {path of a weight: its source}. template: None where no
    file names one. tokenizer: None where there is none. named: {part: where the files say that it lies}. scratch: kept as long as the model. lora: its
    adapters, whose weights are among the others."""

    path: Path
    format: str
    config: ConfigDict
    neva: NevaConfig
    tokenizer: object
    template: str | None
    weights: dict[str, Weight]
    origin: dict[str, object]
    named: dict[str, str]
    scratch: object
    lora: Lora | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        present = {path.split("/")[0] for path in self.origin}
        return tuple(part for part in PARTS if part in present)

    def arrays(self, parts: tuple[str, ...] = PARTS) -> dict[str, object]:
        """{path: array that is read when it is asked for} of some parts, checked to be whole. UserError for a part that is not there."""
        for part in parts:
            if part not in self.parts and not (part == "projector" and self.neva.projector == "identity"):
                where = f"; its files say that it lies in {self.named[part]!r}, which is not here" if part in self.named else ""
                raise UserError(f"{self.path}: no weights of {part} in it{where}; give --base PATH, a model that has it (it may be repeated)")
        if lacking := [path for path in self.adapters if path not in self.origin and path.split("/")[0] in parts]:
            raise UserError(f"{self.path}: holds LoRA adapters without what they stand beside ({some(lacking, 2)}); give --base PATH, the model they belong to")
        chosen = {path: weight.shape for path, weight in self.weights.items() if path.split("/")[0] in parts}
        if missing := [path for path in chosen if path not in self.origin]:
            raise UserError(f"{self.path}: {len(missing)} weights are missing ({some(missing)}); it is not of the model that its config describes")
        for source in {id(source): source for source in self.origin.values()}.values():
            source.check({path: shape for path, shape in chosen.items() if self.origin[path] is source})
        arrays = {path: self.origin[path].lazy(path, shape) for path, shape in chosen.items()}
        for path in TABLES & arrays.keys():
            if (theirs := getattr(arrays[path], "tensors", None)) and theirs[0].shape[0] < self.neva.llm.vocab_size:
                rows = f"{theirs[0].name} has the shape {list(theirs[0].shape)}, and the model {self.neva.llm.vocab_size} tokens"
                raise UserError(f"{self.path}: {rows}; its config or its tokenizer is another model's")
        return arrays

    @property
    def adapters(self) -> dict[str, tuple[str, str]]:
        """{path of a kernel: (path of its A, path of its B)}"""
        return adapters_of(self.weights, self.lora)

    def kernels(self) -> dict[str, object]:
        """{path: lazy array} of the adapted kernels that are here."""
        return {path: self.origin[path].lazy(path, self.weights[path].shape) for path in self.adapters if path in self.origin}

    @property
    def record(self) -> dict | None:
        """What the adapters remember of their base (convert/adapters.py)."""
        homes = [self.origin[pair[0]] for pair in self.adapters.values() if pair[0] in self.origin]
        return next(filter(None, (getattr(home, "recorded_base", None) for home in homes)), None)

    @property
    def float8_of(self) -> str | None:
        """Where the adapters were trained beside weights in float8: the dtype from which these were rounded."""
        if self.format != "orbax":
            return self.record["float8_of"] if self.record else None
        run = run_of(self.path)
        saved = from_json(json.loads((run / "config.json").read_text()))
        quantised = saved.model.fp8 and saved.model.fp8_frozen_weights
        return COMPUTE[str(saved.trainer.precision)] if quantised else read_base(run).get("float8_of")

    @property
    def trained(self) -> set[str]:
        """Weights, adapters apart, that lie where the adapters lie: what was trained beside them, as far as that can be known of a model whose weights do
        not all lie there."""
        home = {id(self.origin[pair[0]]) for pair in self.adapters.values() if pair[0] in self.origin}
        if all(id(self.origin.get(kernel)) in home for kernel in self.adapters):
            return set()
        return {path for path, source in self.origin.items() if id(source) in home and not is_adapter(path)}

    def check_base(self) -> None:
        """UserError where the adapters remember another base than the one that is here."""
        check_record(self.record, self.kernels(), str(self.path), "the base that is given")

    def merged(self, dequantized: bool = False) -> "Opened":
        """The same model without adapters: their products are in its kernels, read when they are asked for. dequantized: in kernels as float8 had them."""
        if self.lora is None:
            return self
        weights = {path: weight for path, weight in self.weights.items() if not is_adapter(path)}
        shapes, config = {path: weight.shape for path, weight in self.weights.items()}, self.config.copy_and_resolve_references()
        config.unlock()
        config.model.peft = from_json({}).model.peft
        origin = {path: source for path, source in self.origin.items() if path in weights and path not in self.adapters}
        rounded = tuple(path for path in find_kernels(weights, PROJECTIONS) if path not in self.trained) if dequantized else ()
        kernels = MergedKernels(self.origin, self.adapters, self.lora.scale, shapes, rounded, self.float8_of or "float32")
        lacking = [path for kernel, pair in self.adapters.items() for path in (kernel, *pair) if path not in self.origin]
        if lacking:
            self.arrays(("llm",))  # says what is missing
        rest = {path: source for path, source in origin.items() if path not in rounded}
        origin = dict.fromkeys((*self.adapters, *rounded), kernels) | rest  # in this order, since other sources have kernels of these names too
        return dataclasses.replace(self, config=config, weights=weights, origin=origin, lora=None)

    def load(self, targets: dict) -> dict:
        """{path: jax.Array}, each born where its target (a ShapeDtypeStruct with a sharding) says."""
        return load_weights(targets, list({id(source): source for source in self.origin.values()}.values()))[0]


def open_model(path: str | Path, *, bases=(), tokenizer: str | None = None, template: str | None = None, field: str = "--input") -> Opened:
    """bases: paths of models that fill what this one lacks. tokenizer: a sentencepiece model or a Hugging Face directory, instead of the model's own."""
    path, scratch = Path(path), tempfile.TemporaryDirectory(prefix="neva_jax_tokenizer_")
    kind, fields = format_of(path, field), fields_of(path, field)
    named = {part: fields.pop(name) for part, name in (("llm", LLM_FROM), ("vision_encoder", TOWER_FROM)) if fields.get(name)}
    bases = [*map(str, bases), *(place for place in named.values() if _is_model(place) and Path(place) != path)]
    for base in bases:
        if fields_of(base, "--base").get("model.peft.peft_scheme"):
            raise UserError(f"{base}: holds LoRA adapters of its own, and is a base of {path}; merge them into theirs first (--merge_lora)")
    fields = _with_bases(path, kind, fields, bases)
    if kind == "peft" and "model.num_layers" not in fields:
        where = f"; it names {named['llm']!r}, which is not here" if "llm" in named else ""
        raise UserError(f"{path}: an adapter does not say what model it is for{where}; give --base PATH, the model it was trained beside")
    config = from_json({})
    for name in sorted(fields, key=lambda name: (name in FOLLOWERS, name)):
        if not name.startswith(f"{TOKENIZER}."):
            assign(config, name, fields[name])
    if config.model.peft.peft_scheme is not None:  # whatever a base's own training froze
        config.model.mm_cfg.llm.freeze = config.model.mm_cfg.vision_encoder.freeze = True
    config.restore_from_path = str(path)
    _attach(config, bases)
    for place in (path, *bases):
        if not (config.model.tokenizer.model or config.model.tokenizer["type"]):
            _set_tokenizer(config, Path(place), tokenizer, Path(scratch.name))
    if template:
        config.model.data.conv_template = template
    check(config)
    opened_tokenizer = build_tokenizer(config) if config.model.tokenizer.model or config.model.tokenizer.type else None
    if fields.get(VOCAB) is None and opened_tokenizer is None and "model.num_layers" in fields:
        config.model.override_vocab_size = 1  # nothing says it, which matters where there is a language model: see below
    if opened_tokenizer is not None and config.model.override_vocab_size == opened_tokenizer.vocab_size:
        config.model.override_vocab_size = None
    shape, lora = neva_config(config, opened_tokenizer.vocab_size if opened_tokenizer else 1), build_lora(config)
    weights = describe(lambda: with_adapters(neva(shape, rngs=nnx.Rngs(0)), lora, 0))[1]
    _ = shape.vision.num_computed_layers  # a layer that the tower does not have is an error now, not when something is written
    sources = [source for name, place, parts in weight_paths(config) for source in _open(place, shape, name, parts, bases, lora)]
    origin = origins(weights, sources)
    if any(name.startswith("llm/") for name in origin) and fields.get(VOCAB) is None and opened_tokenizer is None:
        raise UserError(f"{path}: the size of its vocabulary is nowhere said, since no tokenizer is in it; give --tokenizer PATH")
    says = "model.data.conv_template" in fields or template
    known = config.model.data.conv_template if says else None
    found = Opened(path, kind, config, shape, opened_tokenizer, known, weights, origin, named, scratch, lora)
    found.check_base()
    return found


def _is_model(place: str) -> bool:
    """Whether a name that a model's files give is a path of a model here; it may be a name on a hub, or anything."""
    try:
        return bool(format_of(place))
    except (UserError, OSError, ValueError):
        return False


def _with_bases(path: Path, kind: str, fields: dict, bases: list[str]) -> dict:
    """What the bases say of what the path says nothing of: of all, for a projector alone, else of the tower."""
    found = guesses_of(path)
    for base in reversed(bases):
        theirs = fields_of(base, "--base")
        theirs = {name: value for name, value in theirs.items() if name not in ADAPTERS}
        if kind not in ("tensors", "peft"):
            theirs = {name: value for name, value in theirs.items() if name.startswith(f"{VISION}.") and _holds(base, TOWER_FROM)}
        found |= theirs
    return found | fields


def _open(place: str, config: NevaConfig, name: str, parts: tuple[str, ...], bases: list[str], lora: Lora | None) -> list:
    return open_weights(place, config, "--input" if name == "restore_from_path" else "--base", parts, bases, lora)


def _attach(config: ConfigDict, bases) -> None:
    """The first base with a language model, the first with a tower and, beside adapters, the first with a projector."""
    for field, sign in ((LLM_FROM, "model.num_layers"), (TOWER_FROM, f"{VISION}.hidden_size")):
        found = next((base for base in bases if sign in fields_of(base, "--base") and _holds(base, field)), None)
        assign(config, field, None if found is None else str(found))
    if config.model.peft.peft_scheme is not None:  # adapters may come without a projector
        found = next((base for base in bases if "model.mm_cfg.mm_mlp_adapter_type" in fields_of(base, "--base")), None)
        assign(config, "model.mm_cfg.pretrain_mm_mlp_adapter", None if found is None else str(found))


def _holds(base, field: str) -> bool:
    """A .nemo's config always speaks of a tower, which it rarely holds."""
    return field == LLM_FROM or format_of(base, "--base") != "nemo"


# ---- tokenizer -------------------------------------------------------------------------------------------------------------------------------------------


def _set_tokenizer(config: ConfigDict, path: Path, given: str | None, scratch: Path) -> None:
    """given, or the one at `path`, if there is one."""
    t, kind = config.model.tokenizer, format_of(path)
    if given:
        _use(t, Path(given), huggingface=Path(given).is_dir())
    elif kind == "nemo":
        _from_nemo(config, NemoFile(path), scratch)
    elif kind == "orbax":
        for name, value in fields_of(path).items():
            if name.startswith(f"{TOKENIZER}."):
                assign(config, name, value)
        for name in ("model", "type", "vocab_file", "merge_file"):
            if t[name] and (run_of(path) / t[name]).exists():  # beside the weights, in a converted model
                t[name] = str(run_of(path) / t[name])
    elif kind == "hf" and template_of(path) and (path / "tokenizer.model").is_file():  # an export of ours
        _use(t, path / "tokenizer.model", huggingface=False)
        saved = json.loads((path / "tokenizer_config.json").read_text())
        t.sentencepiece_legacy, t.additional_special_tokens = bool(saved.get("legacy")), tuple(saved.get("additional_special_tokens", ())) or None
    elif kind == "hf" and any((path / name).is_file() for name in TOKENIZER_FILES[:2]):
        _use(t, path, huggingface=True)


def _use(t: ConfigDict, path: Path, *, huggingface: bool) -> None:
    t.library, t["type"], t.model = ("huggingface", str(path), None) if huggingface else ("sentencepiece", None, str(path))


def _from_nemo(config: ConfigDict, file: NemoFile, scratch: Path) -> None:
    saved = file.config.get("tokenizer")
    saved = saved if isinstance(saved, dict) else {}
    for name in ("library", "type", "sentencepiece_legacy", "additional_special_tokens"):
        if saved.get(name) is not None:
            assign(config, f"{TOKENIZER}.{name}", tuple(saved[name]) if isinstance(saved[name], list) else saved[name])
    for name in ("model", "tokenizer_model", "vocab_file", "merge_file"):
        content = file.artifact(saved.get(name))
        if content is not None and not config.model.tokenizer.get(target := name.removeprefix("tokenizer_")):
            file_name = {"model": "tokenizer.model", "vocab_file": "vocab.json", "merge_file": "merges.txt"}[target]
            (scratch / file_name).write_bytes(content)
            assign(config, f"{TOKENIZER}.{target}", str(scratch / file_name))
    t = config.model.tokenizer
    if t.library == "huggingface" and t["type"] and not Path(t["type"]).is_dir():
        log.warning("%s: its tokenizer is Hugging Face's %r, which is no directory here; give --tokenizer PATH if it is needed", file.path, t["type"])
        t["type"] = None


@contextlib.contextmanager
def opened(path, **options):
    """`open_model`, whose scratch files go at the end."""
    model = open_model(path, **options)
    with model.scratch:
        yield model

