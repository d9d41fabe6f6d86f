"""NeMo: the tables of its GPT, CLIP vision tower and projector, in megatron-core's names; how the legacy names differ; and how ranks share them.

`canonical` brings every spelling (legacy, without Transformer Engine, with O2's prefix, NeVA's nesting) to the names that the tables speak of; `spelt` writes
them in a format's own. NeVA keeps its tower and projector under the word embedding.
"""

import re

from neva_jax.convert.hf import POOLING, vision_rules
from neva_jax.convert.keymap import FUSED_GLU, TRANSPOSE, KeyMap, Op, Rule, chain, fused_qkv, pad_rows
from neva_jax.layers.mlp import ACTIVATIONS
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.projector import linear_names
from neva_jax.transforms.lora import Lora, adapters_of

EMBEDDING = "embedding.word_embeddings"
ADAPTER = f"{EMBEDDING}.adapter_layer.mm_projector_adapter.mm_projector"
TOWER = f"{EMBEDDING}.vision_encoder.vision_model"
KEY_FORMATS = ("mcore", "legacy")

# (canonical, legacy) pieces of a name behind "model."
LEGACY = (
    ("decoder.layers.{i}.self_attention.linear_qkv.layer_norm_", "language_model.encoder.layers.{i}.input_layernorm."),
    ("decoder.layers.{i}.mlp.linear_fc1.layer_norm_", "language_model.encoder.layers.{i}.post_attention_layernorm."),
    ("decoder.layers.{i}.self_attention.linear_qkv.", "language_model.encoder.layers.{i}.self_attention.query_key_value."),
    ("decoder.layers.{i}.self_attention.linear_proj.", "language_model.encoder.layers.{i}.self_attention.dense."),
    ("decoder.layers.{i}.mlp.linear_fc1.", "language_model.encoder.layers.{i}.mlp.dense_h_to_4h."),
    ("decoder.layers.{i}.mlp.linear_fc2.", "language_model.encoder.layers.{i}.mlp.dense_4h_to_h."),
    ("decoder.layers.{i}.self_attention.adapter_layer.", "language_model.encoder.layers.{i}.self_attention.adapter_layer."),
    ("decoder.layers.{i}.mlp.adapter_layer.", "language_model.encoder.layers.{i}.mlp.adapter_layer."),
    ("decoder.final_layernorm.", "language_model.encoder.final_layernorm."),
    ("output_layer.", "language_model.output_layer."),
    ("embedding.word_embeddings.", "language_model.embedding.word_embeddings."),
)
OTHER = (  # further spellings that are read: megatron-core without Transformer Engine, and NeVA's projector of 2023
    ("decoder.layers.{i}.self_attention.linear_qkv.layer_norm_", "decoder.layers.{i}.input_layernorm."),
    ("decoder.layers.{i}.mlp.linear_fc1.layer_norm_", "decoder.layers.{i}.pre_mlp_layernorm."),
    (f"{ADAPTER}.", f"{EMBEDDING}.adapter_layer.mm_linear_adapter.linear."),
)
# Buffers, and the copy of the table that a legacy tied model keeps on its last pipeline stage.
IGNORED = re.compile(r"(\._extra_state|rotary_pos_emb\.inv_freq|vision_model\.embeddings\.position_ids|^(model\.|module\.)+word_embeddings\.weight)$")


def _reader(canonical: str, theirs: str) -> tuple[re.Pattern, str]:
    """A table's entry as (pattern at the start of a name of theirs, replacement)."""
    return re.compile(re.escape(theirs).replace(r"\{i\}", r"(\d+)")), canonical.replace("{i}", r"\1")


READERS = [_reader(ours, theirs) for ours, theirs in LEGACY]
READERS_AFTER = [_reader(ours, theirs) for ours, theirs in OTHER]
WRITERS = [_reader(theirs, ours) for ours, theirs in LEGACY]


def canonical(name: str) -> str | None:
    """A name in a .nemo -> the tables' name; None for what carries no weight. Unknown names stay as they are."""
    if IGNORED.search(name) or POOLING.search(name):
        return None
    name = re.sub(r"^(?:model\.|module\.)+", "", name.replace("._orig_mod", ""))  # O2's wrapper, torch.compile's wrapper
    for readers in (READERS, READERS_AFTER):
        for pattern, replacement in readers:
            if pattern.match(name):
                name = pattern.sub(replacement, name, count=1)
                break
    return name


def spelt(name: str, key_format: str) -> str:
    """The tables' name -> the name in a .nemo."""
    if key_format == "legacy":
        pattern, replacement = next((entry for entry in WRITERS if entry[0].match(name)), (None, None))
        name = pattern.sub(replacement, name, count=1) if pattern else name
    return f"model.{name}"


# ---- tables ------------------------------------------------------------------------------------------------------------------------------------------


