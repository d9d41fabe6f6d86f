"""What of a model trains: the rows of the trainable table that a config means, and the line that tells at the start."""

import logging
import math

from ml_collections import ConfigDict

from neva_jax.transforms.lora import PATTERN
from neva_jax.transforms.select import Row

log = logging.getLogger(__name__)


def trainable_rows(config: ConfigDict) -> list[Row]:
    """`model.trainable`, or what NeMo's peft and freeze fields mean: the projector always trains."""
    m = config.model
    if m.trainable is not None:
        return [Row(*row) for row in m.trainable]
    if m.peft.peft_scheme is not None:
        return lora_rows(config)
    rows = [Row(r"^projector/")] if m.mm_cfg.mm_mlp_adapter_type != "identity" else []
    rows += [] if m.mm_cfg.llm.freeze else [Row(r"^llm/")]
    if not m.mm_cfg.vision_encoder.freeze:
        log.warning("model.mm_cfg.vision_encoder.freeze=False trains the tower here; NeMo 1.x ran it without gradients all the same")
        rows += [Row(r"^vision_encoder/")]
    return rows


def lora_rows(config: ConfigDict) -> list[Row]:
    """What NeMo trains with LoRA: the adapters and, at a share of the learning rate, the projector."""
    projector = [] if config.model.mm_cfg.mm_mlp_adapter_type == "identity" else [Row(r"^projector/", config.model.peft.projector_lr_factor)]
    return [Row(PATTERN), *projector]


def describe_parts(model) -> str:
    """model: build.model.Model. One line a part: weights, how many of them train, and at what share of the learning rate."""
    lines = []
    for part in ("vision_encoder", "projector", "llm"):
        paths = [path for path in model.weights if path.split("/")[0] == part]
        count = sum(math.prod(model.weights[path].shape) for path in paths)
        trains = sum(math.prod(model.weights[path].shape) for path in paths if path in model.rows)
        factors = sorted({model.rows[path].lr_factor for path in paths if path in model.rows})
        lines.append(f"{part}: {count:,} weights, {trains:,} train" + (f" at {', '.join(map(str, factors))} x the learning rate" if trains else ""))
    return "; ".join(lines)
