"""The order of a run: the same records in the same batches for any number of workers and processes, and from any batch that a run resumes at."""

import functools
import itertools

import numpy as np
import pytest

from neva_jax.data.blend import Blend
from neva_jax.data.example import Example
from neva_jax.data.pipeline import Rows, batches
from neva_jax.data.plan import Lengths, Plan, make_buckets

SIZE, MBS, SHARDS = 16, 2, 4  # a global batch: two micro-batches of two rows on each of four data shards
SIZES = (41, 19)
KINDS = ("cyclic", "cyclic ungrouped", "single", "blend", "blend single")


class Numbers:
    """Records that are their own number, 1 to 90 times; every third has a picture of one pixel. Workers import this file, and are to stay small."""

    no_media = np.zeros((0, 1, 1, 3), np.uint8)

    def __getitem__(self, index):
        ids = np.full(1 + index * 37 % 90, index, np.int32)
        return Example(ids, ids, np.full_like(ids, -1), np.full((int(index % 3 == 0), 1, 1, 3), index, np.uint8))


@functools.cache
def planned(kind):
    examples = [Numbers()[i] for i in range(sum(SIZES))]
    lengths = Lengths(*np.array([(len(e.tokens), len(e.labels), len(e.media)) for e in examples]).T)
    blend = Blend(SIZES, (0.4, 0.6)) if kind.startswith("blend") else None
    seed = None if "single" in kind else 11
    return Plan(seed, lengths, SIZE, make_buckets(lengths, num_lengths=3, blend=blend), kind != "cyclic ungrouped", kind == "single", blend)


def last(plan):
    """Three epochs and a batch, or all of a pass."""
    return plan.num_batches or 3 * sum(SIZES) // SIZE + 1


def read(plan, *, start=0, shards=range(SHARDS), num_workers=0):
    """[(record numbers [M, B], T, pictures)] of the batches that a process gets."""
    rows, ids = Rows(MBS, SHARDS, shards), np.arange(sum(SIZES))
    found = batches(Numbers(), plan, rows, ids=ids, start=start, stop=last(plan), global_batch_size=SIZE, num_workers=num_workers)
    return [(batch["tokens"][..., 0], batch["tokens"].shape[2], batch["media"]) for batch in found]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    return all(np.array_equal(a, b) for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_plan(kind):
    """Every batch is whole and in its bucket's shape; a pass is the file's order, epochs are permutations."""
    plan = planned(kind)
    found = read(plan)
    for b, (numbers, length, media) in enumerate(found):
        bucket, ids = plan[b]
        assert numbers.reshape(-1).tolist() == ids.tolist() and (length, media.shape[2]) == (bucket.tokens, bucket.media)
        assert [int(m.max(initial=0)) for m in media.reshape(SIZE, -1)] == [i if i % 3 == 0 else 0 for i in ids]
    drawn = np.concatenate([numbers.reshape(-1) for numbers, *_ in found])
    if kind == "single":
        assert drawn.tolist() == list(range(sum(SIZES) // SIZE * SIZE))
    elif not plan.blend:
        assert (np.bincount(drawn[: 3 * sum(SIZES) // SIZE * SIZE], minlength=sum(SIZES)) >= 2).all() and np.bincount(drawn).max() <= 4
    if kind == "blend single":
        large, small = drawn[drawn < SIZES[0]], drawn[drawn >= SIZES[0]] - SIZES[0]
        assert large.tolist() == [i % SIZES[0] for i in range(len(large))] and small.tolist() == [i % SIZES[1] for i in range(len(small))]
        assert abs(len(small) - 0.6 * len(drawn)) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes(kind, num_processes):
    """The processes' rows side by side are the global batches; each process makes its own plan."""
    whole, per_process = read(planned(kind)), SHARDS // num_processes
    parts = []
    for process in range(num_processes):
        planned.cache_clear()
        parts.append(read(planned(kind), shards=range(process * per_process, (process + 1) * per_process)))
    joined = [(np.concatenate([p[0] for p in batch], 1), batch[0][1], np.concatenate([p[2] for p in batch], 1)) for batch in zip(*parts, strict=True)]
    assert same(joined, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_any_batch(kind):
    """With a fresh plan each time, as a new program has."""
    whole = read(planned(kind))
    for start in range(len(whole) + 1):
        planned.cache_clear()
        assert same(read(planned(kind), start=start), whole[start:])


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers(num_workers):
    """From the middle of an epoch on, as one of two processes. Slow: a worker takes seconds to start, and that real ones keep the order is the point."""
    plan, start, shards = planned("blend"), 2, range(2, 4)
    assert same(read(plan, start=start, shards=shards, num_workers=num_workers), read(plan, start=start, shards=shards))
