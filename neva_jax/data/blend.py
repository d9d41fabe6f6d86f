"""Several files as one stream of training records, each with its share of the draws (NeMo's concat_sampling_probabilities).

An epoch has as many draws as there are records in all, so that a file may repeat within it and another not be seen whole: of 100 and 10 records with equal
shares, 55 and 55 are drawn, as NeMo says. A file is an endless stream of its own permutations: all its records come before any of them comes again. Given up:
NeMo's order of the files, in which the shares are at times off by more than one draw.
"""

import functools
from typing import NamedTuple

import numpy as np

CYCLE = 2**16  # the turns of the files repeat after whole epochs of together at least so many draws
PASSES = 2**12  # records of a small file that are shuffled together, pass by pass


class Blend(NamedTuple):
    """sizes: records of each file, which lie one behind the other; shares: of the draws, of sum 1. A file of share 0 is never drawn."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...]

    def epoch(self, seed: int | None, epoch: int) -> np.ndarray:
        """The draws of an epoch, ids of int64[sum(sizes)]. seed None: each file in its own order."""
        size = sum(self.sizes)
        turns = _turns(self.shares, -(-CYCLE // size) * size)
        cycle, begin = epoch * size // len(turns), epoch * size % len(turns)
        before, now = turns[:begin], turns[begin : begin + size]
        ids = np.empty(size, np.int64)
        for file in np.unique(now):
            mine = np.flatnonzero(now == file)
            start = cycle * np.count_nonzero(turns == file) + np.count_nonzero(before == file)
            ids[mine] = sum(self.sizes[:file]) + _stream(seed, int(file), self.sizes[file], start, len(mine))
        return ids

    def draws_per_record(self) -> np.ndarray:
        """How often a record of each file is drawn in an epoch, on average: float64[files]; 0 for an empty file."""
        sizes = np.array(self.sizes)
        return np.array(self.shares) * sizes.sum() / np.maximum(sizes, 1)


@functools.lru_cache(maxsize=4)
def _turns(shares: tuple[float, ...], count: int) -> np.ndarray:
    """The file of each of `count` draws: int32[count]. After k draws every file has had its share of k, give or take less than one draw.

    Of the files whose next draw has begun to be owed, the one whose draw is due first comes: file f owes its draw j from j / share on, until (j + 1) / share.
    One machine and jobs that fill it exactly: in this order none is late, and none is early by definition.
    """
    files = [f for f, share in enumerate(shares) if share > 0]
    gap = [1 / shares[f] for f in files]
    owed, due, drawn = [0.0] * len(files), list(gap), [0] * len(files)
    turns = []
    for k in range(1, count + 1):
        first, pick = float("inf"), 0
        for i, d in enumerate(due):
            if d < first and owed[i] < k:
                first, pick = d, i
        turns.append(files[pick])
        drawn[pick] += 1
        owed[pick] = drawn[pick] * gap[pick]
        due[pick] = (drawn[pick] + 1) * gap[pick]
    turns = np.array(turns, np.int32)
    turns.setflags(write=False)
    return turns


def _stream(seed: int | None, file: int, size: int, start: int, count: int) -> np.ndarray:
    """Draws start .. start + count - 1 of a file of `size` records: its permutations, one behind the other."""
    passes = max(1, PASSES // size)
    block = passes * size
    blocks = range(start // block, -(-(start + count) // block))
    rows = np.tile(np.arange(size), (passes, 1))
    parts = [rows if seed is None else np.random.default_rng([seed, b, 0, file]).permuted(rows, axis=1) for b in blocks]
    return np.concatenate(parts, axis=None)[start - blocks.start * block :][:count]
