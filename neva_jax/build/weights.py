"""Where a fresh run's weights come from."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from neva_jax.build.architecture import fields_of
from neva_jax.build.lora import check_same_adapters
from neva_jax.convert.adapters import base_record, check_record
from neva_jax.convert.keymap import some
from neva_jax.errors import UserError
from neva_jax.hub import is_run, load_weights, open_base, open_weights, origins, run_of
from neva_jax.transforms.lora import adapters_of, is_adapter

log = logging.getLogger(__name__)


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
        _expect(field, path)
    return given


def _expect(field: str, path: str) -> None:
    if not Path(path).exists():
        raise UserError(f"{field}: there is no {path}; expected a local path (nothing is downloaded)")


def start_weights(config: ConfigDict, model) -> tuple[dict, dict, dict]:
    """A fresh run's weights, for a build.model.Model -> (params, frozen, {path: source}). What no source has is born random: for a frozen part an error.

    Of frozen weights that FP8 stores quantised, only those of a published source already are: the run has the others to copy first.
    """
    given, adapters = weight_paths(config), open_adapters(config, model)
    if model.lora:
        _check_given(config, model, given)
    sources = adapters + [s for field, path, parts in given for s in open_weights(path, model.config, field, parts, lora=model.lora)]
    targets = {path: model.loaded(path) for path in model.weights}
    _check_adapters(config, model, adapters, sources)
    published = {path for path, source in origins(targets, sources).items() if source.published is not None}
    arrays, origin = load_weights(targets, sources, {path: store for path, store in model.stores.items() if path in published})
    missing = [path for path in model.weights if path not in arrays]
    frozen_parts = sorted({path.split("/")[0] for path in missing if path not in model.rows})
    if frozen_parts and not config.model.mm_cfg.allow_random_frozen:
        fields = {"llm": "model.mm_cfg.llm.from_pretrained", "vision_encoder": "model.mm_cfg.vision_encoder.from_pretrained"}
        named = " and ".join(f"{part} (set {fields.get(part, 'model.restore_from_path')})" for part in frozen_parts)
        advice = "a frozen part that starts random learns nothing: give its weights, or all of it by restore_from_path"
        raise UserError(f"frozen without weights: {named}; {advice}, or set model.mm_cfg.allow_random_frozen=True")
    for part in sorted({path.split("/")[0] for path in missing}):
        new = [is_adapter(path) for path in missing if path.startswith(f"{part}/")]
        words = [f"{count} {what}" for count, what in ((len(new) - sum(new), "weights"), (sum(new), "weights of adapters")) if count]
        log.info(f"{part}: {' and '.join(words)} start random")
    arrays |= model.random(missing)
    params = {path: arrays[path] for path in model.rows}
    return params, {path: array for path, array in arrays.items() if path not in params}, origin


# ---- adapters --------------------------------------------------------------------------------------------------------------------------------------------


def open_adapters(config: ConfigDict, model) -> list:
    """The sources of `model.peft.restore_from_path`: a run of ours, a directory of Hugging Face's peft, a .nemo of adapters."""
    field, path = "model.peft.restore_from_path", config.model.peft.restore_from_path
    if model.lora is None or path is None:
        return []
    _expect(field, path)
    fields = fields_of(path, field)
    if not fields.get("model.peft.peft_scheme"):
        raise UserError(f"{field}: {path} holds no LoRA adapters; give a run that has them, a directory of peft or a .nemo of adapters")
    check_same_adapters(config, fields, model.lora, model.weights, f"{field}: {path}")
    parts = ("llm", "projector")
    found = open_weights(path, model.config, field, parts, lora=model.lora)[:1]  # of a run its checkpoint, not what it stands on
    for source in found:
        source.shapes = {path: shape for path, shape in source.shapes.items() if is_adapter(path) or path.startswith("projector/")}
        if other := [path for path in source.shapes if path.startswith("projector/") and path not in model.weights]:
            kind = model.config.projector
            raise UserError(f"{field}: {path} holds another projector than model.mm_cfg.mm_mlp_adapter_type {kind} ({some(other, 2)}); set that to what it is")
    return found


def _check_given(config: ConfigDict, model, given: list) -> None:
    """Adapters that come with other weights are taken over as well, and have to be those that are asked for."""
    for field, path, parts in given:
        fields = fields_of(path, field) if "llm" in parts else {}
        if not fields.get("model.peft.peft_scheme"):
            continue
        if config.model.peft.restore_from_path is not None:
            raise UserError(f"{field}: {path} holds LoRA adapters too; merge them into their base first, or leave model.peft.restore_from_path out")
        check_same_adapters(config, fields, model.lora, model.weights, f"{field}: {path}")


def _check_adapters(config: ConfigDict, model, adapters: list, sources: list) -> None:
    """Nothing of a source's adapters is dropped, and those that were trained beside another base are refused."""
    lost = [(source, path) for source in sources for path in source.shapes if is_adapter(path) and path not in model.weights]
    if lost:
        source, path = lost[0]
        place = getattr(source, "path", getattr(source, "directory", ""))
        raise UserError(
            f"{place}: holds {len(lost)} weights of LoRA adapters that this config does not ask for ({path}, ...); merge them into their base first (python "
            "convert_torch.py --input RUN --output DIR --to orbax --merge_lora), or set model.peft as it was where they were trained"
        )
    pairs = adapters_of(model.weights, model.lora)
    lazy = lambda found: {kernel: source.lazy(kernel, model.weights[kernel].shape) for kernel, source in found.items()}  # noqa: E731
    homes, kernels, path = origins({pair[0] for pair in pairs.values()}, sources), lazy(origins(pairs, sources)), config.model.peft.restore_from_path
    if not homes:
        return
    home = next(iter(homes.values()))
    recorded, where = getattr(home, "recorded_base", None), f"the adapters in {getattr(home, 'path', getattr(home, 'directory', ''))}"
    if adapters and is_run(run_of(Path(path))):
        recorded, where = base_record(lazy(origins(pairs, open_base(run_of(Path(path)), model.config))), None), f"model.peft.restore_from_path: {path}"
    if recorded and recorded["kernels"] and not kernels:
        raise UserError(f"{where}: trained for another base: theirs were weights, and those of this run start random; give them by restore_from_path")
    check_record(recorded, kernels, where, "the base of this run")
