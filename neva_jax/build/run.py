"""What a run is made of besides its model and data: directory, devices, optimizer, state, checkpoints, intervals."""

import datetime
import functools
import json
import logging
import os
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from neva_jax.build import fp8 as build_fp8
from neva_jax.build.data import Split
from neva_jax.build.model import Model
from neva_jax.checkpoint.manager import Checkpoints
from neva_jax.config import check_parallel, to_json
from neva_jax.errors import UserError
from neva_jax.inference.answers import Speaker
from neva_jax.inference.generate import Weights, row_keys
from neva_jax.inference.sampling import Sampling
from neva_jax.parallel.distributed import check_processes, check_same, check_shared, from_first
from neva_jax.parallel.mesh import batch_shards, make_mesh
from neva_jax.parallel.sharding import also_over_data, replicated
from neva_jax.training.optimizer import SHARDED_OVER_DATA, make_optimizer
from neva_jax.training.schedules import Schedule, make_schedule
from neva_jax.training.step import init_state, make_train_step

log = logging.getLogger(__name__)

ACCUMULATE = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def log_dir(config: ConfigDict) -> Path:
    """NeMo's exp_manager rule: explicit_log_dir, or exp_dir/name[/version]; a run that is to resume has no version of its own."""
    c = config.exp_manager
    directory = Path(from_first("directory", lambda: str(_chosen_dir(config))))  # its version may be the time, or the next number
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        field = "exp_manager.explicit_log_dir" if c.explicit_log_dir else "exp_manager.exp_dir"
        raise UserError(f"{field}: cannot write into {directory} ({error.strerror}); give a directory that can be written") from None
    check_shared(directory)
    return directory


def _chosen_dir(config: ConfigDict) -> Path:
    c = config.exp_manager
    if c.explicit_log_dir:
        return Path(c.explicit_log_dir)
    version = c.version or os.environ.get("NEMO_EXPM_VERSION")
    directory = Path(c.exp_dir or "nemo_experiments") / (c.name or config.name or "default")
    if version is None and not c.resume_if_exists:
        taken = sum(1 for p in directory.glob("version_*")) if directory.is_dir() else 0
        version = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S") if c.use_datetime_version else f"version_{taken}"
    return directory / version if version else directory


def build_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
    """The mesh of `trainer.devices x num_nodes` of `devices` (default: JAX's). Fewer than asked for are an error, more are left alone with a warning."""
    devices = _all_devices(config) if devices is None else devices
    present, wanted = len(devices), config.trainer.devices
    count = present if wanted in (-1, "auto") else wanted * config.trainer.num_nodes
    if count > present:
        platform = devices[0].platform
        raise UserError(f"trainer.devices x trainer.num_nodes asks for {count} devices, JAX sees {present} ({platform}); set trainer.devices={present}")
    if count < present:
        log.warning(f"{present} devices are here and {count} are used; trainer.devices=-1 takes all")
    check_parallel(config, count)
    m = config.model
    return make_mesh(fsdp=m.fsdp_parallel_size, tensor=m.tensor_model_parallel_size, pipeline=m.pipeline_model_parallel_size, devices=devices[:count])


def _all_devices(config: ConfigDict) -> list:
    """JAX's devices, of all processes, once these are seen to run the same config and to be what it counts on."""
    check_same("the config", json.dumps(to_json(config), default=str))
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    check_processes(jax.device_count() if devices in (-1, "auto") else devices * nodes, nodes)
    return jax.devices()


def build_ask(model: Model, encoder):
    """-> weights {path: array} -> what asks them: (batch, max_new_tokens) -> texts, one a row, greedy. encoder: of the prompts."""

    def ask(weights: dict[str, jax.Array]):
        speaker = Speaker(Weights(model.graphdef, weights, has_cache=model.pipeline.stages == 1), encoder.tokenizer, *encoder.stops)

        def generate(batch: dict, max_new_tokens: int) -> list[str]:
            rows = len(batch["tokens"])
            wider = rows + -rows % model.pipeline.stages  # what virtual stages take
            batch = {name: np.resize(field, (wider, *field.shape[1:])) for name, field in batch.items()}
            answers = speaker.answers(batch, Sampling(max_new_tokens), row_keys(0, np.arange(wider)))
            return [answer.text for answer in answers[:rows]]

        return generate

    return ask


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
        name = next((p for p in (getattr(k, "key", None) for k in path) if p in model.shardings), None)
        sharding = model.shardings[name] if name else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=also_over_data(sharding, leaf.shape) if name in params and over_data else sharding)

    state = jax.eval_shape(first_state(model, optimizer), params)
    state = {name: jax.tree_util.tree_map_with_path(place, tree) for name, tree in state.items()}
    return state | {"params": params}


