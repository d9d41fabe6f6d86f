"""Which records make which global batch: a pure function of seed, epoch and lengths. Workers, hosts and devices change nothing of it.

The epochs' permutations, one behind the other, are one endless stream of record ids; epoch e owns the whole global batches of that stream that end in it. So
what an epoch leaves over (fewer records than a batch) opens the next one, and every record comes once an epoch. An epoch is sorted by bucket, so that a
batch holds records of one shape; the sort is stable, so which of them meet is still the permutation's choice; and the batches are shuffled again.
Several files with shares are drawn by data/blend.py in place of a permutation, and all else is as for one. Their shares hold over an epoch; where files differ
in length or pictures, a batch may come from one of them alone. Without length grouping the shares hold in every batch.
"""

import bisect
import functools
from typing import NamedTuple

import numpy as np

from neva_jax.data.blend import Blend

GRAIN = 16  # token lengths of automatic buckets are multiples of it
SUPERVISED_GRAIN = 64  # K is a multiple of it: the loss's chunk


class Lengths(NamedTuple):
    """Per record: int32[R] each: tokens (what the model reads), supervised targets, media."""

    tokens: np.ndarray
    supervised: np.ndarray
    media: np.ndarray

    def select(self, ids: np.ndarray) -> "Lengths":
        return Lengths(*(column[ids] for column in self))


class Bucket(NamedTuple):
    """The shape of a batch: T text positions, K supervised positions, N media, each per row."""

    tokens: int
    supervised: int
    media: int


