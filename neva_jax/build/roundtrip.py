"""The proof of an export: the written directory is opened anew, both models read the same picture and tokens, and what they say is compared.

Both run a layer at a time in float32, so that a model larger than memory is proven too. Given up: a tower alone, which says nothing.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from neva_jax.build.lora import with_adapters
from neva_jax.build.opened import Opened, opened
from neva_jax.convert.source import PARTS
from neva_jax.hub import open_weights
from neva_jax.inference.streamed import logits
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.transforms.lora import Target, is_adapter
from neva_jax.transforms.select import describe

LENGTH, NUM_MEDIA_TOKENS = 24, 8


def probe(config: NevaConfig, *, text_only: bool) -> dict[str, np.ndarray]:
    """A batch of one row: random tokens and, if pictures are read, a random picture, some of whose features stand among the tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.llm.vocab_size, (1, LENGTH), dtype=np.int32)
    media_index, side = np.full((1, LENGTH), -1, np.int32), 1 if text_only else config.vision.image_size
    if not text_only:
        media_index[0, 1 : 1 + NUM_MEDIA_TOKENS] = np.linspace(0, config.media_length - 1, NUM_MEDIA_TOKENS, dtype=np.int32)
    return {
        "tokens": tokens, "position_ids": np.arange(LENGTH, dtype=np.int32)[None], "segment_ids": np.ones((1, LENGTH), np.int32),
        "media_index": media_index, "media": rng.integers(0, 256, (1, 1, side, side, 3), dtype=np.uint8),
    }  # fmt: skip


def compare(before: Opened, output: Path, parts: tuple[str, ...]) -> dict:
    """-> max_logit_difference, tokens_equal (whether the likeliest next token is the same at every position) and
    seconds_comparing. Nulls where no text comes out."""
    if "llm" not in parts:
        return {"max_logit_difference": None, "tokens_equal": None}
    with opened(output, field="--output") as after:
        return difference(before, after, parts)


def difference(before: Opened, after: Opened, parts: tuple[str, ...]) -> dict:
    start, text_only = time.perf_counter(), "vision_encoder" not in parts
    batch = probe(before.neva, text_only=text_only)
    with jax.default_matmul_precision("highest"):
        ours, theirs = (logits(model.neva, model.arrays(parts), batch, text_only=text_only) for model in (before, after))
    known = theirs[..., : ours.shape[-1]]  # rows for new tokens come behind
    same = bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    return {"max_logit_difference": float(np.max(np.abs(ours - known))), "tokens_equal": same, "seconds_comparing": round(time.perf_counter() - start, 2)}


def compare_adapters(before: Opened, output: Path) -> dict:
    """The same of adapters that were written for peft: read back, and put on the model they came from. Nulls where that is not here."""
    whole = {"llm"} | ({"vision_encoder", "projector"} & {*before.parts})
    parts = tuple(part for part in PARTS if part in whole)
    if len(before.kernels()) < len(before.adapters) or len(whole) == 2:
        return {"max_logit_difference": None, "tokens_equal": None}
    lora = dataclasses.replace(before.lora, targets=tuple(Target(target.pattern) for target in before.lora.targets))
    (source,) = open_weights(output, before.neva, "--output", ("llm", "projector"), lora=lora)
    weights = describe(lambda: with_adapters(neva(before.neva, rngs=nnx.Rngs(0)), lora, 0))[1]
    origin = {path: home for path, home in before.origin.items() if not is_adapter(path)} | dict.fromkeys(source.shapes, source)
    return difference(before.merged(), dataclasses.replace(before, lora=lora, weights=weights, origin=origin).merged(), parts)
