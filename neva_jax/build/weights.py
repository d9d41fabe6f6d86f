"""Where a fresh run's weights come from."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from neva_jax.errors import UserError
from neva_jax.hub import load_weights, open_weights, origins

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
        if not Path(path).exists():
            raise UserError(f"{field}: there is no {path}; expected a local path (nothing is downloaded)")
    return given


def start_weights(config: ConfigDict, model) -> tuple[dict, dict, dict]:
    """A fresh run's weights, for a build.model.Model -> (params, frozen, {path: source}). What no source has is born random: for a frozen part an error.

    Of frozen weights that FP8 stores quantised, only those of a published source already are: the run has the others to copy first.
    """
    sources = [s for field, path, parts in weight_paths(config) for s in open_weights(path, model.config, field, parts)]
    targets = {path: model.loaded(path) for path in model.weights}
    published = {path for path, source in origins(targets, sources).items() if source.published is not None}
    arrays, origin = load_weights(targets, sources, {path: store for path, store in model.stores.items() if path in published})
    missing = [path for path in model.weights if path not in arrays]
    frozen_parts = sorted({path.split("/")[0] for path in missing if path not in model.rows})
    if frozen_parts and not config.model.mm_cfg.allow_random_frozen:
        fields = {"llm": "model.mm_cfg.llm.from_pretrained", "vision_encoder": "model.mm_cfg.vision_encoder.from_pretrained"}
        named = " and ".join(f"{part} (set {fields.get(part, 'model.restore_from_path')})" for part in frozen_parts)
        advice = "a frozen part that starts random learns nothing: give its weights, or set model.mm_cfg.allow_random_frozen=True"
        raise UserError(f"frozen without weights: {named}; {advice}")
    for part in sorted({path.split("/")[0] for path in missing}):
        log.info(f"{part}: {sum(path.startswith(part + '/') for path in missing)} weights start random")
    arrays |= model.random(missing)
    params = {path: arrays[path] for path in model.rows}
    return params, {path: array for path, array in arrays.items() if path not in params}, origin
