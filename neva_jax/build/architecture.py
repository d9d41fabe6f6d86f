"""What a model's own files say of it, in the config's words: Hugging Face's config.json, a .nemo's model_config.yaml, a run's config.json.

`fields_of(path)` is {config field: value}; a field that the files do not speak of is not in it. Given up: what trained the model (optimizer, data, sizes of
batches), which no weight depends on.
"""

import functools
import json
import logging
import re
from pathlib import Path

from ml_collections import ConfigDict

from neva_jax.config import coerce, leaves, schema, to_json
from neva_jax.convert import hf
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.image import ImageProcessor
from neva_jax.errors import UserError
from neva_jax.fields import ARCHITECTURE, VISION, paths
from neva_jax.hub import format_of, run_of
from neva_jax.layers.rope import Rope
from neva_jax.models.siglip import SiglipVisionConfig
from neva_jax.transforms.select import nest

log = logging.getLogger(__name__)

LLM_FIELDS = {  # text_fields' word: config field
    "num_layers": "num_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "ffn_hidden_size", "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups", "head_dim": "kv_channels", "layernorm_epsilon": "layernorm_epsilon", "activation": "activation",
    "tied": "share_embeddings_and_output_weights", "bias": "bias",
}  # fmt: skip
SCALINGS = ("model.rope_scaling_factor", "model.rope_low_freq_factor", "model.rope_high_freq_factor", "model.rope_original_max_position_embeddings")
TRAVELS = ARCHITECTURE | paths("model", "encoder_seq_length init_method_std") | paths("model.mm_cfg.llm", "model_type freeze") | {f"{VISION}.freeze"}
TRAVELS |= paths("model.data", "conv_template image_aspect_ratio sep_image_conv_front")
LLM_FROM, TOWER_FROM = "model.mm_cfg.llm.from_pretrained", f"{VISION}.from_pretrained"
VOCAB = "model.override_vocab_size"
OURS = "neva_jax"  # section of a model_config.yaml that we wrote: fields that NeMo has no name for
TEMPLATE_NAME = re.compile(r'The prompts of the template "([\w:]+)"')  # in a chat template that we wrote


def fields_of(path: str | Path, field: str = "the path") -> dict[str, object]:
    """{config field: value} of what the files at a path decide. {} for a file of weights, which says nothing."""
    path, kind = Path(path), format_of(path, field)
    if kind == "hf":
        return huggingface_fields(path)
    if kind == "nemo":
        return nemo_fields(NemoFile(path).config, str(path))
    if kind == "orbax":
        saved = leaves(json.loads((run_of(path) / "config.json").read_text()))
        return {name: coerce(name, value) for name, value in saved.items() if name in TRAVELS or name.startswith("model.tokenizer.")}
    return {}


# ---- Hugging Face --------------------------------------------------------------------------------------------------------------------------------------


def huggingface_fields(directory: Path) -> dict[str, object]:
    config = hf.read_config(directory)
    top, fields = config["top"], {}
    if config["text"]:
        fields |= _text_fields(config["text"], hf.text_fields(config["text"]))
        if isinstance(ours := top.get(OURS), dict) and isinstance(rows := ours.get("vocab_size"), int) and 0 < rows < fields[VOCAB]:
            fields[VOCAB] = rows  # the others are those that our export added
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
    multiple = max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if vocab % n == 0)  # as NeMo's converter has it
    window = text.get("sliding_window") if "mistral" in text.get("model_type", "") and text.get("use_sliding_window", True) else None
    return fields | _rope_fields(rope) | {
        "model.normalization": "rmsnorm", "model.qkv_bias": False, "model.rotary_percentage": 1.0, "model.openai_gelu": False,
        "model.normalize_attention_scores": True, "model.override_vocab_size": vocab, "model.make_vocab_size_divisible_by": multiple,
        "model.init_method_std": text.get("initializer_range", 0.02), "model.encoder_seq_length": min(positions, window or positions),
    }  # fmt: skip


def _rope_fields(rope: Rope) -> dict:
    fields = {"model.rotary_base": float(rope.base), "model.scale_positional_embedding": rope.llama3 is not None}
    fields["model.seq_len_interpolation_factor"] = None if rope.interpolation == 1.0 else rope.interpolation
    return fields | dict(zip(SCALINGS, rope.llama3 or (), strict=False))


