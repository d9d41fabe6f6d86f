"""How long records are, and what padding each way of bucketing them would cost."""

import functools
import logging

import numpy as np

from neva_jax.data.blend import Blend
from neva_jax.data.example import Examples
from neva_jax.data.lengths import read_lengths
from neva_jax.data.plan import Lengths, make_buckets, padding_share, plan
from neva_jax.data.sweep import sweep
from neva_jax.errors import DataError, UserError

log = logging.getLogger(__name__)

NUM_LENGTHS = 8  # token lengths that training chooses where model.data.buckets is null


def survey(examples: Examples, cache_dir: str, num_workers: int = 0) -> tuple[Lengths, np.ndarray]:
    """-> the lengths of the records that can be encoded, and which they are: int64[R]. Raises UserError if none can be.

    Of a sound set from the index that training keeps, which is made here if it is not there.
    """
    try:
        return read_lengths(examples, cache_dir, num_workers), np.arange(len(examples))
    except DataError as error:
        first = error
    log.warning(f"no index of all records can be made ({first}); defective ones are left out here, --validate finds them all")
    table = np.concatenate(list(sweep(functools.partial(functools.partial, _measured), examples, num_workers, "measuring")))
    ids = np.flatnonzero(table[:, 0] >= 0)
    if not len(ids):
        raise UserError(f"no record can be encoded; the first error: {first}")
    return Lengths(*table[ids].T), ids


def _measured(examples: Examples, chunk: range) -> np.ndarray:
    """int32[n, 3]: tokens, supervised targets, media; -1 for a defective record."""
    table = np.full((len(chunk), 3), -1, np.int32)
    for place, index in enumerate(chunk):
        try:
            stream = examples.stream(index)
        except DataError:
            continue
        table[place] = len(stream.ids) - examples.encoder.extra_token, stream.supervised[1:].sum(), stream.num_media
    return table


def summary(values: np.ndarray) -> dict[str, float]:
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
    return {"min": int(values.min()), "median": p50, "mean": float(values.mean()), "p90": p90, "p99": p99, "max": int(values.max())}


def histogram(values: np.ndarray, most: int = 24) -> dict[str, list[int]]:
    """{"edges": [n + 1], "counts": [n]}: at most `most` bins from the least value to the greatest, a power of two wide; bin i holds edges[i] <= value <
    edges[i + 1]."""
    low, high = int(values.min()), int(values.max())
    width = 1
    while high // width - low // width >= most:
        width *= 2
    counts = np.bincount(values // width - low // width)
    return {"edges": ((np.arange(len(counts) + 1) + low // width) * width).tolist(), "counts": counts.tolist()}


def bucketings(
    lengths: Lengths,
    global_batch_size: int,
    *,
    seed: int | None,
    token_lengths: tuple[int, ...] | None = None,
    grouping: bool = True,
    blend: Blend | None = None,
) -> list[dict]:
    """An epoch's padding under one, two, four and eight automatic token lengths, under `token_lengths` (model.data.buckets), and without grouping.

    Each: {"buckets": how many token lengths, "token_lengths", "length_grouping", "shapes": of batches, each compiled once, "padding_share": of text positions,
    "in_use": whether training would do so}. Of fewer records than a global batch, all make one batch.
    """
    size = min(global_batch_size, len(lengths.tokens))
    own = len(token_lengths or ())
    ways = [(None, count, True) for count in (1, 2, 4, NUM_LENGTHS)] + [(token_lengths, own, True)] * bool(own)
    ways.append((token_lengths, own or NUM_LENGTHS, False))
    rows = []
    for fixed, count, grouped in ways:
        buckets = make_buckets(lengths, fixed, count, blend)
        batches = plan(seed, 0, lengths, size, buckets, grouped, blend)
        row = {"buckets": count, "token_lengths": sorted({bucket.tokens for bucket in buckets}), "length_grouping": grouped}
        row |= {"shapes": len({bucket for bucket, _ in batches}), "padding_share": padding_share(lengths, batches)}
        rows.append(row | {"in_use": (fixed, grouped) == (token_lengths, grouping) and (bool(fixed) or count == NUM_LENGTHS)})
    return rows
