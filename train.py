"""Train a NeVA model: python train.py --config configs/pretrain.py [--config.model.micro_batch_size=8 ...]

One run, top to bottom. What a run leaves in its directory: config.json, preprocessor_config.json, metrics.jsonl, tensorboard/, checkpoints/, base/ and
base.json (the frozen weights it stands on), and with `evaluation.questions` set, evaluation.json and answers.png.
"""

import contextlib
import functools
import json
import logging

import jax
import numpy as np

from neva_jax import cli, hub
from neva_jax.build import data as build_data
from neva_jax.build import model as build_model
from neva_jax.build import run as build_run
from neva_jax.build.export import save_processor
from neva_jax.build.score import build_score
from neva_jax.build.trained import describe_parts
from neva_jax.build.weights import start_weights
from neva_jax.checkpoint.base import record_base
from neva_jax.config import architecture, compare_architecture, to_json
from neva_jax.errors import UserError
from neva_jax.evaluation import show
from neva_jax.parallel.devices import peak_flops
from neva_jax.parallel.distributed import joined
from neva_jax.parallel.sharding import batch_sharding
from neva_jax.training.metrics import Clock, Metrics, Work
from neva_jax.training.step import make_eval_step
from neva_jax.training.stop import StopRequest
from neva_jax.training.watch import Watch

log = logging.getLogger(__name__)


def main(config) -> dict[str, float]:
    """Runs a config to its end, or to a stop request -> the last metrics; exits with 128 + the signal's number after one.

    As one of several processes that a launcher started (launch/), all calling this, it runs the same config together with the others.
    """
    with joined(), contextlib.closing(StopRequest()) as stop:
        report = story(config, stop)
    if stop.agreed:
        raise SystemExit(128 + stop.agreed)
    return report


