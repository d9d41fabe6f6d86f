"""The plan: every record once an epoch, one shape a batch, the same everywhere, and little padding."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neva_jax.data import plan as plan_module
from neva_jax.data.blend import Blend
from neva_jax.data.plan import Bucket, FixedPlan, Lengths, Plan, local_rows, make_buckets, num_batches_before, padding_share, plan


def made_up(num_records, seed=0, longest=700, media=3):
    """Lengths of records of any kind: texts, captions, long answers."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, longest + 1, num_records)
    return Lengths(*(np.asarray(c, np.int32) for c in (tokens, rng.integers(1, tokens), rng.integers(0, media, num_records))))


def llava_instruct(num_records=158_000):
    """Its three parts, with a system prompt of some 60 tokens and 256 positions of a picture."""
    rng = np.random.default_rng(0)
    part = rng.choice(3, num_records, p=(0.367, 0.146, 0.487))  # conversation, detail, complex reasoning
    text = rng.lognormal(np.log(np.choose(part, (350, 140, 170))), np.choose(part, (0.35, 0.3, 0.25)))
    tokens = np.minimum(256 + 60 + text, 4096).astype(np.int32)
    return Lengths(tokens, np.maximum(1, (0.8 * text).astype(np.int32)), np.ones(num_records, np.int32))


MIX = {  # LLaVA-1.5's mixture: records, positions of a picture, median and spread (log-normal) of the text tokens behind a system prompt of some 60
    "texts": (40_688, 0, 1100, 0.9), "llava_instruct": (157_712, 576, 230, 0.5), "vqav2": (82_783, 576, 110, 0.35), "gqa": (72_140, 576, 230, 0.4),
    "ocrvqa": (80_000, 576, 110, 0.25), "aokvqa": (66_160, 576, 75, 0.3), "okvqa": (8_998, 576, 45, 0.4), "textcaps": (21_953, 576, 50, 0.25),
    "refcoco": (48_447, 576, 330, 0.6), "visual genome": (86_417, 576, 420, 0.6),
}  # fmt: skip