def first_state(model: Model, optimizer):
    """-> function of the trainable weights: the state of training/step.py before the first step."""
    fp8 = {"recipe": model.fp8.recipe, "scales": model.fp8.scales} if model.fp8 else {}
    return functools.partial(init_state, optimizer=optimizer, draws=model.lora is not None, **fp8)


def build_step(config: ConfigDict, model: Model, optimizer, mesh: Mesh):
    """The step of training/step.py, jitted, its state donated: the very same in training, in the planner and in the tests of compiled graphs."""
    step = make_train_step(
        model.dropout.graphdef if model.dropout else model.graphdef, optimizer, clip=config.trainer.gradient_clip_val, num_shards=batch_shards(mesh),
        reduction=config.model.loss_reduction,
        accumulate_dtype=ACCUMULATE[config.model.optim.grad_accum_dtype], recipe=model.fp8.recipe if model.fp8 else None, pipeline=model.pipeline,
        drop=model.dropout.draw if model.dropout else None,
    )  # fmt: skip
    state = model.pipeline.live(abstract_state(config, model, optimizer, mesh))
    where = jax.tree.map(lambda leaf: leaf.sharding, state), None  # of the new state; left to XLA it would move, and donation with it
    step = jax.jit(step, donate_argnums=0, out_shardings=where, compiler_options=compiler_options(config, mesh))
    return build_fp8.CheckedStep(step, model.fp8.check_compiled) if model.fp8 and on_gpu(mesh) else step


def intervals(config: ConfigDict, train: Split) -> tuple[int, int, int]:
    """-> steps between log lines, validations, checkpoints (0: none). A float val_check_interval is a share of an epoch."""
    interval = config.trainer.val_check_interval
    if isinstance(interval, float):
        interval = max(1, int(interval * len(train.ids) / train.global_batch_size))
    every = config.exp_manager.checkpoint_callback_params.every_n_train_steps or interval
    return config.trainer.log_every_n_steps, interval, every if config.exp_manager.create_checkpoint_callback else 0


def build_checkpoints(config: ConfigDict, run: Path) -> Checkpoints:
    c = config.exp_manager.checkpoint_callback_params
    return Checkpoints(c.dirpath or run / "checkpoints", monitor=c.monitor, mode=c.mode, save_top_k=c.save_top_k, save_last=c.save_last)


def resume_step(config: ConfigDict, run: Path, checkpoints: Checkpoints) -> int | None:
    """The step to resume this run from, None to start afresh."""
    c, step = config.exp_manager, checkpoints.latest_step()
    if not c.resume_if_exists:
        if step is not None:
            raise UserError(f"{run} holds a run at global_step={step} already; set exp_manager.resume_if_exists=True to continue it, or give another name")
        return None
    if step is None and not c.resume_ignore_no_checkpoint:
        raise UserError(f"{run}: no checkpoint to resume from; set exp_manager.resume_ignore_no_checkpoint=True to start afresh")
    return step


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict:
    """What the step is compiled with; deterministic: the same bits every run on a GPU too; fp8: so that XLA finds the FP8 GEMMs."""
    if not on_gpu(mesh):
        return {}
    options = {"xla_gpu_dot_merger_threshold_mb": 0}  # XLA would make one GEMM of q, k and v, and copy their weights into one for it, each time
    return options | ({"xla_gpu_deterministic_ops": True} if config.trainer.deterministic else {}) | (build_fp8.COMPILER_OPTIONS if config.model.fp8 else {})


def on_gpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform in ("gpu", "cuda")
