"""The model that a config asks for, described but not built: its numbers, what of it trains, where each weight lives."""

import dataclasses
import functools
import logging
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from neva_jax.build import fp8 as build_fp8
from neva_jax.build.architecture import fields_of
from neva_jax.build.lora import Dropout, build_dropout, build_lora, check_rows, check_targets, describe_lora, num_weights, with_adapters
from neva_jax.build.trained import trainable_rows
from neva_jax.build.weights import weight_paths
from neva_jax.config import leaves
from neva_jax.convert.hf import TOWERS
from neva_jax.data.image import ImageProcessor
from neva_jax.errors import UserError
from neva_jax.fields import LLM_SHAPE, VISION, paths
from neva_jax.hub import run_of
from neva_jax.layers.attention import KEEP_OUTPUTS, make_attend
from neva_jax.layers.rope import Rope
from neva_jax.mesh_sizes import round_size
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.models.siglip import SiglipVisionConfig
from neva_jax.parallel.layer_runner import make_runner
from neva_jax.parallel.mesh import batch_shards
from neva_jax.parallel.pipeline import Pipeline, pipeline_layers
from neva_jax.parallel.sharding import WHOLE, weight_sharding
from neva_jax.training.flops import row_flops_by_kind
from neva_jax.transforms.fp8 import Quantised
from neva_jax.transforms.lora import Lora, is_adapter
from neva_jax.transforms.select import Row, Weight, describe, flatten, trainable

log = logging.getLogger(__name__)

# Of the tower, what a model_config.yaml does not say: read from the weights.
UNDOCUMENTED = ("model_type", "num_layers", "num_attention_heads", "ffn_hidden_size", "layernorm_epsilon", "hidden_act")

COMPUTE = {"32": "float32", "bf16": "bfloat16", "bf16-mixed": "bfloat16"}


