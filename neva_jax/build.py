"""The config turned into objects. With config.py the only library file that sees a ConfigDict; everything below gets numbers, names and functions."""

import dataclasses
import datetime
import functools
import logging
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from neva_jax.checkpoint.manager import Checkpoints
from neva_jax.config import check_parallel
from neva_jax.convert import hf
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.lengths import read_lengths
from neva_jax.data.media import open_media
from neva_jax.data.pipeline import Rows, batches
from neva_jax.data.plan import FixedPlan, Lengths, Plan, make_buckets
from neva_jax.data.records import Records
from neva_jax.data.tokenize import SpecialIds
from neva_jax.data.tokenizer import open_tokenizer
from neva_jax.errors import UserError
from neva_jax.hub import is_run, load_weights, open_weights
from neva_jax.layers.attention import make_attend
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.parallel.layer_runner import make_runner
from neva_jax.parallel.mesh import batch_shards, make_mesh
from neva_jax.parallel.sharding import also_over_data, replicated, weight_sharding
from neva_jax.training.flops import row_flops
from neva_jax.training.optimizer import SHARDED_OVER_DATA, make_optimizer
from neva_jax.training.schedules import Schedule, make_schedule
from neva_jax.training.step import init_state
from neva_jax.transforms.select import Row, Weight, describe, flatten, nest, trainable

log = logging.getLogger(__name__)

ACCUMULATE = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
COMPUTE = {"32": "float32", "bf16": "bfloat16", "bf16-mixed": "bfloat16"}


# ---- where and on what -------------------------------------------------------------------------------------------------------------------------------


def log_dir(config: ConfigDict) -> Path:
    """NeMo's exp_manager rule: explicit_log_dir, or exp_dir/name[/version]; a run that is to resume has no version of its own."""
    c = config.exp_manager
    if c.explicit_log_dir:
        directory = Path(c.explicit_log_dir)
    else:
        version = c.version or os.environ.get("NEMO_EXPM_VERSION")
        directory = Path(c.exp_dir or "nemo_experiments") / (c.name or config.name or "default")
        if version is None and not c.resume_if_exists:
            taken = sum(1 for p in directory.glob("version_*")) if directory.is_dir() else 0
            version = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S") if c.use_datetime_version else f"version_{taken}"
        directory = directory / version if version else directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        field = "exp_manager.explicit_log_dir" if c.explicit_log_dir else "exp_manager.exp_dir"
        raise UserError(f"{field}: cannot write into {directory} ({error.strerror}); give a directory that can be written") from None
    return directory


def build_mesh(config: ConfigDict) -> Mesh:
    """The mesh of `trainer.devices x num_nodes` devices. Fewer devices in the machine than asked for are an error, more are left alone with a warning."""
    present, wanted = jax.device_count(), config.trainer.devices
    count = present if wanted in (-1, "auto") else wanted * config.trainer.num_nodes
    if count > present:
        raise UserError(f"trainer.devices x trainer.num_nodes asks for {count} devices, JAX sees {present} ({jax.devices()[0].platform}); set trainer.devices={present}")
    if count < present:
        log.warning(f"{present} devices are here and {count} are used; trainer.devices=-1 takes all")
    check_parallel(config, count)
    return make_mesh(fsdp=config.model.fsdp_parallel_size, tensor=config.model.tensor_model_parallel_size, devices=jax.devices()[:count])


# ---- the model ---------------------------------------------------------------------------------------------------------------------------------------


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
    projector = m.mm_cfg.mm_mlp_adapter_type
    result = NevaConfig(llm, _vision_config(config, compute), projector)
    _compare_llm(config, result)
    return result