def llama_rules(config: LlamaConfig) -> list[Rule]:
    layer, ours = "decoder.layers.{i}", "llm/layers"
    norm_bias = config.normalization != "rmsnorm"
    table = pad_rows(config.vocab_size, config.padded_vocab_size)
    qkv = fused_qkv(config.num_query_groups, config.num_attention_heads // config.num_query_groups, config.head_dim)
    gated = ACTIVATIONS[config.activation][1]

    def linear(theirs: str, paths: tuple[str, ...] | str, op: Op, bias: bool) -> list[Rule]:
        def named(end):
            return f"{ours}/{paths}/{end}" if isinstance(paths, str) else tuple(f"{ours}/{path}/{end}" for path in paths)

        rules = [Rule(f"{layer}.{theirs}.weight", named("kernel"), op)]
        return rules + [Rule(f"{layer}.{theirs}.bias", named("bias"), op)] if bias else rules

    def norm(theirs: str, path: str) -> list[Rule]:
        rules = [Rule(f"{theirs}weight", f"{path}/scale")]
        return rules + [Rule(f"{theirs}bias", f"{path}/bias")] if norm_bias else rules

    rules = [Rule(f"{EMBEDDING}.weight", "llm/embed_tokens/embedding", table), *norm("decoder.final_layernorm.", "llm/norm")]
    rules += norm(f"{layer}.self_attention.linear_qkv.layer_norm_", f"{ours}/input_layernorm")
    rules += norm(f"{layer}.mlp.linear_fc1.layer_norm_", f"{ours}/post_attention_layernorm")
    rules += linear("self_attention.linear_qkv", tuple(f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj")), qkv, config.bias or config.qkv_bias)
    rules += linear("self_attention.linear_proj", "self_attn/o_proj", TRANSPOSE, config.bias)
    rules += linear("mlp.linear_fc1", ("mlp/gate_proj", "mlp/up_proj") if gated else "mlp/up_proj", FUSED_GLU if gated else TRANSPOSE, config.bias)
    rules += linear("mlp.linear_fc2", "mlp/down_proj", TRANSPOSE, config.bias)
    return rules if config.tied else [*rules, Rule("output_layer.weight", "llm/lm_head/kernel", chain(table, TRANSPOSE))]


def projector_rules(kind: str) -> list[Rule]:
    """linear has no number; mlp2x_gelu has 0 and 2; mlp_downsample a norm 1 and 2 and 4."""
    rules = []
    for ours in linear_names(kind):
        theirs = ADAPTER if kind == "linear" else f"{ADAPTER}.{ours}"
        rules += [Rule(f"{theirs}.weight", f"projector/{ours}/kernel", TRANSPOSE), Rule(f"{theirs}.bias", f"projector/{ours}/bias")]
    if kind.startswith("mlp_downsample"):
        rules += [Rule(f"{ADAPTER}.1.weight", "projector/1/scale"), Rule(f"{ADAPTER}.1.bias", "projector/1/bias")]
    return rules


def tower_rules(config) -> list[Rule]:
    """Hugging Face's table under NeVA's prefix."""
    return [Rule(rule.theirs.replace("vision_encoder.", f"{TOWER}.", 1), rule.ours, rule.op) for rule in vision_rules(config)]


def key_map(model_config) -> KeyMap:
    """model_config: NevaConfig; a part that is None has no rules, and a projector needs both others."""
    llm, vision = model_config.llm, model_config.vision
    rules = (llama_rules(llm) if llm else []) + (tower_rules(vision) if vision else [])
    rules += projector_rules(model_config.projector) if llm and vision else []
    return KeyMap(rules, {part: config.num_layers for part, config in (("llm", llm), ("vision_encoder", vision)) if config})


LORA = re.compile(r"\.adapter_layer\.lora_\w+_adapter\.")  # in the name of an adapter's weight


def lora_rules(config: LlamaConfig, lora: Lora, kernels) -> list[Rule]:
    """kernels: paths of a model's kernels. Projections that share an A are NeMo's fused adapters, whose B has the layout of the fused weight; those that have
    one each are its canonical adapters, of which it knows q, k and v, and gate and up, only together."""
    qkv = fused_qkv(config.num_query_groups, config.num_attention_heads // config.num_query_groups, config.head_dim)
    attention, mlp = "self_attention.adapter_layer.lora", "mlp.adapter_layer.lora"
    adapters = {  # projections with one A: (name of the adapter, layout of their B)
        ("q_proj", "k_proj", "v_proj"): (f"{attention}_kqv_adapter", qkv), ("o_proj",): (f"{attention}_dense_attention_adapter", TRANSPOSE),
        ("gate_proj", "up_proj"): (f"{mlp}_hto4h_adapter", FUSED_GLU), ("down_proj",): (f"{mlp}_4htoh_adapter", TRANSPOSE),
    }  # fmt: skip
    adapters |= {(f"{name}_proj",): (f"{attention}_unfused_kqv_adapter.{name}_adapter", TRANSPOSE) for name in ("q", "k", "v")}
    adapters |= {(f"{name}_proj",): (f"{mlp}_unfused_hto4h_adapter.{name}_adapter", TRANSPOSE) for name in ("gate", "up")}
    if not ACTIVATIONS[config.activation][1]:
        adapters[("up_proj",)] = f"{mlp}_hto4h_adapter", TRANSPOSE
    sharing: dict[str, dict[str, str]] = {}  # {path of an A: {projection: path of its B}}
    for kernel, (lora_A, lora_B) in adapters_of(kernels, lora).items():
        sharing.setdefault(lora_A, {})[kernel.split("/")[-2]] = lora_B
    rules = []
    for lora_A, members in sharing.items():
        projections = next(names for names in adapters if set(names) == members.keys())
        name, op = adapters[projections]
        theirs, ours = f"decoder.layers.{{i}}.{name}", tuple(members[projection] for projection in projections)
        rules += [Rule(f"{theirs}.linear_in.weight", lora_A, TRANSPOSE), Rule(f"{theirs}.linear_out.weight", ours if len(ours) > 1 else ours[0], op)]
    return rules


def adapter_map(model_config, lora: Lora, with_projector: bool) -> KeyMap:
    """Of a file that holds adapters, and the projector that was trained beside them, alone."""
    llm = model_config.llm
    kernels = [path for rule in llama_rules(llm) for path in rule.paths if path.endswith("/kernel")]
    rules = lora_rules(llm, lora, kernels) + (projector_rules(model_config.projector) if with_projector else [])
    return KeyMap(rules, {"llm": llm.num_layers if lora.layers is None else lora.layers})


def part_of(name: str) -> str | None:
    """The part of a model that a canonical name belongs to."""
    if name.startswith(ADAPTER):
        return "projector"
    if name.startswith(f"{EMBEDDING}.vision_encoder."):
        return "vision_encoder"
    return "llm" if name.startswith((f"{EMBEDDING}.weight", "decoder.", "output_layer.")) else None


# ---- ranks -------------------------------------------------------------------------------------------------------------------------------------------

WEIGHTS = "model_weights.ckpt"
SPLITS = (  # (pattern at the end of a canonical name, dimension that tensor ranks share); what matches none is whole on every rank
    (r"^embedding\.word_embeddings\.weight", 0),
    (r"^output_layer\.weight", 0),
    (r"\.linear_qkv\.(weight|bias)", 0),
    (r"\.linear_fc1\.(weight|bias)", 0),
    (r"\.linear_proj\.weight", 1),
    (r"\.linear_fc2\.weight", 1),
    (r"\.lora_(dense_attention|4htoh)_adapter\.linear_in\.weight", 1),
    (r"\.lora_\w+_adapter\.(\w+_adapter\.)?linear_(in|out)\.weight", 0),
)
VOCABULARY = (f"{EMBEDDING}.weight", "output_layer.weight")
LAYER = re.compile(r"(decoder\.layers\.)(\d+)(?=\.)")


def split_dim(name: str) -> int | None:
    return next((dim for pattern, dim in SPLITS if re.search(f"{pattern}$", name)), None)


def is_gated(config: dict) -> bool:
    """config: a model_config.yaml."""
    return "glu" in str(config.get("activation") or "gelu")


def is_glu(name: str, gated: bool) -> bool:
    """A rank holds its share of the gate, then its share of up."""
    return gated and bool(re.search(r"^decoder\..*\.(linear_fc1\.(weight|bias)|lora_hto4h_adapter\.linear_out\.weight)$", name))


def shift_layer(name: str, by: int) -> str:
    """A canonical name, `by` layers further."""
    return LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + by}", name, count=1) if LAYER.match(name) else name


def stages_of(name: str, num_layers: int, pipeline: int, tied: bool, key_format: str) -> list[tuple[int, str]]:
    """[(pipeline stage, name in its file)] of a canonical name. A stage counts its own layers from 0; a tied output has a copy of the table on the last."""
    depth, last = num_layers // pipeline, pipeline - 1
    if match := LAYER.match(name):
        stage = int(match[2]) // depth
        return [(stage, spelt(shift_layer(name, -stage * depth), key_format))]
    stages = [(0 if name.startswith("embedding.") else last, spelt(name, key_format))]
    if name == VOCABULARY[0] and tied and pipeline > 1:
        stages.append((last, spelt("output_layer.weight" if key_format == "mcore" else "word_embeddings.weight", key_format)))
    return stages


def rank_member(stage: int, rank: int, pipeline: int, tensor: int) -> str:
    """The member of a .nemo that holds the weights of one rank."""
    if pipeline > 1:
        return f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/{WEIGHTS}"
    return f"mp_rank_{rank:02d}/{WEIGHTS}" if tensor > 1 else WEIGHTS
