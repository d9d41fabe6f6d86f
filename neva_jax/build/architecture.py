"""What a model's own files say of it, in the config's words: Hugging Face's config.json, a .nemo's model_config.yaml, a run's config.json.

`fields_of(path)` is {config field: value}; a field that the files do not speak of is not in it. Given up: what trained the model (optimizer, data, sizes of
batches), which no weight depends on.
"""

import json
import logging
import re
import tempfile
from pathlib import Path

from neva_jax.build.nemo_config import LLM_FROM, NAMELESS, OURS, SCALINGS, TRAVELS, VOCAB, nemo_adapter_fields, nemo_fields
from neva_jax.checkpoint.base import read_base
from neva_jax.config import coerce, leaves
from neva_jax.convert import hf, nemo, peft
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.image import ImageProcessor
from neva_jax.errors import UserError
from neva_jax.fields import ADAPTERS, VISION
from neva_jax.hub import format_of, run_of
from neva_jax.layers.rope import Rope
from neva_jax.models.siglip import SiglipVisionConfig

log = logging.getLogger(__name__)

LLM_FIELDS = {  # text_fields' word: config field
    "num_layers": "num_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "ffn_hidden_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups", "head_dim": "kv_channels", "layernorm_epsilon": "layernorm_epsilon", "activation": "activation",
    "tied": "share_embeddings_and_output_weights", "bias": "bias",
}  # fmt: skip
TEMPLATE_NAME = re.compile(r'The prompts of the template "([\w:]+)"')  # in a chat template that we wrote


def fields_of(path: str | Path, field: str = "the path") -> dict[str, object]:
    """{config field: value} of what the files at a path decide. A file of weights says only what its names do."""
    path, kind = Path(path), format_of(path, field)
    if kind == "hf":
        return huggingface_fields(path)
    if kind == "peft":
        return _peft_fields(path)
    if kind == "nemo":
        return _nemo_fields(path)
    if kind == "orbax":
        return _run_fields(run_of(path))
    return _projector_fields(hf.open_tensors(path))


def _peft_fields(directory: Path) -> dict[str, object]:
    """LLaVA's own adapters have a whole config.json beside them."""
    fields = huggingface_fields(directory) if (directory / "config.json").is_file() else {}
    base = peft.read_config(directory).get("base_model_name_or_path")
    return fields | peft.adapter_fields(directory) | ({LLM_FROM: base} if isinstance(base, str) else {})


def _nemo_fields(path: Path) -> dict[str, object]:
    """With model.peft, which NeMo's own config keeps for every model of a run, only where adapters are inside."""
    file = NemoFile(path)
    fields = {name: value for name, value in nemo_fields(file.config, str(path)).items() if name not in ADAPTERS}
    if not isinstance(section := file.config.get("peft"), dict) or not section.get("peft_scheme"):
        return fields
    with tempfile.TemporaryDirectory(prefix="neva_jax_nemo_") as scratch:
        has_adapters = any(nemo.LORA.search(name) for name in file.tensors(Path(scratch), verify=False))
    return fields | (nemo_adapter_fields(section, str(path)) if has_adapters else {})


def guesses_of(path: str | Path) -> dict[str, object]:
    """{config field: value} of a tower that only its weights or its name speak of; whatever else says a field counts more."""
    path, kind = Path(path), format_of(path)
    if kind == "nemo":
        return _tower_in(_nemo_tower(path))
    if kind == "hf" and hf.read_config(path)["vision"] is None:
        top = hf.read_config(path)["top"]
        name = str(top.get("mm_vision_tower") or "")
        side = next((side for side in (336, 384, 448) if str(side) in name), 224)
        named = {f"{VISION}.hidden_size": top["mm_hidden_size"], f"{VISION}.crop_size": (side, side)} if isinstance(top.get("mm_hidden_size"), int) else {}
        return named | _tower_in(hf.open_tensors(path))
    return {}


def _nemo_tower(path: Path) -> dict:
    """{Hugging Face's canonical name: tensor} of a tower inside a .nemo; of one that cannot be mapped, {}."""
    file = NemoFile(path)
    found = file.tensors(path, verify=False) if file.is_mapped else {}
    return {name.replace(nemo.TOWER, "vision_encoder"): tensor for name, tensor in found.items() if name.startswith(f"{nemo.TOWER}.")}