def neva_config(config: ConfigDict, vocab_size: int) -> NevaConfig:
    """Shapes and numbers of the model. Architecture comes from the config alone, as NeMo has it; what the weights' own config.json says is compared with it."""
    m = config.model
    compute = COMPUTE[str(config.trainer.precision)]
    head_dim = m.kv_channels or m.hidden_size // m.num_attention_heads
    vocab_size = m.override_vocab_size or vocab_size
    multiple = m.make_vocab_size_divisible_by
    scaling = (m.rope_scaling_factor, m.rope_low_freq_factor, m.rope_high_freq_factor, m.rope_original_max_position_embeddings)
    rope = Rope(head_dim, m.rotary_base, m.rotary_percentage, m.seq_len_interpolation_factor or 1.0, scaling if m.scale_positional_embedding else None)
    llm = LlamaConfig(
        vocab_size=vocab_size, padded_vocab_size=-(-vocab_size // multiple) * multiple, num_layers=m.num_layers, hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size, num_attention_heads=m.num_attention_heads, num_query_groups=m.num_query_groups or m.num_attention_heads,
        head_dim=head_dim, rope=rope, normalization=m.normalization, layernorm_epsilon=m.layernorm_epsilon, activation=m.activation,
        openai_gelu=m.openai_gelu, bias=m.bias, qkv_bias=m.qkv_bias, tied=m.share_embeddings_and_output_weights,
        attention_scale=None if m.normalize_attention_scores else 1.0, init_std=m.init_method_std,
        output_init_std=m.init_method_std / math.sqrt(2 * m.num_layers) if m.use_scaled_init_method else m.init_method_std,
        dtype=compute, residual_dtype="float32" if m.fp32_residual_connection else compute,
        residual_axes=("batch", "sequence" if m.sequence_parallel and m.tensor_model_parallel_size > 1 else "length", None),
    )  # fmt: skip
    if llm.padded_vocab_size % m.tensor_model_parallel_size:
        raise UserError(
            f"model.tensor_model_parallel_size {m.tensor_model_parallel_size} does not divide the padded vocabulary {llm.padded_vocab_size}; "
            "make model.make_vocab_size_divisible_by a multiple of it"
        )
    _compare_llm(config)
    return NevaConfig(llm, _vision_config(config, compute), m.mm_cfg.mm_mlp_adapter_type)


def _vision_config(config: ConfigDict, compute: str) -> ClipVisionConfig:
    """The tower. What NeMo documents (sizes) must agree with its weights; what it does not (depth, heads, ...) is read from them."""
    v = config.model.mm_cfg.vision_encoder
    if v.crop_size[0] != v.crop_size[1]:
        raise UserError(f"{VISION}.crop_size {tuple(v.crop_size)}: towers take square pictures")
    fields = {
        "hidden_size": v.hidden_size, "ffn_hidden_size": v.ffn_hidden_size, "num_layers": v.num_layers, "num_attention_heads": v.num_attention_heads,
        "image_size": v.crop_size[0], "patch_size": v.patch_dim, "hidden_act": v.hidden_act, "layernorm_epsilon": v.layernorm_epsilon,
    }  # fmt: skip
    theirs = _theirs(config, "vision_encoder")
    names = {"hidden_size": "hidden_size", "image_size": "crop_size", "patch_size": "patch_dim"}
    wrong = {ours: theirs[f"{VISION}.{ours}"] for name, ours in names.items() if theirs.get(f"{VISION}.{ours}", (v[ours],))[0] != v[ours]}
    if wrong:
        different = [f"{VISION}.{ours} is {_one(v[ours])}, the tower has {_one(value)}" for ours, (value, _) in wrong.items()]
        raise UserError(f"{next(iter(wrong.values()))[1]}: {'; '.join(different)}; set the fields to what the tower has")
    for name in UNDOCUMENTED:
        if f"{VISION}.{name}" in theirs:  # so that config.json says what this run's tower is
            fields[name] = v[name] = theirs[f"{VISION}.{name}"][0]
    fields.pop("model_type", None)
    tower, processor = tower_of(config), image_processor(config)
    if v.class_token_length != (tower is ClipVisionConfig):
        raise UserError(
            f"{VISION}.class_token_length is {v.class_token_length}, and a tower of type {v.model_type or 'clip_vision_model'} has "
            f"{int(tower is ClipVisionConfig)}; set it to that"
        )
    if tower is ClipVisionConfig:
        fields["keep_class_token"] = v.vision_select_feature == "cls_patch"
    return tower(**fields, select_layer=v.vision_select_layer, image_mean=processor.mean, image_std=processor.std, dtype=compute)


def tower_of(config: ConfigDict) -> type[ClipVisionConfig]:
    return TOWERS[config.model.mm_cfg.vision_encoder.model_type or "clip_vision_model"]


def _one(size):
    """A square's side."""
    return size[0] if isinstance(size, tuple) else size


def _theirs(config: ConfigDict, part: str) -> dict[str, tuple]:
    """{config field: (value, path)} of what the weights of a part say of themselves; the path that counts most first."""
    found = {}
    for field, path, parts in weight_paths(config):
        if part in parts:
            found = {name: (value, path) for name, value in fields_of(path, field).items()} | found
    return found


LLM_COMPARED = LLM_SHAPE - paths("model", "make_vocab_size_divisible_by override_vocab_size mm_cfg.mm_mlp_adapter_type mm_cfg.use_im_start_end")
RESOLVED = {  # what null and NeMo's prefix mean: field -> (value, the others by name) -> value
    "model.num_query_groups": lambda value, get: value or get("model.num_attention_heads"),
    "model.kv_channels": lambda value, get: value or get("model.hidden_size") // get("model.num_attention_heads"),
    "model.seq_len_interpolation_factor": lambda value, get: value or 1.0,
    "model.activation": lambda value, get: value.removeprefix("fast-"),
}


def _compare_llm(config: ConfigDict) -> None:
    """What the weights say of their language model must be what the config says."""
    theirs, ours, different = _theirs(config, "llm"), leaves(config), {}
    for name in sorted(LLM_COMPARED & theirs.keys()):
        resolve = RESOLVED.get(name, lambda value, get: value)
        mine, value = resolve(ours[name], ours.get), resolve(theirs[name][0], lambda other: theirs[other][0])
        if mine != value:
            different[name] = mine, value, theirs[name][1]
    if different:
        listed = "; ".join(f"{name} is {ours}, the weights have {theirs}" for name, (ours, theirs, _) in different.items())
        flags = " ".join(f"--config.{name}={theirs}" for name, (_, theirs, _) in different.items())
        path = next(iter(different.values()))[2]
        field = next(field for field, place, _ in weight_paths(config) if place == path)
        raise UserError(f"{field}: {path} is another model: {listed}; add {flags}")


@dataclasses.dataclass
class Model:
    """graphdef and weights ({path: Weight}) describe the model; make() builds it (traced only, without FP8); rows: what trains, {path: row}; shardings: {path:
    where}, of FP8 scales too. lora: the adapters in it; dropout: of those, in training."""

    config: NevaConfig
    graphdef: nnx.GraphDef
    weights: dict[str, Weight]
    make: object
    rows: dict[str, Row]
    shardings: dict[str, jax.sharding.NamedSharding]
    frozen_dtype: object
    fp8: build_fp8.Fp8 | None = None
    pipeline: Pipeline = Pipeline()
    lora: Lora | None = None
    dropout: Dropout | None = None

    @property
    def trained_parts(self) -> set[str]:
        """Parts of which something trains; adapters are no part of theirs."""
        return {path.split("/")[0] for path in self.rows if not is_adapter(path)}

    def loaded(self, path: str) -> jax.ShapeDtypeStruct:
        """Masters of what trains are fp32; frozen weights are read in the dtype that is computed with."""
        dtype = jnp.float32 if path in self.rows else self.frozen_dtype
        return jax.ShapeDtypeStruct(self.weights[path].shape, dtype, sharding=self.shardings[path])

    def target(self, path: str) -> jax.ShapeDtypeStruct | Quantised:
        """What the step takes: `loaded`, or for a frozen weight of an FP8 GEMM its quantised form."""
        return build_fp8.target(self.loaded(path)) if self.fp8 and path in self.fp8.quantised else self.loaded(path)

    @property
    def stores(self) -> dict[str, object]:
        """{path: the function that quantises it} of what is read in one form and stored in another, see hub.load_weights."""
        return {path: functools.partial(build_fp8.store, target=self.target(path)) for path in (self.fp8.quantised if self.fp8 else ())}

    def stored(self, frozen: dict) -> dict:
        """Frozen weights as the step takes them; one after the other takes its own place."""
        for path, store in self.stores.items():
            frozen[path] = store(frozen[path])
        return frozen

    def random(self, paths: list[str]) -> dict[str, jax.Array]:
        """Weights born random, each on its devices; XLA drops what is not asked for."""
        targets = {path: self.loaded(path) for path in paths}

        def build():
            flat = flatten(nnx.to_pure_dict(nnx.state(self.make())))
            return {path: flat[path].astype(target.dtype) for path, target in targets.items()}

        return jax.jit(build, out_shardings={path: target.sharding for path, target in targets.items()})() if paths else {}


def build_model(config: ConfigDict, neva_config: NevaConfig, mesh: Mesh) -> Model:
    m = config.model
    attend = functools.partial(make_attend, platform=mesh.devices.flat[0].platform, use_flash_attention=m.use_flash_attention)
    llm_attend, kernel = attend(dtype=neva_config.llm.dtype, head_dim=neva_config.llm.head_dim)
    vision = neva_config.vision
    vision_attend, vision_kernel = attend(dtype=vision.dtype, head_dim=vision.hidden_size // vision.num_attention_heads)
    log.info(f"attention: {kernel} (language model), {vision_kernel} (vision tower)")
    lora = build_lora(config)
    if lora:
        check_targets(config, lora, describe(lambda: neva(neva_config, rngs=nnx.Rngs(0)))[1])
    plain = describe(lambda: with_adapters(neva(neva_config, rngs=nnx.Rngs(0)), lora, 0))[1]
    rows = trainable(plain, trainable_rows(config))
    if lora:
        check_rows(lora, plain, rows)
    how = (m.activations_checkpoint_granularity, m.activations_checkpoint_method, m.activations_checkpoint_num_layers)
    runner = make_runner(*how, attention=KEEP_OUTPUTS[kernel], frozen=_frozen("llm", rows))
    vision_runner = make_runner(attention=KEEP_OUTPUTS[vision_kernel], frozen=_frozen("vision_encoder", rows))
    pipeline = build_pipeline(config, mesh)
    if pipeline.stages > 1:
        runner = functools.partial(pipeline_layers, pipeline=pipeline, inner=runner)

    def make(lora=lora, transform=lambda model: model):
        base = neva(neva_config, rngs=nnx.Rngs(m.seed), llm_attend=llm_attend, vision_attend=vision_attend, runner=runner, vision_runner=vision_runner)
        return with_adapters(transform(base), lora, m.seed)

    graphdef, weights = describe(make)
    replicated_heads = {"kv_heads": None} if neva_config.llm.num_query_groups % mesh.shape["tensor"] else {}
    replicated_rank = {"rank": None} if lora and lora.rank % mesh.shape["tensor"] else {}
    changes = {"vision_encoder": WHOLE, "llm": replicated_heads | replicated_rank}
    shardings = {path: weight_sharding(path, weight.shape, weight.axes, mesh, changes.get(path.split("/")[0])) for path, weight in weights.items()}
    fp8 = build_fp8.build_fp8(config, make, weights, rows, mesh)
    if fp8:
        graphdef, shardings = fp8.graphdef, shardings | {path: weight_sharding(path, scale.shape, scale.axes, mesh) for path, scale in fp8.scales.items()}
    if lora:
        log.info(describe_lora(lora, weights))
    dropout = build_dropout(config, lora, functools.partial(make, transform=fp8.transform if fp8 else lambda model: model))
    return Model(neva_config, graphdef, weights, make, rows, shardings, jnp.dtype(neva_config.llm.dtype), fp8, pipeline, lora, dropout)


def _frozen(part: str, rows: dict[str, Row]) -> bool:
    """Whether nothing of a part's stack trains."""
    return not any(path.startswith(f"{part}/layers/") for path in rows)


def build_pipeline(config: ConfigDict, mesh: Mesh) -> Pipeline:
    m = config.model
    pipeline = Pipeline(m.pipeline_model_parallel_size, m.virtual_pipeline_model_parallel_size or 1, round_size(leaves(config), batch_shards(mesh)))
    if pipeline.stages > 1:
        sizes = f"{pipeline.stages} stages x {pipeline.virtual} virtual, rounds of {pipeline.round_size} micro-batches"
        log.info(f"pipeline: {sizes}; a stage is idle for {pipeline.bubble:.1%} of a round")
    return pipeline


def image_processor(config: ConfigDict) -> ImageProcessor:
    """The tower's own preprocessor where its directory has one, else its kind's at crop_size; the aspect is the config's, and so is turning by EXIF."""
    v = config.model.mm_cfg.vision_encoder
    crop = tuple(v.crop_size)
    how = {"aspect": config.model.data.image_aspect_ratio or "square", "exif": config.model.data.apply_exif_rotation}
    for field, directory, parts in weight_paths(config):
        processor = ImageProcessor.from_pretrained(run_of(Path(directory))) if "vision_encoder" in parts else None
        if processor is not None:
            if tuple(processor.crop_size) != crop:
                raise UserError(f"{VISION}.crop_size is {crop}, the preprocessor of {field} {directory} crops to {tuple(processor.crop_size)}; set it to that")
            return dataclasses.replace(processor, **how)
    if tower_of(config) is SiglipVisionConfig:
        return ImageProcessor(crop_size=crop, shortest_edge=None, mean=(0.5,) * 3, std=(0.5,) * 3, **how)
    return ImageProcessor(crop_size=crop, shortest_edge=min(crop), **how)


def flops_by_kind(model: Model, *, tokens: int, supervised: int, media: int) -> dict[str, float]:
    """Model FLOPs of a row of that shape (training/flops.py)."""
    adapters = num_weights(model.lora, model.weights) if model.lora else 0
    return row_flops_by_kind(model.config, tokens=tokens, supervised=supervised, media=media, trained=model.trained_parts, adapters=adapters)


def batch_flops(model: Model, batch: dict) -> float:
    """Model FLOPs of this process' rows of a global batch."""
    micro_batches, rows, tokens = batch["tokens"].shape
    shape = {"tokens": tokens, "supervised": batch["supervised_positions"].shape[2], "media": batch["media"].shape[2]}
    return micro_batches * rows * sum(flops_by_kind(model, **shape).values())