def _vision_config(config: ConfigDict, compute: str) -> ClipVisionConfig:
    """The tower. What NeMo documents (sizes) must agree with its weights; what it does not (depth, heads, ...) is read from them."""
    v = config.model.mm_cfg.vision_encoder
    if v.crop_size[0] != v.crop_size[1]:
        raise UserError(f"model.mm_cfg.vision_encoder.crop_size {tuple(v.crop_size)}: CLIP's tower takes square pictures")
    fields = {
        "hidden_size": v.hidden_size, "ffn_hidden_size": v.ffn_hidden_size, "num_layers": v.num_layers, "num_attention_heads": v.num_attention_heads,
        "image_size": v.crop_size[0], "patch_size": v.patch_dim, "hidden_act": v.hidden_act, "layernorm_epsilon": v.layernorm_epsilon,
    }  # fmt: skip
    directory = next((p for _, p, parts in weight_paths(config) if "vision_encoder" in parts and not is_run(Path(p)) and hf.read_config(p)["vision"]), None)
    if directory:
        theirs = hf.vision_fields(hf.read_config(directory)["vision"])
        names = {"hidden_size": "hidden_size", "image_size": "crop_size", "patch_size": "patch_dim"}
        different = [f"model.mm_cfg.vision_encoder.{ours} is {fields[name]}, the tower has {theirs[name]}" for name, ours in names.items() if fields[name] != theirs[name]]
        if different:
            raise UserError(f"{directory}: {'; '.join(different)}; set the fields to what the tower has")
        fields = theirs
    processor = image_processor(config)
    return ClipVisionConfig(
        **fields, select_layer=v.vision_select_layer, keep_class_token=v.vision_select_feature == "cls_patch", image_mean=processor.mean,
        image_std=processor.std, dtype=compute,
    )  # fmt: skip


def _compare_llm(config: ConfigDict, ours: NevaConfig) -> None:
    names = {
        "num_layers": "num_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "ffn_hidden_size", "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_query_groups", "head_dim": "kv_channels", "layernorm_epsilon": "layernorm_epsilon", "tied": "share_embeddings_and_output_weights",
        "bias": "bias",
    }  # fmt: skip
    for field, directory, parts in weight_paths(config):
        if "llm" not in parts or is_run(Path(directory)) or not hf.read_config(directory)["text"]:
            continue
        theirs = hf.text_fields(hf.read_config(directory)["text"])
        different = {f"model.{ours_name}": (getattr(ours.llm, name), theirs[name]) for name, ours_name in names.items() if getattr(ours.llm, name) != theirs[name]}
        if ours.llm.rope.base != theirs["rope"].base:
            different["model.rotary_base"] = (ours.llm.rope.base, theirs["rope"].base)
        if ours.llm.rope.percentage != 1.0:
            different["model.rotary_percentage"] = (ours.llm.rope.percentage, 1.0)
        if different:
            listed = "; ".join(f"{name} is {ours}, the weights have {theirs}" for name, (ours, theirs) in different.items())
            flags = " ".join(f"--config.{name}={theirs}" for name, (_, theirs) in different.items())
            raise UserError(f"{field}: {directory} is another model: {listed}; add {flags}")


@dataclasses.dataclass
class Model:
    """graphdef and weights ({path: Weight}) describe the model; make() builds it (traced only); rows: what trains, {path: row}; shardings: {path: NamedSharding}."""

    config: NevaConfig
    graphdef: nnx.GraphDef
    weights: dict[str, Weight]
    make: object
    rows: dict[str, Row]
    shardings: dict[str, jax.sharding.NamedSharding]
    frozen_dtype: object

    def target(self, path: str) -> jax.ShapeDtypeStruct:
        """Masters of what trains are fp32; frozen weights are stored as they are computed with."""
        dtype = jnp.float32 if path in self.rows else self.frozen_dtype
        return jax.ShapeDtypeStruct(self.weights[path].shape, dtype, sharding=self.shardings[path])

    def random(self, paths: list[str]) -> dict[str, jax.Array]:
        """Weights born random, each on its devices; XLA drops what is not asked for."""
        targets = {path: self.target(path) for path in paths}

        def build():
            flat = flatten(nnx.to_pure_dict(nnx.state(self.make())))
            return {path: flat[path].astype(target.dtype) for path, target in targets.items()}

        return jax.jit(build, out_shardings={path: target.sharding for path, target in targets.items()})() if paths else {}