def _tower_in(tensors: dict) -> dict[str, object]:
    """Sizes of a CLIP tower among canonical tensors. How many heads it has no tensor says: as many as CLIP's towers have, of 64 channels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("vision_encoder.")}
    try:
        hidden, _, patch, _ = shapes["vision_encoder.embeddings.patch_embedding.weight"]
        grid = round((shapes["vision_encoder.embeddings.position_embedding.weight"][0] - 1) ** 0.5)
        ffn = shapes["vision_encoder.encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError):
        return {}
    depth = sum(name.endswith("mlp.fc1.weight") for name in shapes)
    if hidden % 64:
        return {}
    return {
        f"{VISION}.hidden_size": hidden, f"{VISION}.patch_dim": patch, f"{VISION}.crop_size": (grid * patch,) * 2, f"{VISION}.num_layers": depth,
        f"{VISION}.ffn_hidden_size": ffn, f"{VISION}.num_attention_heads": hidden // 64,
    }  # fmt: skip


def _projector_fields(tensors: dict) -> dict[str, object]:
    """The kind of a projector by the names of its Linears: none for one, even numbers for several with GELU between."""
    numbers = sorted({name.split(".")[1] for name in tensors if name.startswith("projector.") and name.count(".") == 2})
    kind = f"mlp{len(numbers)}x_gelu" if numbers else "linear"
    kind = "mlp_downsample" if numbers == ["1", "2", "4"] else kind
    return {"model.mm_cfg.mm_mlp_adapter_type": kind}


def _run_fields(run: Path) -> dict[str, object]:
    try:
        saved = leaves(json.loads((run / "config.json").read_text()))
    except ValueError as error:
        raise UserError(f"{run / 'config.json'}: not valid JSON ({error}); copy it again") from None
    travels = TRAVELS | (ADAPTERS if saved.get("model.peft.peft_scheme") else set())
    fields = {name: coerce(name, value) for name, value in saved.items() if name in travels or name.startswith("model.tokenizer.")}
    base = read_base(run)
    if base.get("whole") and not any(path.startswith("vision_encoder/") for path in base["copied"]):  # converted without its tower, of which it knows little
        fields = {name: value for name, value in fields.items() if name not in NAMELESS}
    return fields


# ---- Hugging Face --------------------------------------------------------------------------------------------------------------------------------------


def huggingface_fields(directory: Path) -> dict[str, object]:
    try:
        return _huggingface_fields(directory)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{directory / 'config.json'}: a field is not of its usual kind ({type(error).__name__}: {error}); copy the file again") from None


def _huggingface_fields(directory: Path) -> dict[str, object]:
    config = hf.read_config(directory)
    top, fields = config["top"], {}
    if config["text"]:
        fields |= _text_fields(config["text"], hf.text_fields(config["text"]))
        if isinstance(ours := top.get(OURS), dict) and isinstance(rows := ours.get("vocab_size"), int) and 0 < rows < fields[VOCAB]:
            fields |= {VOCAB: rows, "model.make_vocab_size_divisible_by": _multiple(rows)}  # the other rows are those that our export added
    if config["vision"]:
        vision = hf.vision_fields(config["vision"])
        fields |= {f"{VISION}.{name}": vision[name] for name in ("hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads")}
        fields |= {f"{VISION}.layernorm_epsilon": vision["layernorm_epsilon"], f"{VISION}.hidden_act": vision["hidden_act"]}
        is_siglip = hf.vision_type(config["vision"]) is SiglipVisionConfig
        fields |= {f"{VISION}.model_type": "siglip_vision_model" if is_siglip else "clip_vision_model", f"{VISION}.class_token_length": int(not is_siglip)}
        fields |= {f"{VISION}.crop_size": (vision["image_size"],) * 2, f"{VISION}.patch_dim": vision["patch_size"]}
    if config["text"] and top.get("text_config") and config["vision"]:
        fields |= _llava_hf(directory, top, is_siglip)
    elif "mm_projector_type" in top or "mm_vision_tower" in top:
        fields |= _llava(directory, top)
    if config["vision"] and (processor := ImageProcessor.from_pretrained(directory)) is not None:
        fields["model.data.image_aspect_ratio"] = processor.aspect
    if (template := template_of(directory)) is not None:
        fields["model.data.conv_template"] = template
        fields["model.mm_cfg.llm.model_type"] = template if not TEMPLATES[template].llava else "v1"
    return fields


def _text_fields(text: dict, theirs: dict) -> dict:
    fields = {f"model.{ours}": theirs[name] for name, ours in LLM_FIELDS.items()}
    if theirs["head_dim"] * theirs["num_attention_heads"] == theirs["hidden_size"]:
        fields["model.kv_channels"] = None
    rope, positions, vocab = theirs["rope"], text.get("max_position_embeddings", 2048), theirs["vocab_size"]
    window = text.get("sliding_window") if "mistral" in text.get("model_type", "") and text.get("use_sliding_window", True) else None
    return fields | _rope_fields(rope) | {
        "model.normalization": "rmsnorm", "model.qkv_bias": False, "model.rotary_percentage": 1.0, "model.openai_gelu": False,
        "model.normalize_attention_scores": True, "model.override_vocab_size": vocab, "model.make_vocab_size_divisible_by": _multiple(vocab),
        "model.init_method_std": text.get("initializer_range", 0.02), "model.encoder_seq_length": min(positions, window or positions),
    }  # fmt: skip


def _multiple(vocab: int) -> int:
    """As NeMo's converter has it."""
    return max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if vocab % n == 0)