def llava_mix665k():
    """The record counts are the mixture's; the text lengths are guesses at its parts: short answers, several rounds a picture, long texts cut at 2048."""
    rng = np.random.default_rng(0)
    tokens = [np.minimum(60 + picture + rng.lognormal(np.log(median), spread, count), 2048) for count, picture, median, spread in MIX.values()]
    tokens = np.concatenate(tokens).astype(np.int32)
    media = np.repeat([picture > 0 for _, picture, _, _ in MIX.values()], [count for count, *_ in MIX.values()]).astype(np.int32)
    return Lengths(tokens, np.maximum(1, (tokens - 60 - 576 * media) // 2), media)


def fits(lengths, bucket, ids):
    chosen = lengths.select(ids[ids >= 0])
    return all((column <= limit).all() for column, limit in zip(chosen, bucket, strict=True))


# ---- Every record once an epoch


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize(("num_records", "size"), [(64, 8), (100, 8), (8, 8), (5, 8), (3, 8), (1, 4), (17, 1), (1000, 48), (7, 3)])
def test_every_record_once_an_epoch(num_records, size, grouping):
    """Epoch after epoch, remainders carried: epoch e has had its records once more than e - 1, but for fewer than a batch that open the next."""
    lengths = made_up(num_records)
    buckets = make_buckets(lengths)
    seen, batches = Counter(), 0
    for epoch in range(9):
        found = plan(3, epoch, lengths, size, buckets, grouping)
        assert all(len(ids) == size and fits(lengths, bucket, ids) and bucket in buckets for bucket, ids in found)
        batches += len(found)
        seen.update(int(i) for _, ids in found for i in ids)
        assert batches == num_batches_before(epoch + 1, num_records, size) == (epoch + 1) * num_records // size
        missing = {i: epoch + 1 - seen[i] for i in range(num_records)}
        assert sum(missing.values()) == (epoch + 1) * num_records % size < size and min(missing.values()) >= 0
        assert num_records < size or max(missing.values()) <= 1


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_epoch_is_a_permutation(num_batches, size, epoch, grouping):
    lengths = made_up(num_batches * size, seed=size)
    ids = np.concatenate([ids for _, ids in plan(1, epoch, lengths, size, make_buckets(lengths), grouping)])
    assert sorted(ids) == list(range(num_batches * size))


def test_whole_epochs_are_permutations():
    """Where the batch size divides the number of records, an epoch is each record once, and no two epochs are alike."""
    lengths = made_up(96)
    epochs = [np.concatenate([ids for _, ids in plan(0, e, lengths, 8, make_buckets(lengths))]) for e in range(3)]
    assert all(sorted(ids) == list(range(96)) for ids in epochs)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(epochs, 2))


def test_grouping_takes_what_no_grouping_takes():
    """Length grouping reorders an epoch and lets nothing in or out of it, remainders included."""
    lengths = made_up(101)
    buckets = make_buckets(lengths)
    for epoch in range(5):
        grouped, plain = (np.concatenate([ids for _, ids in plan(4, epoch, lengths, 8, buckets, grouping)]) for grouping in (True, False))
        assert sorted(grouped) == sorted(plain) and grouped.tolist() != plain.tolist()


def test_without_grouping_it_is_the_plain_permutation():
    lengths = made_up(20)
    ids = np.concatenate([ids for e in range(2) for _, ids in plan(5, e, lengths, 8, make_buckets(lengths), False)])
    expected = np.concatenate([np.random.default_rng([5, e, 0]).permutation(20) for e in range(2)])
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("grouping", [True, False])
def test_no_seed_is_file_order(grouping):
    lengths = made_up(20)
    once = Plan(None, lengths, 8, make_buckets(lengths), grouping, once=True)
    assert once.num_batches == 2
    assert [once[b][1].tolist() for b in range(2)] == [list(range(8)), list(range(8, 16))]
    assert [fits(lengths, *once[b]) for b in range(2)] == [True, True]
    assert len(list(itertools.islice(once, 9))) == 2, "iteration ends where the pass does"
    for batch in (2, 3, -1):
        with pytest.raises(IndexError, match=f"batch {batch} "):
            once[batch]


# ---- A pure function, and an endless sequence


def test_pure_function():
    lengths = made_up(200)
    buckets = make_buckets(lengths)

    def ids(*args):
        return [batch.tolist() for _, batch in plan(*args)]

    first = ids(0, 1, lengths, 16, buckets)
    np.random.seed(1)
    assert ids(0, 1, lengths, 16, buckets) == first
    assert ids(1, 1, lengths, 16, buckets) != first and ids(0, 2, lengths, 16, buckets) != first


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize(("num_records", "size"), [(100, 8), (8, 8), (5, 8), (3, 8), (17, 1)])
def test_plan_is_its_epochs_end_to_end(num_records, size, grouping):
    """Also out of order, far ahead, and after a trip through pickle: what a resumed run or a worker asks for."""
    lengths = made_up(num_records)
    buckets = make_buckets(lengths)
    expected = [(e, *batch) for e in range(12) for batch in plan(9, e, lengths, size, buckets, grouping)]
    endless = Plan(9, lengths, size, buckets, grouping)
    assert endless.num_batches is None
    for b in np.random.default_rng(0).permutation(len(expected)):
        epoch, bucket, ids = expected[b]
        assert endless.epoch_of(b) == epoch and endless[b][0] == bucket and endless[b][1].tolist() == ids.tolist()
    again = pickle.loads(pickle.dumps(endless))
    assert again[len(expected) - 1][1].tolist() == expected[-1][2].tolist()


def test_an_epoch_is_planned_once():
    """A run reads its batches one by one; each epoch's permutation is made when its first batch is asked for, not for each."""
    lengths = made_up(64)
    endless = Plan(0, lengths, 8, make_buckets(lengths))
    for b in range(16):
        endless[b]
    assert endless._epoch.cache_info().misses == 2


def test_a_million_records(monkeypatch):
    """No Python loop runs over records: two permutations, one bucket search a batch."""
    calls = Counter()

    def counted(name):
        original = getattr(plan_module, name)
        monkeypatch.setattr(plan_module, name, lambda *args: calls.update([name]) or original(*args))

    for name in ("_permutation", "_order", "bucket_of"):
        counted(name)
    lengths = made_up(1_000_000, longest=2048, media=2)
    batches = plan(0, 3, lengths, 384, make_buckets(lengths))
    assert len(batches) == 1_000_000 * 4 // 384 - 1_000_000 * 3 // 384
    assert calls == {"_permutation": 2, "_order": 1, "bucket_of": len(batches)}


# ---- Buckets


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2)), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_a_bucket_holds_its_batch(records, size, seed):
    tokens, supervised, media = np.array(records, np.int32).T
    lengths = Lengths(tokens, np.minimum(supervised, tokens), media)
    buckets = make_buckets(lengths)
    assert len({b.tokens for b in buckets}) <= 8 and all(b.tokens % 16 == 0 and b.supervised % 64 == 0 and b.supervised > 0 for b in buckets)
    assert max(b.tokens for b in buckets) - tokens.max() < 16
    for bucket, ids in [*plan(seed, 0, lengths, size, buckets), *plan(seed, 1, lengths, size, buckets, False), *FixedPlan(lengths, size, buckets).batches]:
        assert bucket in buckets and fits(lengths, bucket, ids)
        smaller = [b for b in buckets if b.tokens < bucket.tokens and fits(lengths, b, ids)]
        assert not smaller, "a shorter bucket would have held it"