def build_model(config: ConfigDict, neva_config: NevaConfig, mesh: Mesh) -> Model:
    m = config.model
    platform, selective = mesh.devices.flat[0].platform, m.activations_checkpoint_granularity == "selective"
    attend = functools.partial(make_attend, platform=platform, use_flash_attention=m.use_flash_attention)
    llm_attend, kernel = attend(dtype=neva_config.llm.dtype, head_dim=neva_config.llm.head_dim, recompute=selective)
    vision = neva_config.vision
    vision_attend, vision_kernel = attend(dtype=vision.dtype, head_dim=vision.hidden_size // vision.num_attention_heads)
    log.info(f"attention: {kernel} (language model), {vision_kernel} (vision tower)")
    runner = make_runner(m.activations_checkpoint_granularity, m.activations_checkpoint_method, m.activations_checkpoint_num_layers)

    def make():
        return neva(neva_config, rngs=nnx.Rngs(m.seed), llm_attend=llm_attend, vision_attend=vision_attend, runner=runner)

    graphdef, weights = describe(make)
    shardings = {path: weight_sharding(path, weight.shape, weight.axes, mesh) for path, weight in weights.items()}
    rows = trainable(weights, trainable_rows(config))
    return Model(neva_config, graphdef, weights, make, rows, shardings, jnp.dtype(neva_config.llm.dtype))


def trainable_rows(config: ConfigDict) -> list[Row]:
    """`model.trainable`, or what NeMo's freeze fields mean: the projector always trains."""
    m = config.model
    if m.trainable is not None:
        return [Row(*row) for row in m.trainable]
    rows = [Row(r"^projector/")] if m.mm_cfg.mm_mlp_adapter_type != "identity" else []
    rows += [] if m.mm_cfg.llm.freeze else [Row(r"^llm/")]
    if not m.mm_cfg.vision_encoder.freeze:
        log.warning("model.mm_cfg.vision_encoder.freeze=False trains the tower here; NeMo 1.x ran it without gradients all the same")
        rows += [Row(r"^vision_encoder/")]
    return rows


# ---- weights -----------------------------------------------------------------------------------------------------------------------------------------


def weight_paths(config: ConfigDict) -> list[tuple[str, str, tuple[str, ...]]]:
    """[(field, path, parts)] of every field that brings weights, the one that counts most first."""
    mm, everything = config.model.mm_cfg, ("llm", "vision_encoder", "projector")
    fields = [
        ("restore_from_path", config.restore_from_path, everything),
        ("model.restore_from_path", config.model.restore_from_path, everything),
        ("model.mm_cfg.llm.from_pretrained", mm.llm.from_pretrained, ("llm",)),
        ("model.mm_cfg.vision_encoder.from_pretrained", mm.vision_encoder.from_pretrained, ("vision_encoder",)),
        ("model.mm_cfg.pretrain_mm_mlp_adapter", mm.pretrain_mm_mlp_adapter, ("projector",)),
    ]
    given = [(field, path, parts) for field, path, parts in fields if path]
    for field, path, _ in given:
        if not Path(path).is_dir():
            raise UserError(f"{field}: no directory {path}; expected a Hugging Face model directory or a run of this program (nothing is downloaded)")
    return given


def start_weights(config: ConfigDict, model: Model) -> tuple[dict, dict, dict]:
    """A fresh run's weights -> (params, frozen, {path: source}). What no source has is born random, which for a frozen part is an error."""
    sources = [s for field, path, parts in weight_paths(config) for s in open_weights(path, model.config, field, parts)]
    arrays, origin = load_weights({path: model.target(path) for path in model.weights}, sources)
    missing = [path for path in model.weights if path not in arrays]
    frozen_parts = sorted({path.split("/")[0] for path in missing if path not in model.rows})
    if frozen_parts and not config.model.mm_cfg.allow_random_frozen:
        fields = {"llm": "model.mm_cfg.llm.from_pretrained", "vision_encoder": "model.mm_cfg.vision_encoder.from_pretrained"}
        named = " and ".join(f"{part} (set {fields.get(part, 'model.restore_from_path')})" for part in frozen_parts)
        raise UserError(f"frozen without weights: {named}; a frozen part that starts random learns nothing: give its weights, or set model.mm_cfg.allow_random_frozen=True")
    for part in sorted({path.split("/")[0] for path in missing}):
        log.info(f"{part}: {sum(path.startswith(part + '/') for path in missing)} weights start random")
    arrays |= model.random(missing)
    params = {path: arrays[path] for path in model.rows}
    return params, {path: array for path, array in arrays.items() if path not in params}, origin


# ---- optimizer ---------------------------------------------------------------------------------------------------------------------------------------


def build_optimizer(config: ConfigDict, model: Model):
    """-> (optax transformation, schedule: step -> learning rate)."""
    o, s = config.model.optim, config.model.optim.sched
    max_steps = config.trainer.max_steps if config.trainer.max_steps > 0 else s.max_steps

    def steps(name: str) -> int:
        ratio = s[f"{name}_ratio"]
        return int(ratio * max_steps) if ratio else s[f"{name}_steps"] or 0

    optimizer = make_optimizer(
        o.name, model.rows, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, decay_all=config.model.do_layer_norm_weight_decay
    )
    schedule = Schedule(
        lr=o.lr, max_steps=max_steps, warmup_steps=steps("warmup"), constant_steps=steps("constant"), hold_steps=steps("hold"), min_lr=s.min_lr,
        power=s.power, decay_rate=s.decay_rate, d_model=s.d_model or config.model.hidden_size,
    )  # fmt: skip
    return optimizer, make_schedule(s.name, schedule)


def abstract_state(config: ConfigDict, model: Model, optimizer, mesh: Mesh) -> dict:
    """The state of training/step.py as ShapeDtypeStructs with shardings: moments live with their weights, or split over data too (ZeRO-1)."""
    params = {path: model.target(path) for path in model.rows}
    over_data = config.model.optim.name in SHARDED_OVER_DATA

    def place(path, leaf):
        weight = next((p for p in (getattr(k, "key", None) for k in path) if p in params), None)
        sharding = params[weight].sharding if weight else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=also_over_data(sharding, leaf.shape) if weight and over_data else sharding)

    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    state = {name: jax.tree_util.tree_map_with_path(place, tree) for name, tree in state.items()}
    return state | {"params": params}


