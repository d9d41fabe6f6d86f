"""Hugging Face: the tables of Llama, the CLIP and SigLIP towers and the LLaVA projector, and what their config.json says in our words.

The same tensors go by many prefixes (llava-hf classic, transformers 4.52+, 5.x, original LLaVA, a tower alone, in a full CLIP or SigLIP): `canonical` strips
them all to `llm.`, `vision_encoder.`, `projector.`, which is what the tables speak of.
"""

import json
import logging
import re
from pathlib import Path

from neva_jax.convert import weights
from neva_jax.convert.keymap import COPY, TRANSPOSE, KeyMap, Rule, chain, pad_rows, patch_conv
from neva_jax.errors import UserError
from neva_jax.layers.mlp import ACTIVATIONS
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import HIDDEN_ACTS, ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.projector import linear_names
from neva_jax.models.siglip import SiglipVisionConfig

log = logging.getLogger(__name__)

PREFIXES = (  # (pattern, canonical), the first that matches the start of a name counts
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", "vision_encoder."),
    (r"(?:vision_model\.)?(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", "vision_encoder."),
    (r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.", "projector."),
    (r"(?:model\.)?(?=image_newline$)", "projector."),
    (r"layers\.(?=\d+\.(?:weight|bias)$)", "projector."),  # VILA's projector alone
    (r"(?:language_model\.)?(?=lm_head\.)", "llm."),
    (r"(?:model\.)?(?:language_model\.)?(?:model\.)?(?=embed_tokens\.|layers\.|norm\.)", "llm."),
)
IGNORED = re.compile(r"(position_ids|rotary_emb\.inv_freq|^logit_(scale|bias)|^text_model\..*|^(text|visual)_projection\.weight)$")
POOLING = re.compile(r"(^|\.)head\.(probe|attention\.in_proj_(weight|bias)|(attention\.out_proj|layernorm|mlp\.fc[12])\.(weight|bias))$")  # SigLIP's head


def canonical(name: str) -> str | None:
    """A tensor's name without the prefixes of its layout; None for what carries no weight of ours; unknown names stay as they are."""
    if IGNORED.search(name) or POOLING.search(name):
        return None
    for pattern, prefix in PREFIXES:
        if match := re.match(pattern, name):
            return prefix + name[match.end() :]
    return name


def open_tensors(path: str | Path) -> dict:
    """{canonical name: tensor} of a Hugging Face directory, or of one file, such as LLaVA's mm_projector.bin."""
    tensors, found = {}, weights.open_tensors(path)
    if pooling := sum(POOLING.search(name) is not None for name in found):
        log.info(f"{path}: the {pooling} tensors of the tower's pooling head are left out; a LLaVA does not read them")
    for name, tensor in found.items():
        if known := canonical(name):
            if known in tensors:
                raise UserError(f"{path}: {tensors[known].name} and {name} are two spellings of one weight; remove the stale one")
            tensors[known] = tensor
    return tensors


# ---- tables ----------------------------------------------------------------------------------------------------------------------------------------


def _linear(theirs: str, ours: str, bias: bool) -> list[Rule]:
    rules = [Rule(f"{theirs}.weight", f"{ours}/kernel", TRANSPOSE)]
    return rules + [Rule(f"{theirs}.bias", f"{ours}/bias")] if bias else rules


def _norm(theirs: str, ours: str, bias: bool) -> list[Rule]:
    rules = [Rule(f"{theirs}.weight", f"{ours}/scale")]
    return rules + [Rule(f"{theirs}.bias", f"{ours}/bias")] if bias else rules


def llama_rules(config: LlamaConfig) -> list[Rule]:
    layer, ours, norm_bias = "llm.layers.{i}", "llm/layers", config.normalization != "rmsnorm"
    table = pad_rows(config.vocab_size, config.padded_vocab_size)
    rules = [Rule("llm.embed_tokens.weight", "llm/embed_tokens/embedding", table), *_norm("llm.norm", "llm/norm", norm_bias)]
    for name in ("q_proj", "k_proj", "v_proj"):
        rules += _linear(f"{layer}.self_attn.{name}", f"{ours}/self_attn/{name}", config.bias or config.qkv_bias)
    rules += _linear(f"{layer}.self_attn.o_proj", f"{ours}/self_attn/o_proj", config.bias)
    for name in ("gate_proj", "up_proj", "down_proj") if ACTIVATIONS[config.activation][1] else ("up_proj", "down_proj"):
        rules += _linear(f"{layer}.mlp.{name}", f"{ours}/mlp/{name}", config.bias)
    for name in ("input_layernorm", "post_attention_layernorm"):
        rules += _norm(f"{layer}.{name}", f"{ours}/{name}", norm_bias)
    return rules if config.tied else [*rules, Rule("llm.lm_head.weight", "llm/lm_head/kernel", chain(table, TRANSPOSE))]


def clip_rules(config: ClipVisionConfig) -> list[Rule]:
    class_token = Rule("vision_encoder.embeddings.class_embedding", "vision_encoder/class_embedding")
    return [class_token, *_norm("vision_encoder.pre_layrnorm", "vision_encoder/pre_layrnorm", True), *_tower_rules(config)]


def siglip_rules(config: SiglipVisionConfig) -> list[Rule]:
    return [Rule("vision_encoder.embeddings.patch_embedding.bias", "vision_encoder/patch_embedding/bias"), *_tower_rules(config)]


def vision_rules(config: ClipVisionConfig | SiglipVisionConfig) -> list[Rule]:
    return siglip_rules(config) if isinstance(config, SiglipVisionConfig) else clip_rules(config)


def _tower_rules(config: ClipVisionConfig | SiglipVisionConfig) -> list[Rule]:
    """What CLIP and SigLIP share."""
    embed, layer, ours = "vision_encoder.embeddings", "vision_encoder.encoder.layers.{i}", "vision_encoder"
    rules = [
        Rule(f"{embed}.patch_embedding.weight", f"{ours}/patch_embedding/kernel", patch_conv(config.patch_size)),
        Rule(f"{embed}.position_embedding.weight", f"{ours}/position_embedding/embedding", COPY),
        *_norm("vision_encoder.post_layernorm", f"{ours}/post_layernorm", True),
    ]
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rules += _linear(f"{layer}.self_attn.{name}", f"{ours}/layers/self_attn/{name}", True)
    for theirs, name in (("fc1", "up_proj"), ("fc2", "down_proj")):
        rules += _linear(f"{layer}.mlp.{theirs}", f"{ours}/layers/mlp/{name}", True)
    for name in ("layer_norm1", "layer_norm2"):
        rules += _norm(f"{layer}.{name}", f"{ours}/layers/{name}", True)
    return rules


def projector_rules(kind: str, names) -> list[Rule]:
    """names: what the file holds; llava-hf says linear_1 and linear_2 where LLaVA says 0 and 2, and LLaVA's linear has no name at all."""
    rules = []
    for i, ours in enumerate(linear_names(kind)):
        choices = [f"projector.linear_{i + 1}", f"projector.{ours}", "projector"]
        theirs = next((choice for choice in choices if f"{choice}.weight" in names), choices[0])
        rules += _linear(theirs, f"projector/{ours}", True)
    return rules + (_norm("projector.1", "projector/1", True) if kind.startswith("mlp_downsample") else [])


def key_map(model_config, names=()) -> KeyMap:
    """model_config: NevaConfig; a part that is None has no rules, and a projector needs both others. names: their canonical names, which decide between
    spellings."""
    llm, vision = model_config.llm, model_config.vision
    rules = (llama_rules(llm) if llm else []) + (vision_rules(vision) if vision else [])
    rules += projector_rules(model_config.projector, names) if llm and vision else []
    return KeyMap(rules, {part: config.num_layers for part, config in (("llm", llm), ("vision_encoder", vision)) if config})


# ---- config.json -----------------------------------------------------------------------------------------------------------------------------------

MISTRAL_DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8}  # where transformers' differ from Llama's
TOWERS = {"clip": ClipVisionConfig, "clip_vision_model": ClipVisionConfig, "siglip": SiglipVisionConfig, "siglip_vision_model": SiglipVisionConfig}
LLM_ACTS = {"silu": "fast-swiglu", "swish": "fast-swiglu", "gelu": "fast-geglu", "relu": "fast-reglu"}  # hidden_act, gated -> NeMo's name
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LLAVA_VISION = {  # transformers' LlavaConfig without a vision_config: CLIP ViT-L/14 at 336 pixels
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def read_config(directory: str | Path) -> dict:
    """config.json of a Hugging Face directory, split as {"text": ..., "vision": ..., "top": ...}; absent parts are None.

    An original LLaVA writes the language model's keys at the top and keeps its tower elsewhere.
    """
    path = Path(directory) / "config.json"
    if not path.exists():
        raise UserError(f"{directory}: no config.json here; expected a Hugging Face model directory")
    try:
        top = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(top, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(top).__name__}")
    text, vision = top.get("text_config"), top.get("vision_config")
    if (kind := top.get("model_type")) in TOWERS:  # a tower alone, or the vision half of a whole CLIP or SigLIP, which may leave its type out
        return {"top": top, "text": None, "vision": top if kind.endswith("_vision_model") else {"model_type": f"{kind}_vision_model"} | (vision or {})}
    return {"top": top, "text": text or top, "vision": vision or (LLAVA_VISION if text else None)}


def vision_type(vision: dict) -> type[ClipVisionConfig] | type[SiglipVisionConfig]:
    """The class whose words `vision_fields` speaks."""
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise UserError(f"vision tower of type {kind!r}; this version reads {' and '.join(name for name in TOWERS if name.endswith('_vision_model'))}")
    return TOWERS[kind]


def vision_of(vision: dict, **extra) -> ClipVisionConfig | SiglipVisionConfig:
    """The tower of a vision config. extra: what such a file does not speak of, as select_layer, or what replaces it."""
    return vision_type(vision)(**vision_fields(vision) | extra)


def vision_fields(vision: dict) -> dict:
    """A CLIP or SigLIP vision config in the words of its `vision_type`; keys that an abbreviated file leaves out get transformers' defaults."""
    kind, get = vision_type(vision), vision.get
    if get("hidden_act", kind.hidden_act) not in HIDDEN_ACTS:
        raise UserError(f"vision tower with hidden_act {vision['hidden_act']!r}; this version computes {', '.join(HIDDEN_ACTS)}")
    if get("num_channels", 3) != 3:
        raise UserError(f"vision tower with num_channels {vision['num_channels']}; this version reads pictures of 3 channels")
    return {
        "hidden_size": get("hidden_size", 768), "ffn_hidden_size": get("intermediate_size", 3072), "num_layers": get("num_hidden_layers", 12),
        "num_attention_heads": get("num_attention_heads", 12), "image_size": _side(vision, "image_size", 224),
        "patch_size": _side(vision, "patch_size", 16 if kind is SiglipVisionConfig else 32), "hidden_act": get("hidden_act", kind.hidden_act),
        "layernorm_epsilon": get("layer_norm_eps", kind.layernorm_epsilon),
    }  # fmt: skip


def _side(vision: dict, name: str, default: int) -> int:
    value = vision.get(name, default)
    if isinstance(value, list) and (len(value) != 2 or value[0] != value[1]):
        raise UserError(f"vision tower with {name} {value}; this version computes squares")
    return value[0] if isinstance(value, list) else value


def text_fields(text: dict) -> dict:
    """A Llama or Mistral config in LlamaConfig's words; transformers 5 nests what 4 had as rope_theta and rope_scaling."""
    kind = text.get("model_type", "llama")
    if kind not in ("llama", "llava", "llava_llama", "mistral", "llava_mistral"):
        raise UserError(f"language model of type {kind!r}; this version reads llama and mistral")
    get = ((MISTRAL_DEFAULTS if "mistral" in kind else {}) | text).get
    if get("hidden_act", "silu") not in LLM_ACTS:
        raise UserError(f"language model with hidden_act {get('hidden_act')!r}; this version computes {', '.join(LLM_ACTS)}")
    if get("attention_bias", False) != get("mlp_bias", False):
        raise UserError(f"attention_bias {get('attention_bias')} with mlp_bias {get('mlp_bias')}: this version has biases on all projections or on none")
    hidden, heads = get("hidden_size", 4096), get("num_attention_heads", 32)
    head_dim = get("head_dim") or hidden // heads
    return {
        "vocab_size": get("vocab_size", 32000), "num_layers": get("num_hidden_layers", 32), "hidden_size": hidden,
        "ffn_hidden_size": get("intermediate_size", 11008), "num_attention_heads": heads, "num_query_groups": get("num_key_value_heads") or heads,
        "head_dim": head_dim, "rope": rope_of(text, head_dim), "layernorm_epsilon": get("rms_norm_eps", 1e-6),
        "activation": LLM_ACTS[get("hidden_act", "silu")], "bias": get("attention_bias", False), "tied": bool(get("tie_word_embeddings", False)),
    }  # fmt: skip


def rope_of(text: dict, head_dim: int) -> Rope:
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    base = scaling.get("rope_theta") or text.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_FIELDS:
        raise UserError(f"rope_scaling of type {kind!r}; this version computes {', '.join(ROPE_FIELDS)}")
    if missing := [name for name in ROPE_FIELDS[kind] if name not in scaling]:
        raise UserError(f"rope_scaling of type {kind!r} without {' and '.join(missing)}; the config.json is not whole")
    numbers = tuple(scaling[name] for name in ROPE_FIELDS[kind])
    return Rope(head_dim, base, interpolation=numbers[0] if kind == "linear" else 1.0, llama3=numbers if kind == "llama3" else None)


# ---- and back ----------------------------------------------------------------------------------------------------------------------------------------

CLASSIC = (  # (canonical, llava-hf's); what a language model and a tower are called by themselves
    ("llm.lm_head.", "language_model.lm_head."), ("llm.", "language_model.model."), ("vision_encoder.", "vision_tower.vision_model."),
    ("projector.", "multi_modal_projector."),
)  # fmt: skip
ALONE = (("llm.lm_head.", "lm_head."), ("llm.", "model."), ("vision_encoder.", "vision_model."))
HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def spelt(name: str, alone: bool) -> str:
    """A canonical name as files have it that every program reads: llava-hf's classic layout, or a language model's or tower's own."""
    return next(theirs + name.removeprefix(ours) for ours, theirs in (ALONE if alone else CLASSIC) if name.startswith(ours))


def text_config(llm: LlamaConfig, kind: str, vocab_size: int, max_positions: int) -> dict:
    """config.json of a language model. kind: "llama" or "mistral". Raises UserError for what transformers' Llama cannot compute."""
    act = HIDDEN_ACT.get(llm.activation.removeprefix("fast-"))
    misfits = {
        f"model type {kind!r} (expected llama or mistral)": kind not in ("llama", "mistral"),
        f"normalization {llm.normalization} (expected rmsnorm)": llm.normalization != "rmsnorm",
        f"activation {llm.activation} (expected fast-swiglu, fast-geglu or fast-reglu)": act is None,
        "openai_gelu (expected False)": llm.openai_gelu,
        f"rotary_percentage {llm.rope.percentage} (expected 1.0)": llm.rope.percentage != 1.0,
        "seq_len_interpolation_factor beside scale_positional_embedding (expected one of them)": llm.rope.interpolation != 1.0 and llm.rope.llama3,
        f"an attention scale of {llm.attention_scale} (expected normalize_attention_scores True)": llm.attention_scale is not None,
        "qkv_bias without bias (expected biases on all projections or on none)": llm.qkv_bias and not llm.bias,
        "bias in a mistral (expected none; or export it as llama)": llm.bias and kind == "mistral",
    }
    if found := [words for words, misfit in misfits.items() if misfit]:
        raise UserError(f"the language model is no Llama that transformers could compute, by its {'; '.join(found)}; export it as .nemo instead")
    biases = {"attention_bias": llm.bias, "mlp_bias": llm.bias} if kind == "llama" else {"sliding_window": None}
    return {
        "architectures": ["MistralForCausalLM" if kind == "mistral" else "LlamaForCausalLM"], "model_type": kind, "vocab_size": vocab_size,
        "hidden_size": llm.hidden_size, "intermediate_size": llm.ffn_hidden_size, "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads, "num_key_value_heads": llm.num_query_groups, "head_dim": llm.head_dim, "hidden_act": act,
        "rms_norm_eps": llm.layernorm_epsilon, "max_position_embeddings": max_positions, "initializer_range": llm.init_std,
        "tie_word_embeddings": llm.tied, **biases, **rope_config(llm.rope),
    }  # fmt: skip


def rope_config(rope: Rope) -> dict:
    """rope_theta and rope_scaling for transformers 4, rope_parameters for 5."""
    kind = "llama3" if rope.llama3 else "linear" if rope.interpolation != 1.0 else "default"
    scaling = {"rope_type": kind, **dict(zip(ROPE_FIELDS[kind], rope.llama3 or (rope.interpolation,), strict=False))}
    older = None if kind == "default" else scaling | ({"type": kind} if kind == "linear" else {})
    return {"rope_theta": rope.base, "rope_scaling": older, "rope_parameters": scaling | {"rope_theta": rope.base}}


def vision_config(vision: ClipVisionConfig | SiglipVisionConfig) -> dict:
    """config.json of a tower."""
    siglip = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "vision_use_head": False}
    kind = siglip if isinstance(vision, SiglipVisionConfig) else {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return kind | {
        "hidden_size": vision.hidden_size, "intermediate_size": vision.ffn_hidden_size, "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads, "image_size": vision.image_size, "patch_size": vision.patch_size, "hidden_act": vision.hidden_act,
        "layer_norm_eps": vision.layernorm_epsilon,
    }  # fmt: skip