def test_supervised_positions_of_a_bucket():
    """K: the most that any record supervises which the bucket may hold, rounded up to 64, and no more."""
    lengths = Lengths(np.array([10, 20, 90, 100]), np.array([3, 20, 64, 65]), np.array([1, 1, 1, 0]))
    assert make_buckets(lengths, (32, 96, 128)) == (Bucket(128, 128, 0), Bucket(32, 64, 1), Bucket(96, 64, 1), Bucket(128, 128, 1))


def test_given_buckets():
    """A list that is too short grows by the longest record; lengths that nothing needs are dropped."""
    lengths = Lengths(np.array([10, 20, 100]), np.array([3, 3, 3]), np.array([1, 1, 1]))
    assert [b.tokens for b in make_buckets(lengths, (32, 64))] == [32, 64, 112]
    assert [b.tokens for b in make_buckets(lengths, (32, 256, 2048))] == [32, 256]
    assert [b.tokens for b in make_buckets(lengths, (4096,))] == [4096]


def waste(tokens, token_lengths):
    token_lengths = np.array(sorted(token_lengths))
    return int(token_lengths[np.searchsorted(token_lengths, tokens)].sum() - tokens.sum())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_automatic_buckets_are_the_best(count, seed):
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.lognormal(3.5, 0.8, 30), 160).astype(np.int32) + 1
    lengths = Lengths(tokens, np.ones_like(tokens), np.ones_like(tokens))
    found = {b.tokens for b in make_buckets(lengths, num_lengths=count)}
    top = -(-int(tokens.max()) // 16) * 16
    choices = [(*some, top) for n in range(count) for some in itertools.combinations(range(16, top, 16), n)]
    assert len(found) <= count and waste(tokens, found) == min(waste(tokens, choice) for choice in choices)


def test_padding_of_llava_instruct():
    """At most 8 % of the positions of an epoch hold nothing; in the order of the permutation it is more than half."""
    lengths = llava_instruct()
    assert 550 < lengths.tokens.mean() < 562
    buckets = make_buckets(lengths)
    assert len(buckets) <= 8
    assert padding_share(lengths, plan(0, 0, lengths, 128, buckets)) < 0.08
    assert padding_share(lengths, plan(0, 0, lengths, 128, buckets, False)) > 0.5


def test_padding_of_the_llava_mixture():
    """At most 8 % with buckets of its own, or with seven well-chosen ones; half-way round numbers waste a fifth, and no grouping more than half."""
    lengths = llava_mix665k()
    assert len(lengths.tokens) == 665_298 and lengths.tokens.max() == 2048

    def share(given=None, grouping=True):
        return padding_share(lengths, plan(0, 0, lengths, 128, make_buckets(lengths, given), grouping))

    assert 0.05 < share() < 0.08 and 0.07 < share((704, 768, 896, 1024, 1280, 1536, 2048)) < 0.08
    assert share((512, 1024, 1536, 2048)) > 0.2 and share(grouping=False) > 0.5


def test_buckets_count_what_is_drawn():
    """A small file of long texts that is drawn often gets buckets of its own."""
    lengths = llava_mix665k()
    texts = MIX["texts"][0]
    blend = Blend((texts, len(lengths.tokens) - texts), (0.5, 0.5))
    shares = [padding_share(lengths, plan(0, 0, lengths, 128, make_buckets(lengths, blend=b), blend=blend)) for b in (blend, None)]
    assert shares[0] < 0.075 < 0.08 < shares[1]


def test_padding_share():
    lengths = Lengths(np.array([10, 20, 30]), np.array([1, 1, 1]), np.array([0, 0, 0]))
    assert padding_share(lengths, [(Bucket(32, 64, 0), np.array([0, 1])), (Bucket(40, 64, 0), np.array([2]))]) == pytest.approx(1 - 60 / 104)
    assert padding_share(lengths, [(Bucket(32, 64, 0), np.array([2, -1]))]) == pytest.approx(1 - 30 / 64)


def test_batches_are_not_in_order_of_length():
    """Sorted batches would be a curriculum: the short ones first."""
    lengths = made_up(2000)
    shapes = [bucket.tokens for bucket, _ in plan(0, 0, lengths, 8, make_buckets(lengths))]
    assert abs(np.corrcoef(shapes, np.arange(len(shapes)))[0, 1]) < 0.2


# ---- Validation, and the rows of a process


@pytest.mark.parametrize(("num_records", "size"), [(20, 8), (16, 8), (3, 8), (1, 1)])
def test_fixed_plan(num_records, size):
    lengths = made_up(num_records)
    fixed = FixedPlan(lengths, size, make_buckets(lengths))
    assert fixed.num_batches == -(-num_records // size)
    batches = [fixed[b] for b in range(fixed.num_batches)]
    assert all(len(ids) == size and fits(lengths, bucket, ids) for bucket, ids in batches)
    ids = np.concatenate([ids for _, ids in batches])
    assert sorted(ids[:num_records]) == list(range(num_records)) and (ids[num_records:] == -1).all()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("num_shards", [4, 8])
def test_rows_of_processes(num_processes, num_shards):
    """Row r of micro-batch m on data shard d is ids[m * MBS * D + d * MBS + r], and the processes' rows side by side are the global batch."""
    size, micro_batches = 3, 5
    ids = np.random.default_rng(0).permutation(micro_batches * num_shards * size)
    per_process = num_shards // num_processes
    parts = []
    for process in range(num_processes):
        shards = range(process * per_process, (process + 1) * per_process)
        rows = local_rows(ids, micro_batch_size=size, num_shards=num_shards, shards=shards)
        expected = [ids[m * size * num_shards + d * size + r] for m in range(micro_batches) for d in shards for r in range(size)]
        assert rows.tolist() == expected
        parts.append(rows.reshape(micro_batches, per_process * size))
    assert np.concatenate(parts, axis=1).reshape(-1).tolist() == ids.tolist()
