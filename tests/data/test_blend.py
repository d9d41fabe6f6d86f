"""Several files as one stream: shares at every draw, no record again before its file is through, the same from any start, and what a config says of it."""

import itertools
import json
import logging
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tiny

from neva_jax.build import data as build
from neva_jax.build.model import neva_config
from neva_jax.build.run import build_mesh
from neva_jax.data.blend import CYCLE, PASSES, Blend, _turns
from neva_jax.data.plan import Lengths, Plan, make_buckets
from neva_jax.errors import UserError


def normal(weights):
    return tuple(w / sum(weights) for w in weights)


def file_of(blend, ids):
    return np.searchsorted(np.cumsum(blend.sizes), ids, side="right")


def stream(blend, seed, num_epochs):
    return np.concatenate([blend.epoch(seed, e) for e in range(num_epochs)])


# ---- Shares


@given(st.lists(st.one_of(st.integers(0, 50), st.floats(1e-3, 1)), min_size=1, max_size=9).filter(any), st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_shares_hold_at_every_draw(weights, count):
    """After k draws a file of share p has had p * k, give or take less than one."""
    shares = normal(weights)
    drawn = np.cumsum(_turns.__wrapped__(shares, count)[:, None] == np.arange(len(shares)), axis=0)
    owed = np.arange(1, count + 1)[:, None] * np.array(shares)
    assert np.abs(drawn - owed).max() < 1 + 1e-5
    assert not drawn[:, np.array(shares) == 0].any()


def test_shares_hold_over_epochs():
    """Also where an epoch has less than one draw for a file, and on from any epoch."""
    blend = Blend((50, 30, 20), (0.894, 0.1, 0.006))
    drawn = np.cumsum(file_of(blend, stream(blend, 0, CYCLE // 100))[:, None] == np.arange(3), axis=0)
    assert np.abs(drawn - np.arange(1, len(drawn) + 1)[:, None] * np.array(blend.shares)).max() < 1 + 1e-5
    far = Counter(file_of(blend, np.concatenate([blend.epoch(0, e) for e in range(10**6, 10**6 + 1000)])).tolist())
    assert all(abs(far[f] - 100_000 * share) < 3 for f, share in enumerate(blend.shares))


def test_half_of_an_epoch_is_the_small_file():
    """The example in NeMo's configuration: of 100 and 10 records with equal shares, 55 and 55."""
    blend = Blend((100, 10), (0.5, 0.5))
    assert Counter(file_of(blend, blend.epoch(0, 0)).tolist()) == {0: 55, 1: 55}
    assert blend.draws_per_record().tolist() == [0.55, 5.5]


@pytest.mark.parametrize("sizes", [(100, 10), (7, 1, 92), (333, 333, 334), (1, 2, 3, 5, 8, 13), (100_003, 5)])
def test_counts_as_shares_give_every_record_once(sizes):
    blend = Blend(sizes, normal(sizes))
    for epoch in range(3):
        assert np.array_equal(np.sort(blend.epoch(2, epoch)), np.arange(sum(sizes)))


# ---- A file's own order


@pytest.mark.parametrize("seed", [None, 0])
def test_no_record_again_before_its_file_is_through(seed):
    blend = Blend((40, 3, 1, 25), (0.1, 0.2, 0.2, 0.5))
    ids = stream(blend, seed, 40)
    for file, first in enumerate(np.cumsum([0, *blend.sizes[:-1]])):
        mine, size = ids[file_of(blend, ids) == file] - first, blend.sizes[file]
        passes = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(passes) > 5 and (np.sort(passes) == np.arange(size)).all()
        assert len(set(mine[len(passes) * size :])) == len(mine) % size
        if seed is None:
            assert (passes == np.arange(size)).all(), "file order"
        elif size > 20:
            assert not any(np.array_equal(a, b) for a, b in itertools.combinations(passes, 2))


def test_passes_of_a_large_and_of_a_small_file_go_on():
    """More records than are shuffled together, and so many passes that they are shuffled in several goes."""
    size = PASSES + 5
    blend = Blend((size, 2), (0.25, 0.75))
    ids = stream(blend, 1, 40)
    large, small = ids[ids < size], ids[ids >= size] - size
    assert len(ids) > 2 * CYCLE and len(small) > 20 * PASSES, "the turns have begun again, twice"
    passes = [large[i : i + size] for i in range(0, len(large) - size + 1, size)]
    assert len(passes) == 10 and all(len(np.unique(ids)) == size for ids in passes)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(passes, 2))
    assert (np.sort(small[: len(small) // 2 * 2].reshape(-1, 2)) == [0, 1]).all() and 0.45 < small[::2].mean() < 0.55


def test_pure_function():
    first = Blend((50, 20), (0.5, 0.5)).epoch(7, 3)
    _turns.cache_clear()
    assert np.array_equal(Blend((50, 20), (0.5, 0.5)).epoch(7, 3), first)
    assert not np.array_equal(Blend((50, 20), (0.5, 0.5)).epoch(8, 3), first) and not np.array_equal(Blend((50, 20), (0.5, 0.5)).epoch(7, 4), first)


# ---- In the plan


@pytest.mark.parametrize("grouping", [True, False])
def test_plan_takes_what_the_blend_draws(grouping):
    """Batches are the stream's draws, remainders carried over the epochs; asked for in any order, and after a trip through pickle."""
    rng = np.random.default_rng(0)
    blend = Blend((60, 11, 30), (0.5, 0.3, 0.2))
    tokens = rng.integers(2, 400, 101)
    lengths = Lengths(tokens, tokens - 1, rng.integers(0, 2, 101))
    endless = Plan(5, lengths, 8, make_buckets(lengths, blend=blend), grouping, blend=blend)
    batches = [endless[b][1] for b in range(101 * 4 // 8)]
    drawn = stream(blend, 5, 4)
    for epoch in range(1, 5):
        whole = 101 * epoch // 8
        assert Counter(np.concatenate(batches[:whole]).tolist()) == Counter(drawn[: whole * 8].tolist())
    if not grouping:
        assert np.concatenate(batches).tolist() == drawn[: len(batches) * 8].tolist()
        counts = np.array([np.bincount(file_of(blend, ids), minlength=3) for ids in batches])
        assert np.abs(counts - 8 * np.array(blend.shares)).max() < 2, "shares hold in every batch"
    again = pickle.loads(pickle.dumps(endless))
    for b in rng.permutation(len(batches)):
        assert np.array_equal(again[b][1], batches[b]) and (tokens[batches[b]] <= again[b][0].tokens).all()


# ---- What a config asks for


@pytest.fixture
def two_files(tmp_path):
    """make(**changes of model.data) -> config, training and validation of 90 and 30 records; the text of each says which it is."""

    def records(name, count):
        turns = [[{"from": "human", "value": f"Record {i}?"}, {"from": "gpt", "value": f"{name} {i}"}] for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": t} for t in turns]))
        return str(tmp_path / f"{name}.json")

    paths = records("a", 90), records("b", 30)

    def make(**changes):
        settings = {"data_path": paths, "validation": None, "cache_dir": str(tmp_path / "cache"), "num_workers": 0} | changes
        config = tiny(tmp_path / "run", **{f"model__data__{name}": value for name, value in settings.items()})
        tokenizer = build.build_tokenizer(config)
        train, validation = build.build_data(config, tokenizer, neva_config(config, tokenizer.vocab_size), build_mesh(config))
        return config, train, validation

    return make


def drawn(train, num_batches):
    """How often each record is in the first batches, as the files' [90] and [30]."""
    ids = np.concatenate([train.ids[train.plan[b][1]] for b in range(num_batches)])
    return np.split(np.bincount(ids, minlength=120), [90])


@pytest.mark.parametrize("grouping", [True, False])
def test_probabilities(two_files, grouping):
    config, train, _ = two_files(concat_sampling_probabilities=(0.5, 0.5), length_grouping=grouping)
    a, b = drawn(train, 30)  # an epoch of 120 draws, in batches of 4
    assert a.sum() == b.sum() == 60 and a.max() == 1 and (b == 2).all()
    assert build.num_steps(config, train) == 6
    said = build.describe_data(train, None, 6)
    assert "a.json 50.0%" in said and "b.json 50.0% of the draws" in said and said.startswith("120 training records")


@pytest.mark.parametrize("given", [(1, 3), (20, 60.0)])
def test_probabilities_are_divided_by_their_sum(two_files, caplog, given):
    with caplog.at_level(logging.INFO):
        _, train, _ = two_files(concat_sampling_probabilities=given)
    assert train.plan.blend.shares == (0.25, 0.75)
    said = [r.getMessage() for r in caplog.records if "concat_sampling" in r.getMessage()]
    assert said == [f"model.data.concat_sampling_probabilities sum to {sum(given):g}, not 1, and are divided by it"]


@pytest.mark.parametrize("given", [(0.7, 0.3), (0.1 + 0.2, 0.7)])
def test_probabilities_of_sum_one_say_nothing(two_files, caplog, given):
    with caplog.at_level(logging.INFO):
        two_files(concat_sampling_probabilities=given)
    assert not [r for r in caplog.records if "concat_sampling" in r.getMessage()]


def test_null_is_equal_shares_and_says_so(two_files, caplog):
    """NeMo's meaning of null; the warning says what it does to each file, and what to set for every record once; that then holds."""
    _, train, _ = two_files()
    assert train.plan.blend.shares == (0.5, 0.5)
    (said,) = [r.getMessage() for r in caplog.records if "concat_sampling" in r.getMessage()]
    assert "a.json (90) 0.67" in said and "b.json (30) 2.00" in said and said.endswith("set it to (90, 30) for every record once")
    caplog.clear()
    _, train, _ = two_files(concat_sampling_probabilities=(90, 30))
    assert (np.concatenate(drawn(train, 30)) == 1).all()
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "concat_sampling" in r.getMessage()]


def test_one_file_has_no_blend(two_files, tmp_path):
    for changes in ({"data_path": str(tmp_path / "a.json")}, {"data_path": (str(tmp_path / "a.json"),), "concat_sampling_probabilities": (0.5,)}):
        _, train, _ = two_files(**changes)
        assert train.plan.blend is None and len(train.ids) == 90
        assert sorted(np.concatenate([train.plan[b][1] for b in range(45)]).tolist()) == sorted([*range(90), *range(90)])


def test_single_is_each_file_in_its_order_to_the_end_of_the_run(two_files):
    config, train, _ = two_files(dataloader_type="single", concat_sampling_probabilities=(0.25, 0.75))
    ids = np.concatenate([train.plan[b][1] for b in range(60)])
    a, b = ids[ids < 90], ids[ids >= 90]
    assert a.tolist() == list(range(60)) and b.tolist() == [*range(90, 120)] * 6
    config.unlock()
    config.trainer.max_steps = 1000
    assert train.plan.num_batches is None and build.num_steps(config, train) == 1000


def test_held_out_records_are_never_drawn(two_files, caplog):
    _, train, validation = two_files(validation=0.25)
    held_out = set(validation.ids.tolist())
    sizes = train.plan.blend.sizes
    assert len(held_out) == 30 and not held_out & set(train.ids.tolist()) and sum(sizes) == 90
    assert sizes == ((train.ids < 90).sum(), (train.ids >= 90).sum())
    counts = np.concatenate(drawn(train, 90))
    assert {int(i) for i in np.flatnonzero(counts == 0)} == held_out, "all others are, over four epochs"
    per_file = np.add.reduceat(counts, [0, 90])
    assert np.abs(per_file - 180).max() <= 4  # less than a batch is left over
    assert {int(i) for b in range(validation.plan.num_batches) for i in validation.ids[validation.plan[b][1]]} == held_out
    assert f"set it to {sizes} for every record once" in caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((1.5, -0.5), "0 or more for each file"),
        ((0, 0.0), "not all 0"),
        ((), "not all 0"),
        ((float("nan"), 1.0), "0 or more for each file"),
        ((float("inf"), 1.0), "0 or more for each file"),
        (("a", 1.0), "0 or more for each file"),
        ((1.0,), "has 1 number, and model.data.data_path names 2 files; give one number a file"),
        ((0.2, 0.3, 0.5), "has 3 numbers, and model.data.data_path names 2 files"),
        ((1, 1e-9), r"b.json a share of 1e-09, but that is too little to be ever drawn; set it to 0"),
    ],
)
def test_wrong_probabilities(two_files, given, words):
    with pytest.raises(UserError) as error:
        two_files(concat_sampling_probabilities=given)
    message = str(error.value)
    assert message.startswith("model.data.concat_sampling_probabilities ") and words in message and "\n" not in message


def test_probabilities_of_one_file_named_as_text(two_files, tmp_path):
    with pytest.raises(UserError, match="has 2 numbers, and model.data.data_path names 1 file;"):
        two_files(data_path=str(tmp_path / "a.json"), concat_sampling_probabilities=(0.5, 0.5))


def test_a_file_that_is_held_out_whole(two_files, tmp_path):
    """Its share cannot be met; share 0 leaves it out."""
    (tmp_path / "one.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}]))
    paths = str(tmp_path / "a.json"), str(tmp_path / "one.json")
    with pytest.raises(UserError, match=r"one.json a share of 0.5, but it has no record to train on; set it to 0"):
        two_files(data_path=paths, validation=0.98)
    _, train, _ = two_files(data_path=paths, concat_sampling_probabilities=(1, 0))
    assert (train.ids[np.concatenate([train.plan[b][1] for b in range(50)])] < 90).all()
