"""The proof of an export: the written directory is opened anew, both models read the same picture and tokens, and what they say is compared.

Both run a layer at a time in float32, so that a model larger than memory is proven too. Given up: a tower alone, which says nothing.
"""

import time
from pathlib import Path

import jax
import numpy as np

from neva_jax.build.opened import Opened, opened
from neva_jax.inference.streamed import logits
from neva_jax.models.multimodal import NevaConfig

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


def compare(before: Opened, output: Path, parts: tuple[str, ...], bases=()) -> dict:
    """bases: of an output that is not whole. -> max_logit_difference, tokens_equal (whether the likeliest next token is the same at every position) and
    seconds_comparing. Nulls where no text comes out."""
    start = time.perf_counter()
    if "llm" not in parts:
        return {"max_logit_difference": None, "tokens_equal": None}
    text_only = "vision_encoder" not in parts
    batch = probe(before.neva, text_only=text_only)
    with opened(output, field="--output", bases=bases) as after, jax.default_matmul_precision("highest"):
        ours, theirs = (logits(model.neva, model.merged().arrays(parts), batch, text_only=text_only) for model in (before, after))
    known = theirs[..., : ours.shape[-1]]  # rows for new tokens come behind
    same = bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    return {"max_logit_difference": float(np.max(np.abs(ours - known))), "tokens_equal": same, "seconds_comparing": round(time.perf_counter() - start, 2)}


def compare_adapters(before: Opened, output: Path, bases: list) -> dict:
    """The same of adapters, put on the model they came from. bases: where it lies. Nulls where it is not here."""
    if not all(path in before.origin for path in before.adapters) or not {"projector", "vision_encoder"} <= {*before.parts} | {before.neva.projector}:
        return {"max_logit_difference": None, "tokens_equal": None}
    return compare(before.merged(), output, before.parts, bases)