def _rope_fields(rope: Rope) -> dict:
    fields = {"model.rotary_base": float(rope.base), "model.scale_positional_embedding": rope.llama3 is not None}
    fields["model.seq_len_interpolation_factor"] = None if rope.interpolation == 1.0 else rope.interpolation
    return fields | dict(zip(SCALINGS, rope.llama3 or (), strict=False))


def _llava_hf(directory: Path, top: dict, is_siglip: bool) -> dict:
    layer, strategy = top.get("vision_feature_layer", -2), top.get("vision_feature_select_strategy", "default")
    wrong = {
        f"vision_feature_layer {layer} (one layer is read here)": not isinstance(layer, int),
        f"vision_feature_select_strategy {strategy} (default or full is expected)": strategy not in ("default", "full"),
        f"projector_hidden_act {top.get('projector_hidden_act')} (gelu is computed here)": top.get("projector_hidden_act", "gelu") != "gelu",
        "multimodal_projector_bias False (the projector has biases here)": top.get("multimodal_projector_bias", True) is not True,
        "vision_feature_select_strategy default (SigLIP has no class token to drop, and lost its first patch)": is_siglip and strategy == "default",
        f"model_type {top.get('model_type')} (llava is read here)": top.get("model_type") != "llava",
    }
    if found := [words for words, is_wrong in wrong.items() if is_wrong]:
        raise UserError(f"{directory / 'config.json'}: {'; '.join(found)}; this model cannot be computed by NeVA")
    return {
        "model.mm_cfg.mm_mlp_adapter_type": "mlp2x_gelu", f"{VISION}.vision_select_layer": layer,
        f"{VISION}.vision_select_feature": "patch" if strategy == "default" or is_siglip else "cls_patch", "model.mm_cfg.use_im_start_end": False,
        "model.data.conv_template": "llava:v1", "model.mm_cfg.llm.model_type": "v1",
    }  # fmt: skip


def _llava(directory: Path, top: dict) -> dict:
    """The original LLaVA's config.json."""
    merged = top.get("mm_patch_merge_type", "flat")
    if merged != "flat" or top.get("image_aspect_ratio") == "anyres":
        raise UserError(f"{directory / 'config.json'}: a LLaVA-NeXT (image_aspect_ratio {top.get('image_aspect_ratio')}), which this version does not compute")
    return {
        "model.mm_cfg.mm_mlp_adapter_type": top.get("mm_projector_type", "linear"), f"{VISION}.vision_select_layer": top.get("mm_vision_select_layer", -2),
        f"{VISION}.vision_select_feature": top.get("mm_vision_select_feature", "patch"), f"{VISION}.from_pretrained": top.get("mm_vision_tower"),
        "model.mm_cfg.use_im_start_end": bool(top.get("mm_use_im_start_end", False)), "model.data.conv_template": "llava:v1",
        "model.mm_cfg.llm.model_type": "v1", "model.data.image_aspect_ratio": top.get("image_aspect_ratio") or "square",
    }  # fmt: skip


def template_of(directory: Path) -> str | None:
    """The conversation template that an export of ours names in its chat template."""
    path = directory / "chat_template.jinja"
    match = TEMPLATE_NAME.search(path.read_text(errors="replace")[:400]) if path.is_file() else None
    return match[1] if match and match[1] in TEMPLATES else None