# ---- data --------------------------------------------------------------------------------------------------------------------------------------------


def build_tokenizer(config: ConfigDict):
    t = config.model.tokenizer
    return open_tokenizer(t.library, model=t.model, type=t.type)


def image_processor(config: ConfigDict) -> ImageProcessor:
    """The tower's own preprocessor where its directory has one, else CLIP's at crop_size; the aspect is the config's."""
    v = config.model.mm_cfg.vision_encoder
    crop, aspect = tuple(v.crop_size), config.model.data.image_aspect_ratio
    for field, directory, parts in weight_paths(config):
        processor = ImageProcessor.from_pretrained(directory) if "vision_encoder" in parts else None
        if processor is not None:
            if tuple(processor.crop_size) != crop:
                raise UserError(f"model.mm_cfg.vision_encoder.crop_size is {crop}, the preprocessor of {field} {directory} crops to {tuple(processor.crop_size)}; set it to that")
            return dataclasses.replace(processor, aspect=aspect)
    return ImageProcessor(crop_size=crop, shortest_edge=min(crop), aspect=aspect)


def build_examples(config: ConfigDict, tokenizer, neva_config: NevaConfig, data_path) -> Examples:
    d = config.model.data
    paths = (data_path,) if isinstance(data_path, str) else tuple(data_path or ())
    if not paths or not all(paths):
        raise UserError("model.data.data_path is not set; give a .json or .jsonl file of LLaVA records")
    vocab = neva_config.llm.vocab_size
    if tokenizer.vocab_size > vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model {vocab} (model.override_vocab_size); unset it or raise it")
    if neva_config.media_length > config.model.encoder_seq_length:
        raise UserError(f"a picture takes {neva_config.media_length} positions and model.encoder_seq_length is {config.model.encoder_seq_length}; raise it")
    return Examples(
        sources=tuple(Records(path, d.cache_dir) for path in paths),
        media=open_media(d.image_folder) if d.image_folder else None,
        image_processor=image_processor(config),
        tokenizer=tokenizer,
        special=SpecialIds.of(tokenizer, d.conv_template, use_im_start_end=config.model.mm_cfg.use_im_start_end),
        template=d.conv_template,
        media_length=neva_config.media_length,
        max_length=config.model.encoder_seq_length,
        max_media=d.max_media,
        on_bad_image=d.on_bad_image,
    )