def story(config, stop: StopRequest) -> dict[str, float]:
    # ---- where: directory, devices ---------------------------------------------------------------------------------------------------------------
    run, mesh = build_run.log_dir(config), build_run.build_mesh(config)
    first_process = jax.process_index() == 0
    jax.set_mesh(mesh)
    log.info(f"run {run}; {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}")

    # ---- model and optimizer, described but not built ----------------------------------------------------------------------------------------------
    tokenizer = build_data.build_tokenizer(config)
    model = build_model.build_model(config, build_model.neva_config(config, tokenizer.vocab_size), mesh)
    optimizer, learning_rate = build_run.build_optimizer(config, model)
    abstract_state = build_run.abstract_state(config, model, optimizer, mesh)
    log.info(describe_parts(model))

    # ---- data --------------------------------------------------------------------------------------------------------------------------------------
    train, validation = build_data.build_data(config, tokenizer, model.config, mesh)
    max_steps, size = build_data.num_steps(config, train), train.global_batch_size
    log.info(build_data.describe_data(train, validation, max_steps))
    e, ask, score = config.evaluation, build_run.build_ask(model, train.examples.encoder), build_score(config, tokenizer, model.config)

    # ---- state: 1. this run's newest checkpoint, 2. restore_from_path, 3. from_pretrained towers, 4. scratch (2-4: see build/weights.py) ----------
    checkpoints = build_run.build_checkpoints(config, run)
    first_step = build_run.resume_step(config, run, checkpoints)
    if first_step is not None:
        meta = checkpoints.meta(first_step)
        compare_architecture(meta["architecture"], architecture(config))
        if meta["global_batch_size"] != size:
            raise UserError(f"model.global_batch_size was {meta['global_batch_size']} and is {size}: the data order would not continue; restore it")
        if meta.get("data", train.fingerprint()) != train.fingerprint():
            log.warning("the data, or what decides its order, has changed since the checkpoint: the order goes on from here, but not where it was")
        state = checkpoints.restore(first_step, abstract_state)
        frozen = hub.load_base(run, {path: model.loaded(path) for path in model.weights if path not in model.rows}, model.config, model.stores)
        log.info(f"resumed at global_step={first_step}, consumed_samples={first_step * size}")
    else:
        first_step = 0
        params, frozen, origin = start_weights(config, model)
        record_base(run, frozen, origin)
        frozen = model.stored(frozen)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        state = jax.jit(build_run.first_state(model, optimizer), out_shardings=shardings, donate_argnums=0)(params)
        del params, origin
    state, frozen = model.pipeline.live((state, frozen))
    if first_process:
        (run / "config.json").write_text(json.dumps(to_json(config), indent=1))
        save_processor(config, run)

    # ---- the step ----------------------------------------------------------------------------------------------------------------------------------
    train_step = build_run.build_step(config, model, optimizer, mesh)
    eval_step = jax.jit(make_eval_step(model.graphdef, model.pipeline), compiler_options=build_run.compiler_options(config, mesh))
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    peak = peak_flops(mesh.devices.flat[0].device_kind)

    def validate() -> dict[str, float]:
        batches = validation.batches(0, build_data.num_validation_batches(config, validation))
        sums = [eval_step(state["params"] | state["scales"], frozen, jax.tree.map(put, batch)) for batch in batches]
        total, count = np.sum(jax.device_get(sums), axis=0)
        if e.num_samples and config.exp_manager.create_tensorboard_logger:
            metrics.picture("samples", step, show.samples(ask(weights()), validation.examples, validation.ids, e.num_samples, e.max_new_tokens))
        scores = score(ask(weights()), None) if score and e.every_validation and step < max_steps else {}
        clock.start(step)  # the time of a validation is not a step's
        return {"val_loss": float(total / max(count, 1))} | {f"val_{name}": value for name, value in scores.items()}

    def weights() -> dict:
        return state["params"] | state["scales"] | frozen

    # ---- the loop: a step's numbers are read and logged while the next one runs ----------------------------------------------------------------------
    metrics = Metrics(run if first_process else None, first_step=first_step, max_steps=max_steps, tensorboard=config.exp_manager.create_tensorboard_logger)
    watch, clock = Watch(train.describe, max_bad_images=config.model.data.max_bad_images), Clock(first_step)
    log_interval, validation_interval, save_interval = build_run.intervals(config, train)

    def finish(step: int, values: dict, lr: float, work: Work, extra=None) -> dict[str, float]:
        """Takes in the numbers of a step that is done -> its report, written if due. extra: what to measure now and report with it."""
        watch.read(step, values)
        clock.add(work)
        if step % log_interval and extra is None:
            return {}
        rates = clock.rates(step, mesh.size, peak)
        report = {**watch.values, "lr": lr, "consumed_samples": step * size, **rates, **(extra() if extra else {})}
        metrics.write(step, report)
        return report

    batches, step, previous, report = train.batches(first_step, max_steps), first_step, None, {}
    with contextlib.closing(checkpoints), contextlib.closing(metrics):  # also when a record ends the run
        while step < max_steps and not watch.stopping:
            batch, lr = clock.next(batches), learning_rate(step)
            if step == first_step:
                metrics.picture("training_pictures", step, show.batch_sheet(batch, tokenizer))
            state, values = train_step(state, frozen, jax.tree.map(put, batch), np.float32(lr), stop.array(mesh))
            step += 1
            if previous is not None:
                finish(*previous)
            previous = step, values, lr, Work.of(batch, build_model.batch_flops(model, batch), train.rows.share)
            validating = step % validation_interval == 0 or step == max_steps
            if validating or watch.stopping or (save_interval and step % save_interval == 0):
                report = finish(*previous, extra=validate if validating and validation is not None else dict)
                previous = None
                if save_interval:
                    meta = {"global_step": step, "consumed_samples": step * size, "global_batch_size": size, "data": train.fingerprint()}
                    meta["architecture"] = architecture(config)
                    checkpoints.save(step, model.pipeline.rest(state), meta, report)
            metrics.advance()

    # ---- the end -----------------------------------------------------------------------------------------------------------------------------------
    if watch.stopping and step < max_steps:
        saved = "saved; the same command continues" if save_interval else "not saved, since exp_manager.create_checkpoint_callback is False"
        log.info(f"stopped by signal {watch.stopping} at global_step={step}, {saved}")
        stop.agreed = watch.stopping
        return report
    return report | (score(ask(weights()), run if first_process else None) if score else {})


if __name__ == "__main__":
    cli.run(main)
