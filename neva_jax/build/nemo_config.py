"""A .nemo's model_config.yaml: what it says in the config's words, and a config as one.

What NeMo documents goes by NeMo's names; what it has no field for stands in a section of ours, which NeMo reads past.
"""

import functools
import logging

from ml_collections import ConfigDict

from neva_jax.config import leaves, schema, to_json
from neva_jax.errors import UserError
from neva_jax.fields import ARCHITECTURE, LORA_TARGETS, VISION, paths
from neva_jax.transforms.select import nest

log = logging.getLogger(__name__)

SCALINGS = ("model.rope_scaling_factor", "model.rope_low_freq_factor", "model.rope_high_freq_factor", "model.rope_original_max_position_embeddings")
TRAVELS = ARCHITECTURE | paths("model", "encoder_seq_length init_method_std") | paths("model.mm_cfg.llm", "model_type freeze") | {f"{VISION}.freeze"}
TRAVELS |= paths("model.data", "conv_template image_aspect_ratio sep_image_conv_front")
LLM_FROM, TOWER_FROM = "model.mm_cfg.llm.from_pretrained", f"{VISION}.from_pretrained"
VOCAB = "model.override_vocab_size"
OURS = "neva_jax"  # section of a model_config.yaml that we wrote: fields that NeMo has no name for

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
NEMO_SCALING = (8.0, 1.0, 4.0, 8192)  # of rotary embeddings, in NeMo's code
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


def nemo_adapter_fields(section: dict, where: str) -> dict[str, object]:
    """section: `peft` of the model_config.yaml of a file with adapters."""
    tuning = section.get("lora_tuning") if isinstance(section.get("lora_tuning"), dict) else {}
    scheme, rank, tied = section.get("peft_scheme"), tuning.get("adapter_dim"), tuning.get("weight_tying")
    layers, targets, alpha = tuning.get("layer_selection"), tuning.get("target_modules") or ("attention_qkv",), tuning.get("alpha")
    if scheme != "lora" or not isinstance(rank, int) or not 0 < rank < 2**20 or tied:
        found = "lora_tuning.weight_tying True" if tied else f"peft_scheme {scheme!r} with lora_tuning.adapter_dim {rank!r}"
        raise UserError(f"{where}: model_config.yaml: {found}; this version reads peft_scheme lora with a rank, and adapters of every layer's own")
    wrong = {
        f"alpha {str(alpha)[:20]}": alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < 2**20),
        f"target_modules {targets!r}": not (isinstance(targets, list | tuple) and all(isinstance(one, str) and one in LORA_TARGETS for one in targets)),
        f"layer_selection {layers!r}": layers is not None and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)),
    }
    if wrong := [words for words, is_wrong in wrong.items() if is_wrong]:
        raise UserError(f"{where}: model_config.yaml: lora_tuning.{' and '.join(wrong)} is not as NeMo writes it; copy the file again")
    found = {"adapter_dim": rank, "alpha": float(alpha or rank), "variant": tuning.get("variant") or "nemo"}
    found |= {"target_modules": tuple(targets), "layer_selection": None if layers is None else tuple(layers)}
    return {"model.peft.peft_scheme": "lora"} | {f"model.peft.lora_tuning.{name}": value for name, value in found.items()}


def _nemo_rope(config: dict, where: str) -> dict:
    """NeMo's converter writes scale_positional_embedding True for every Llama; only one of Llama 3.1's scaling has a factor beside it."""
    scaled, factor = config["scale_positional_embedding"], config["seq_len_interpolation_factor"]
    if scaled and factor is None and OURS not in config:
        _warn_of_scaling(where)
        return {"model.scale_positional_embedding": False}
    if not scaled:
        return {}
    scaling = (factor or NEMO_SCALING[0], *NEMO_SCALING[1:])
    return {"model.scale_positional_embedding": True, "model.seq_len_interpolation_factor": None} | dict(zip(SCALINGS, scaling, strict=True))


@functools.cache
def _warn_of_scaling(where: str) -> None:
    log.warning("%s: scale_positional_embedding without a factor, as NeMo's converter writes it for every Llama, is read as no scaling", where)


def _ours(config: dict, where: str) -> dict:
    ours = config.get(OURS) or {}
    if not isinstance(ours, dict) or not ours.keys() <= NAMELESS | {VOCAB, "base"}:
        raise UserError(f"{where}: model_config.yaml: its section {OURS} holds other fields than this program writes; remove it")
    return {name: value for name, value in ours.items() if name != "base"}  # which an adapter was trained beside


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


def nemo_config(config: ConfigDict, *, parts: tuple[str, ...], tokenizer: dict, precision, media_length: int, with_tower: bool) -> dict:
    """model_config.yaml of a model. tokenizer: its section; precision: 32, "bf16" or 16, of the weights; media_length: positions that a picture takes;
    with_tower: whether anything is known of the tower but what NeMo documents."""
    values = {name: value for name, value in leaves(to_json(config)).items() if name.startswith("model.") and name not in NOT_NEMOS}
    values |= {"model.megatron_amp_O2": False, "model.precision": precision, "model.restore_from_path": None}
    values |= {"model.max_position_embeddings": values["model.encoder_seq_length"], "model.data.image_token_len": media_length}
    if config.model.scale_positional_embedding:
        values["model.seq_len_interpolation_factor"] = config.model.rope_scaling_factor
        if tuple(config[name] for name in SCALINGS) != NEMO_SCALING:
            log.warning("NeMo scales rotary embeddings by Llama 3.1's numbers, %s, whatever a model was trained with", NEMO_SCALING)
    values |= {f"model.tokenizer.{name}": value for name, value in tokenizer.items()}
    is_neva = parts != ("llm",)
    ours = {name: values.pop(name) for name in sorted(NAMELESS)}
    if not is_neva:
        values = {name: value for name, value in values.items() if not name.startswith("model.mm_cfg.")}
    if not with_tower:
        ours = {name: ours[name] for name in SCALINGS}
    tree = nest({name.removeprefix("model.").replace(".", "/"): value for name, value in values.items()})
    return tree | {OURS: ours, "target": TARGETS["neva" if is_neva else "llm"], "nemo_version": "2.0.0"}