def make_buckets(lengths: Lengths, token_lengths: tuple[int, ...] | None = None, num_lengths: int = 8, blend: Blend | None = None) -> tuple[Bucket, ...]:
    """Every combination of T and N that the records need, smallest first. K never truncates: it is the most that a record of T tokens supervises.

    token_lengths: the T's, ascending; None: at most `num_lengths` multiples of 16 that waste the least padding, records counted as often as `blend` draws them.
    """
    longest = int(lengths.tokens.max())
    draws = np.repeat(blend.draws_per_record(), blend.sizes) if blend else np.ones(len(lengths.tokens))
    ts = token_lengths or _best_lengths(lengths.tokens, draws, num_lengths)
    ts = sorted({*(t for t in ts if t < longest), min((t for t in ts if t >= longest), default=-(-longest // GRAIN) * GRAIN)})
    counts = np.unique(lengths.media)
    buckets = []
    for n in counts:
        for t in ts:
            supervised = lengths.supervised[(lengths.tokens <= t) & (lengths.media <= n)]
            if len(supervised):
                buckets.append(Bucket(t, max(1, -(-int(supervised.max()) // SUPERVISED_GRAIN)) * SUPERVISED_GRAIN, int(n)))
    return tuple(sorted(buckets, key=lambda b: (b.media, b.tokens)))


def _best_lengths(tokens: np.ndarray, draws: np.ndarray, count: int) -> list[int]:
    """At most `count` bucket lengths with the fewest padded tokens, by dynamic programming over multiples of 16. draws: how often each record counts."""
    bins = -(-tokens // GRAIN)
    top = int(bins.max())
    number = np.cumsum(np.bincount(bins, draws, minlength=top + 1))  # draws of at most b grains
    best, back = [number * np.arange(top + 1)], []  # cost of covering all records up to b with one length b
    for _ in range(count - 1):
        cost = np.empty(top + 1)
        choice = np.zeros(top + 1, np.int64)
        for b in range(top + 1):
            options = best[-1][: b + 1] + (number[b] - number[: b + 1]) * b
            choice[b] = int(np.argmin(options))
            cost[b] = options[choice[b]]
        best.append(cost)
        back.append(choice)
    lengths, b = {top}, top
    for choice in reversed(back):
        b = int(choice[b])
        lengths.add(b)
    return [b * GRAIN for b in sorted(lengths) if b]


def bucket_of(lengths: Lengths, ids: np.ndarray, buckets: tuple[Bucket, ...]) -> Bucket:
    """The smallest bucket that holds every one of `ids` whole."""
    need = [int(column[ids].max()) for column in lengths]
    fitting = [b for b in buckets if b.tokens >= need[0] and b.supervised >= need[1] and b.media >= need[2]]
    return min(fitting, key=lambda b: (b.tokens, b.media, b.supervised))


def num_batches_before(epoch: int, num_records: int, global_batch_size: int) -> int:
    """Whole global batches of the epochs before `epoch`."""
    return epoch * num_records // global_batch_size


def plan(
    seed: int | None,
    epoch: int,
    lengths: Lengths,
    global_batch_size: int,
    buckets: tuple[Bucket, ...],
    length_grouping: bool = True,
    blend: Blend | None = None,
) -> list[tuple[Bucket, np.ndarray]]:
    """-> [(bucket, ids int64[global_batch_size])], the global batches of an epoch. seed None: file order, nothing grouped. blend: the shares of files."""
    size, num_records = global_batch_size, len(lengths.tokens)
    first, last = (num_batches_before(e, num_records, size) * size for e in (epoch, epoch + 1))
    epochs = range(first // num_records, epoch + 1)
    ids = np.concatenate([blend.epoch(seed, e) if blend else _permutation(seed, e, num_records) for e in epochs])
    offset = first // num_records * num_records
    ids = ids[first - offset : last - offset]
    if seed is None or not length_grouping:
        batches = ids.reshape(-1, size)
    else:
        batches = ids[np.argsort(_order(lengths, buckets)[ids], kind="stable")].reshape(-1, size)
        batches = batches[np.random.default_rng([seed, epoch, 1]).permutation(len(batches))]
    return [(bucket_of(lengths, batch, buckets), batch) for batch in batches]


def _permutation(seed: int | None, epoch: int, num_records: int) -> np.ndarray:
    return np.arange(num_records) if seed is None else np.random.default_rng([seed, epoch, 0]).permutation(num_records)


def _order(lengths: Lengths, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Sort key of every record: media first, then the token length of its bucket."""
    ts = np.array(sorted({b.tokens for b in buckets}))
    return lengths.media * len(ts) + np.searchsorted(ts, lengths.tokens)


class Plan:
    """The sequence of training batches: `plan[b]` is global batch b of the run, so a run resumes at `plan[consumed_samples // global_batch_size]`.

    once: a single pass (NeMo's dataloader_type single), what does not fill a batch dropped, and an IndexError behind it; otherwise epochs follow one another
    without end. blend: the shares of files, else each record comes once an epoch.
    """

    def __init__(
        self,
        seed: int | None,
        lengths: Lengths,
        global_batch_size: int,
        buckets: tuple[Bucket, ...],
        length_grouping: bool = True,
        once: bool = False,
        blend: Blend | None = None,
    ):
        self.args = (lengths, global_batch_size, buckets, length_grouping, blend)
        self.seed, self.buckets, self.blend = seed, buckets, blend
        self.num_records, self.size = len(lengths.tokens), global_batch_size
        self.num_batches = self.num_records // global_batch_size if once else None
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int):
        return plan(self.seed, epoch, *self.args)

    def epoch_of(self, batch: int) -> int:
        """The epoch whose plan holds global batch `batch`."""
        epochs = range((batch + 1) * self.size // self.num_records + 2)
        return bisect.bisect_right(epochs, batch, key=lambda epoch: num_batches_before(epoch, self.num_records, self.size)) - 1

    def __getitem__(self, batch: int):
        if batch < 0 or (self.num_batches is not None and batch >= self.num_batches):
            raise IndexError(f"batch {batch} of {'an endless plan' if self.num_batches is None else f'a pass of {self.num_batches}'}")
        epoch = self.epoch_of(batch)
        return self._epoch(epoch)[batch - num_batches_before(epoch, self.num_records, self.size)]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)


class FixedPlan:
    """Every record once, in batches of similar length, the same every time: validation. The last batch is filled with -1, which become empty rows."""

    def __init__(self, lengths: Lengths, global_batch_size: int, buckets):
        ids = np.argsort(_order(lengths, buckets), kind="stable")
        rows = [ids[i : i + global_batch_size] for i in range(0, len(ids), global_batch_size)]
        self.batches = [(bucket_of(lengths, row, buckets), np.pad(row, (0, global_batch_size - len(row)), constant_values=-1)) for row in rows]
        self.num_batches = len(rows)

    def __getitem__(self, batch: int):
        return self.batches[batch]


def padding_share(lengths: Lengths, batches) -> float:
    """Share of text positions in `batches` ([(bucket, ids)], -1 for an empty row) that hold no token."""
    positions = sum(bucket.tokens * len(ids) for bucket, ids in batches)
    return 1 - sum(int(lengths.tokens[ids[ids >= 0]].sum()) for _, ids in batches) / positions


def local_rows(ids: np.ndarray, *, micro_batch_size: int, num_shards: int, shards: range) -> np.ndarray:
    """The rows of a global batch that a process reads: row r of micro-batch m on data shard d is ids[m * MBS * D + d * MBS + r].

    num_shards: D, of which this process holds `shards` -> ids of int64[M * len(shards) * MBS], micro-batch by micro-batch.
    """
    return ids.reshape(-1, num_shards, micro_batch_size)[:, shards.start : shards.stop].reshape(-1)