def _llava_hf(directory: Path, top: dict, is_siglip: bool) -> dict:
    layer, strategy = top.get("vision_feature_layer", -2), top.get("vision_feature_select_strategy", "default")
    wrong = {
        f"vision_feature_layer {layer} (one layer is read here)": not isinstance(layer, int),
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


# ---- NeMo ------------------------------------------------------------------------------------------------------------------------------------------------

NEMO_DEFAULTS = {  # what NeMo's code takes where a model_config.yaml says nothing
    "normalization": "layernorm", "layernorm_epsilon": 1e-5, "activation": "gelu", "bias": True, "qkv_bias": False, "rotary_percentage": 1.0,
    "rotary_base": 10000.0, "openai_gelu": False, "normalize_attention_scores": True, "share_embeddings_and_output_weights": True, "kv_channels": None,
    "num_query_groups": None, "seq_len_interpolation_factor": None, "make_vocab_size_divisible_by": 128, "init_method_std": 0.02,
    "position_embedding_type": "learned_absolute", "encoder_seq_length": 512, "scale_positional_embedding": False,
}  # fmt: skip
NEMO_FIXED = {  # field: the only value that is computed here
    "position_embedding_type": "rope", "headscale": False, "transformer_block_type": "pre_ln", "attention_type": "multihead", "num_moe_experts": None,
    "apply_embedding_scaling": False, "rotary_interleaved": False, "megatron_legacy": False,
}  # fmt: skip
MISSING = object()


def nemo_fields(config: dict, where: str) -> dict[str, object]:
    """config: a model_config.yaml, parsed."""
    found = NEMO_DEFAULTS | config
    wrong = [f"{name} {found[name]!r} (here {value!r})" for name, value in NEMO_FIXED.items() if name in found and found[name] not in (value, None)]
    if wrong:
        raise UserError(f"{where}: model_config.yaml: {'; '.join(wrong)}; such a model is not computed by this version")
    fields = {}
    for name in sorted(TRAVELS | {LLM_FROM, TOWER_FROM}):
        value = _at(found, name.removeprefix("model.").split("."))
        if value is not MISSING:
            fields[name] = tuple(value) if isinstance(value, list) else value
    if (older := _at(config, ["mm_cfg", "model_type"])) is not MISSING:  # so written by NeMo's converter of LLaVA, which leaves an example's in the newer field
        fields["model.mm_cfg.llm.model_type"] = older
    sized = [name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads") if not isinstance(config.get(name), int)]
    if sized:
        raise UserError(f"{where}: model_config.yaml says no {', '.join(sized)}; it is not of a language model or NeVA")
    fields |= _nemo_rope(found, where) | _ours(config, where)
    for name in [name for name, value in fields.items() if value is None and not schema()[name].nullable]:
        del fields[name]
    return fields


def _nemo_rope(config: dict, where: str) -> dict:
    """NeMo's converter writes scale_positional_embedding True for every Llama; only one of Llama 3.1's scaling has a factor beside it."""
    scaled, factor = config["scale_positional_embedding"], config["seq_len_interpolation_factor"]
    if scaled and factor is None and OURS not in config:
        _warn_of_scaling(where)
        return {"model.scale_positional_embedding": False}
    if not scaled:
        return {}
    return {"model.scale_positional_embedding": True, "model.seq_len_interpolation_factor": None} | dict(zip(SCALINGS, (factor, 1.0, 4.0, 8192), strict=True))


@functools.cache
def _warn_of_scaling(where: str) -> None:
    log.warning("%s: scale_positional_embedding without a factor, as NeMo's converter writes it for every Llama, is read as no scaling", where)


def _ours(config: dict, where: str) -> dict:
    ours = config.get(OURS) or {}
    if not isinstance(ours, dict) or not ours.keys() <= NAMELESS | {VOCAB}:
        raise UserError(f"{where}: model_config.yaml: its section {OURS} holds other fields than this program writes; remove it")
    return ours


def _at(tree, keys: list[str]):
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return MISSING
        tree = tree[key]
    return tree


# ---- and back --------------------------------------------------------------------------------------------------------------------------------------------

TARGETS = {
    "llm": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "neva": "nemo.collections.multimodal.models.multimodal_llm.neva.neva_model.MegatronNevaModel",
}
NOT_NEMOS = paths(  # fields of ours, which no file of NeMo's has
    "model",
    "fsdp_parallel_size pipeline_round_size loss_reduction trainable fp8_frozen_weights fp8_scaling mm_cfg.allow_random_frozen optim.grad_accum_dtype "
    "peft.projector_lr_factor",
) | paths(
    "model.data",
    "compat validation on_bad_image max_bad_images buckets length_grouping cache_dir pixel_cache_gib max_media apply_exif_rotation",
)  # fmt: skip
NAMELESS = set(SCALINGS) | paths(VISION, "num_layers num_attention_heads ffn_hidden_size layernorm_epsilon hidden_act")  # kept in a section of ours


def nemo_config(config: ConfigDict, *, parts: tuple[str, ...], tokenizer_member: str | None, precision) -> dict:
    """model_config.yaml of a model. tokenizer_member: of the sentencepiece model in the .nemo; precision: 32, "bf16" or 16, of its weights."""
    values = {name: value for name, value in leaves(to_json(config)).items() if name.startswith("model.") and name not in NOT_NEMOS}
    values |= {"model.megatron_amp_O2": False, "model.precision": precision, "model.restore_from_path": None}
    values["model.max_position_embeddings"] = values["model.encoder_seq_length"]
    if config.model.scale_positional_embedding:
        values["model.seq_len_interpolation_factor"] = config.model.rope_scaling_factor
    if tokenizer_member:
        values |= {"model.tokenizer.library": "sentencepiece", "model.tokenizer.type": None, "model.tokenizer.model": f"nemo:{tokenizer_member}"}
    is_neva = parts != ("llm",)
    ours = {name: values.pop(name) for name in sorted(NAMELESS)}
    if not is_neva:
        values = {name: value for name, value in values.items() if not name.startswith("model.mm_cfg.")}
        ours = {name: ours[name] for name in SCALINGS}
    tree = nest({name.removeprefix("model.").replace(".", "/"): value for name, value in values.items()})
    return tree | {OURS: ours, "target": TARGETS["neva" if is_neva else "llm"], "nemo_version": "2.0.0"}
