"""LoRA adapters as Hugging Face's peft keeps them: adapter_config.json, adapter_model.safetensors (or .bin), and LLaVA's non_lora_trainables.bin.

A trained projector goes along as peft's `modules_to_save`. Given up, each by an error that names it: what is no plain LoRA of a language model's projections
(DoRA, PiSSA, ranks by pattern, biases, adapters of the projector or of the tower, but for those that are zeros), and embeddings that were saved along.
"""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from neva_jax.convert import hf, weights
from neva_jax.convert.adapters import read_record
from neva_jax.convert.keymap import TRANSPOSE, KeyMap, Rule, some
from neva_jax.convert.weights import all_finite
from neva_jax.errors import UserError
from neva_jax.transforms.lora import Lora, adapters_of

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there counts
BESIDE = "non_lora_trainables.bin"  # LLaVA's: the projector
OURS = "neva_jax"  # in the file's metadata: what the adapter remembers of its base
FACTOR = re.compile(r"^llm\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)\.lora_([AB])\.weight$")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = {  # what adapter_config.json must say, or leave out
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "rank_pattern": (None, {}), "alpha_pattern": (None, {}), "fan_in_fan_out": (False,),
    "lora_bias": (False,), "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []), "megatron_config": (None,),
    "alora_invocation_tokens": (None,), "arrow_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base as well
}  # fmt: skip
TAKEN = ("use_rslora",)  # of fields use_...; any other that is set is a kind of its own
NAMES = (  # the module tree of transformers since 4.52, which peft's names follow: a LLaVA's, a language model's alone
    (("llm.", "base_model.model.model.language_model."), ("projector.", "base_model.model.model.multi_modal_projector.")),
    (("llm.", "base_model.model.model."),),
)


# ---- reading -----------------------------------------------------------------------------------------------------------------------------------------


def is_adapter_dir(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_config(directory: Path) -> dict:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
        rank, alpha = config["r"], config["lora_alpha"]
        if not (isinstance(rank, int) and 0 < rank < 2**20 and isinstance(alpha, int | float) and 0 < alpha < 2**20):
            raise ValueError(f"r {rank!r}, lora_alpha {alpha!r}")
        used = {name: (False, None) for name in config if name.startswith("use_") and name not in TAKEN}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the configuration of a LoRA adapter ({type(error).__name__}: {error}); copy it again") from None
    if odd := [f"{name} {config[name]!r} (expected {known[0]!r})" for name, known in (used | PLAIN).items() if config.get(name, known[0]) not in known]:
        raise UserError(f"{path}: {'; '.join(odd)}; this version reads plain LoRA: merge the adapter with peft (merge_and_unload), and bring the whole model")
    return config


def weights_file(directory: Path) -> Path:
    found = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if found is None:
        raise UserError(f"{directory}: has {CONFIG}, but neither {' nor '.join(FILES)}; copy the whole directory")
    return found


def open_tensors(directory: Path) -> dict:
    """{canonical name: tensor} of the adapter and of a projector saved beside it."""
    found = weights.open_tensors(weights_file(directory))
    if (directory / BESIDE).is_file():
        found |= weights.open_tensors(directory / BESIDE)
    tensors, tower = {}, {}
    for name, tensor in found.items():
        known = hf.canonical(re.sub(r"^(?:base_model\.model\.)+", "", name).replace(".default.weight", ".weight").replace("modules_to_save.", "")) or name
        group = tower if known.startswith("vision_encoder.") else tensors
        if known in group:
            raise UserError(f"{directory}: {group[known].name} and {name} are two spellings of one weight; remove the stale one")
        group[known] = tensor
    if whole := [name for name in tensors if name.startswith("llm.") and "lora_" not in name]:
        raise UserError(f"{directory}: has whole weights of the language model saved along ({some(sorted(whole))}); merge the adapter with peft")
    if other := [name for name in tensors if name.startswith("projector.") and "lora_" in name]:
        raise UserError(f"{directory}: adapts the projector ({some(sorted(other))}), which this version does not; merge the adapter with peft")
    moved = [name for name, tensor in tower.items() if "lora_B" in name and np.any(np.asarray(tensor.read()))]
    if moved or any("lora_" not in name for name in tower):
        raise UserError(f"{directory}: adapts the vision tower ({some(sorted(moved or tower))}), which this version does not; merge the adapter with peft")
    return tensors


def adapter_fields(directory: Path) -> dict[str, object]:
    """{config field: value} of the adapters."""
    config, tensors = read_config(directory), open_tensors(directory)
    layers: dict[str, set[int]] = {}
    for match in filter(None, map(FACTOR.match, tensors)):
        layers.setdefault(match[2], set()).add(int(match[1]))
    if unknown := sorted(layers.keys() - set(PROJECTIONS)):
        raise UserError(f"{directory}: adapters of {', '.join(unknown)}; this version knows those of {', '.join(PROJECTIONS)}")
    if not layers:
        raise UserError(f"{directory}: no adapters of a language model's layers in {weights_file(directory).name}; found {some(sorted(tensors)) or 'nothing'}")
    if len({frozenset(numbers) for numbers in layers.values()}) > 1:
        raise UserError(f"{directory}: its adapters of {' and '.join(layers)} stand in different layers; merge them with peft (merge_and_unload)")
    numbers = tuple(sorted(number + 1 for number in next(iter(layers.values()))))
    alpha = float(config["lora_alpha"]) * (config["r"] ** 0.5 if config.get("use_rslora") else 1)  # rank-stabilised: alpha / sqrt(r)
    tuning = {
        "adapter_dim": int(config["r"]), "alpha": alpha, "variant": "canonical", "target_modules": tuple(name for name in PROJECTIONS if name in layers),
        "layer_selection": numbers,
    }  # fmt: skip
    return {"model.peft.peft_scheme": "lora"} | {f"model.peft.lora_tuning.{name}": value for name, value in tuning.items()}


def recorded_base(directory: Path) -> dict | None:
    """What an adapter of ours remembers of its base (convert/adapters.py)."""
    file = weights_file(directory)
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="np") as opened:
        text = (opened.metadata() or {}).get(OURS)
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = text  # which is no record
    return read_record(found, str(file))