@dataclasses.dataclass
class Split:
    """Records, the plan over some of them (ids: which), and this process' rows."""

    examples: Examples
    lengths: Lengths
    ids: np.ndarray
    plan: object
    rows: Rows
    global_batch_size: int
    num_workers: int

    def batches(self, start: int, stop: int):
        """Global batches start .. stop-1, as Grain makes them (see data/pipeline.py)."""
        return batches(
            self.examples, self.plan, self.rows, ids=self.ids, start=start, stop=stop, global_batch_size=self.global_batch_size, num_workers=self.num_workers
        )

    def describe(self, batch: int, count: int = 8) -> str:
        """The records of a global batch, in words."""
        ids = self.ids[self.plan[batch][1]]
        return ", ".join(self.examples.where(int(i)) for i in ids[:count]) + (f" and {len(ids) - count} more" if len(ids) > count else "")


def build_data(config: ConfigDict, tokenizer, neva_config: NevaConfig, mesh: Mesh) -> tuple[Split, Split | None]:
    """-> (training, validation or None). Validation has its own file, or a share of the training records that training never sees."""
    m, d = config.model, config.model.data
    examples = build_examples(config, tokenizer, neva_config, d.data_path)
    lengths = read_lengths(examples, examples.sources[0].cache_dir, d.num_workers)
    ids = np.arange(len(examples))
    held_out = None
    if isinstance(d.validation, float):
        order = np.random.default_rng([m.seed, 2]).permutation(ids)
        count = max(1, round(d.validation * len(ids)))
        held_out, ids = (examples, lengths, np.sort(order[:count])), np.sort(order[count:])
    elif d.validation:
        other = build_examples(config, tokenizer, neva_config, d.validation)
        held_out = other, read_lengths(other, other.sources[0].cache_dir, d.num_workers), np.arange(len(other))
    if len(ids) == 0:
        raise UserError("model.data.data_path: no record is left to train on")
    rows = Rows(m.micro_batch_size, batch_shards(mesh), local_shards(mesh))
    size, once = m.global_batch_size, d.dataloader_type == "single"
    if once and len(ids) < size:
        raise UserError(f"model.data.dataloader_type single passes once over the data, and {len(ids)} records do not fill a global batch of {size}")
    mine = lengths.select(ids)
    plan = Plan(None if once else m.seed, mine, size, make_buckets(mine, d.buckets), d.length_grouping, once)
    train = Split(examples, mine, ids, plan, rows, size, d.num_workers)
    if held_out is None or config.trainer.limit_val_batches == 0:
        return train, None
    other, lengths, ids = held_out
    mine = lengths.select(ids)
    return train, Split(other, mine, ids, FixedPlan(mine, size, make_buckets(mine, d.buckets)), rows, size, 0)


def local_shards(mesh: Mesh) -> range:
    """The data shards (of data x fsdp) whose rows this process reads."""
    shards = sorted({int(d) * mesh.shape["fsdp"] + int(f) for (_, d, f, _), device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()})
    if shards != list(range(shards[0], shards[-1] + 1)):
        raise UserError(f"this process holds the data shards {shards}, which are not neighbours; choose tensor and fsdp sizes that divide the devices of a process")
    return range(shards[0], shards[-1] + 1)


def num_steps(config: ConfigDict, train: Split) -> int:
    """Optimizer steps of the whole run: max_steps, max_epochs or one pass, whichever ends first."""
    limits = [config.trainer.max_steps] if config.trainer.max_steps > 0 else []
    if config.trainer.max_epochs > 0:
        limits.append(config.trainer.max_epochs * len(train.ids) // train.global_batch_size)
    if train.plan.num_batches is not None:
        limits.append(train.plan.num_batches)
    return min(limits)


def intervals(config: ConfigDict, train: Split) -> tuple[int, int, int]:
    """-> steps between log lines, validations, checkpoints (0: none). A float val_check_interval is a share of an epoch."""
    interval = config.trainer.val_check_interval
    if isinstance(interval, float):
        interval = max(1, int(interval * len(train.ids) / train.global_batch_size))
    every = config.exp_manager.checkpoint_callback_params.every_n_train_steps or interval
    return config.trainer.log_every_n_steps, interval, every if config.exp_manager.create_checkpoint_callback else 0


def num_validation_batches(config: ConfigDict, validation: Split) -> int:
    """`limit_val_batches`: a count of global batches, or a share (float) of them."""
    limit, there = config.trainer.limit_val_batches, validation.plan.num_batches
    return max(1, int(limit * there)) if isinstance(limit, float) else there if limit is None else min(limit, there)


def batch_flops(model: Model, batch: dict) -> float:
    """Model FLOPs of this process' rows of a global batch."""
    micro_batches, rows, tokens = batch["tokens"].shape
    shape = {"tokens": tokens, "supervised": batch["supervised_positions"].shape[2], "media": batch["media"].shape[2]}
    return micro_batches * rows * row_flops(model.config, **shape, trained={path.split("/")[0] for path in model.rows})


# ---- checkpoints and what is printed -----------------------------------------------------------------------------------------------------------------


def build_checkpoints(config: ConfigDict, run: Path) -> Checkpoints:
    c = config.exp_manager.checkpoint_callback_params
    return Checkpoints(c.dirpath or run / "checkpoints", monitor=c.monitor, mode=c.mode, save_top_k=c.save_top_k, save_last=c.save_last)


def resume_step(config: ConfigDict, run: Path, checkpoints: Checkpoints) -> int | None:
    """The step to resume this run from, None to start afresh."""
    c, step = config.exp_manager, checkpoints.latest_step()
    if not c.resume_if_exists:
        if step is not None:
            raise UserError(f"{run} holds a run at global_step={step} already; set exp_manager.resume_if_exists=True to continue it, or another exp_manager.name")
        return None
    if step is None and not c.resume_ignore_no_checkpoint:
        raise UserError(f"{run}: no checkpoint to resume from; set exp_manager.resume_ignore_no_checkpoint=True to start afresh")
    return step


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict:
    """What the step is compiled with; deterministic: the same bits every run on a GPU too."""
    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    return {"xla_gpu_deterministic_ops": True} if config.trainer.deterministic and on_gpu else {}


def describe_parts(model: Model) -> str:
    """One line a part: weights, how many of them train, and at what share of the learning rate."""
    lines = []
    for part in ("vision_encoder", "projector", "llm"):
        paths = [path for path in model.weights if path.split("/")[0] == part]
        count = sum(math.prod(model.weights[path].shape) for path in paths)
        trains = sum(math.prod(model.weights[path].shape) for path in paths if path in model.rows)
        factors = sorted({model.rows[path].lr_factor for path in paths if path in model.rows})
        lines.append(f"{part}: {count:,} weights, {trains:,} train" + (f" at {', '.join(map(str, factors))} x the learning rate" if trains else ""))
    return "; ".join(lines)


def describe_data(train: Split, validation: Split | None, max_steps: int) -> str:
    shapes = ", ".join(f"T {b.tokens} K {b.supervised} N {b.media}" for b in train.plan.args[3])
    held = f"{len(validation.ids)} records for validation" if validation else "no validation records (model.data.validation)"
    epochs = max_steps * train.global_batch_size / len(train.ids)
    return f"{len(train.ids)} training records, {held}; {max_steps} steps of {train.global_batch_size} are {epochs:.2f} epochs; buckets: {shapes}"