# ---- the table -----------------------------------------------------------------------------------------------------------------------------------------


def key_map(model_config, lora: Lora, names=()) -> KeyMap:
    """model_config: NevaConfig; names: canonical ones of a file, which decide between spellings of the projector."""
    kernels, depth = hf.key_map(model_config).rules, model_config.llm.num_layers
    rules = []
    for kernel, (lora_A, lora_B) in adapters_of(kernels, lora).items():
        theirs = kernels[kernel].theirs.removesuffix("weight")
        rules += [Rule(f"{theirs}lora_A.weight", lora_A, TRANSPOSE), Rule(f"{theirs}lora_B.weight", lora_B, TRANSPOSE)]
    if model_config.vision and any(name.startswith("projector.") for name in names):
        rules += hf.projector_rules(model_config.projector, names)
    return KeyMap(rules, {"llm": depth if lora.layers is None else lora.layers})


# ---- writing -----------------------------------------------------------------------------------------------------------------------------------------


def write_peft(output: Path, keys: KeyMap, arrays: dict, lora: Lora, *, base: str | None, record: dict, alone: bool) -> int:
    """output: a directory that does not exist. keys: of `key_map`, of unshared adapters; arrays: {path: array}. base: what adapter_config.json names;
    record: what the adapter remembers of it. alone: of a language model by itself. -> how many tensors."""
    tensors = {spelt(name, alone): np.ascontiguousarray(tensor) for name, tensor in keys.parts(arrays)}
    if odd := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
        raise UserError(f"{odd[0]} holds values that are no finite numbers; take a checkpoint from before it went wrong")
    projections = [name for name in PROJECTIONS if any(f".{name}.lora_A." in tensor for tensor in tensors)]
    saves = ["multi_modal_projector"] if any("multi_modal_projector" in name for name in tensors) else None
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0,
        "target_modules": projections if alone else _pattern(projections, lora), "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "modules_to_save": saves, "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
        "layers_to_transform": list(lora.layers) if alone and lora.layers else None, "layers_pattern": "layers" if alone and lora.layers else None,
    }  # fmt: skip
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            made = Path(work) / "made"
            made.mkdir()
            (made / FILES[0]).write_bytes(save(tensors, metadata={"format": "pt", OURS: json.dumps(record)}))
            (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            made.rename(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing was left of it") from None
    return len(tensors)


def _pattern(projections: list[str], lora: Lora) -> str:
    """Of a LLaVA's language model alone: its tower has projections of the same names."""
    layers = r"\d+" if lora.layers is None else f"(?:{'|'.join(map(str, lora.layers))})"
    return rf".*language_model\.layers\.{layers}\.(?:self_attn|mlp)\.(?:{'|'.join(projections)})"


def spelt(name: str, alone: bool) -> str:
    return next(theirs + name.removeprefix(ours) for ours, theirs in NAMES[alone] if name.startswith(ours))
