"""Lengths of the sound records, their histogram, and what padding costs by way of bucketing: the numbers of the plans that training makes."""

import json

import numpy as np
import pytest
from helpers import ROOT

from neva_jax.data import sweep as sweep_module
from neva_jax.data.blend import Blend
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.lengths import read_lengths
from neva_jax.data.plan import Lengths, make_buckets, padding_share, plan
from neva_jax.data.records import Records
from neva_jax.data.survey import bucketings, histogram, summary, survey
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import UserError

DIGITS = ROOT / "examples" / "digits"
BAD = {"conversations": [{"from": "human", "value": "Which?"}]}


def record(words):
    return {"conversations": [{"from": "human", "value": "Which? " * words}, {"from": "gpt", "value": "five"}]}


def made(directory, records):
    path = directory / "data.json"
    path.write_text(json.dumps(records))
    encoder = Encoder(SentencePieceTokenizer(DIGITS / "tokenizer.model"), "v1", 4, 200)
    return Examples((Records(path, directory / "records"),), None, ImageProcessor((8, 8), 8), encoder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_defective_records_are_left_out(tmp_path, monkeypatch, caplog, num_workers):
    monkeypatch.setattr(sweep_module, "CHUNK", 3)
    records = [record(n) for n in range(1, 9)]
    sound, _ = survey(made(tmp_path, records), tmp_path / "cache")
    assert caplog.text == ""
    lengths, ids = survey(made(tmp_path, [BAD, *records[:4], BAD, record(900), *records[4:]]), tmp_path / "cache", num_workers)
    assert ids.tolist() == [1, 2, 3, 4, 7, 8, 9, 10]
    assert all(np.array_equal(a, b) for a, b in zip(lengths, sound, strict=True))
    assert "record 0: conversations: no gpt turn" in caplog.text and "--validate" in caplog.text


def test_of_sound_records_it_is_the_index_of_training(tmp_path):
    examples = made(tmp_path, [record(1), record(2)])
    lengths, ids = survey(examples, tmp_path / "cache")
    assert ids.tolist() == [0, 1] and len(list((tmp_path / "cache").glob("lengths-*"))) == 1
    assert all(np.array_equal(a, b) for a, b in zip(lengths, read_lengths(examples, tmp_path / "cache"), strict=True))


def test_of_no_sound_record_there_is_nothing_to_measure(tmp_path):
    with pytest.raises(UserError, match=r"no record can be encoded; the first error: .*record 0.*no gpt turn"):
        survey(made(tmp_path, [BAD, BAD]), tmp_path / "cache")


# ---- numbers


def test_summary():
    values = np.arange(101)[::-1]
    assert summary(values) == {"min": 0, "median": 50, "mean": 50, "p90": 90, "p99": 99, "max": 100}
    json.dumps(summary(np.array([3], np.int32)))


@pytest.mark.parametrize(("values", "edges"), [
    ([5], [5, 6]), ([0, 3], [0, 1, 2, 3, 4]), ([7, 30], range(7, 32)), ([7, 31], [*range(6, 34, 2)]), ([100, 2148], range(0, 2177, 128)),
])  # fmt: skip
def test_bins(values, edges):
    found = histogram(np.array(values, np.int32))
    assert found["edges"] == list(edges) and len(found["counts"]) <= 24
    assert found["counts"][0] == found["counts"][-1] == 1 and sum(found["counts"]) == len(values)


def test_a_histogram_counts_every_value_in_its_bin():
    values = np.random.default_rng(0).integers(40, 2000, 5000)
    found = histogram(values)
    assert found["counts"] == [int(((values >= low) & (values < high)).sum()) for low, high in zip(found["edges"], found["edges"][1:], strict=False)]


@pytest.fixture
def lengths():
    source = np.random.default_rng(0)
    tokens = source.integers(30, 600, 1000).astype(np.int32)
    return Lengths(tokens, (tokens // 3).astype(np.int32), source.integers(0, 2, 1000).astype(np.int32))


def test_padding_is_that_of_the_plan(lengths):
    rows = bucketings(lengths, 32, seed=7)
    assert [(row["buckets"], row["length_grouping"], row["in_use"]) for row in rows] == [
        (1, True, False), (2, True, False), (4, True, False), (8, True, True), (8, False, False),
    ]  # fmt: skip
    assert [len(row["token_lengths"]) for row in rows] == [1, 2, 4, 8, 8]
    shares = [row["padding_share"] for row in rows]
    assert shares[0] > shares[1] > shares[2] > shares[3] and shares[4] > shares[2]
    buckets = make_buckets(lengths)
    for row, grouped in ((rows[3], True), (rows[4], False)):
        batches = plan(7, 0, lengths, 32, buckets, grouped)
        assert row["padding_share"] == padding_share(lengths, batches) and row["shapes"] == len({bucket for bucket, _ in batches})


def test_padding_by_hand():
    """Records of 16 and 32 tokens, half and half: one length pads a quarter away, two lengths nothing."""
    tokens = np.array([16, 32] * 8, np.int32)
    rows = bucketings(Lengths(tokens, tokens // 4, 0 * tokens), 4, seed=1)
    assert [row["padding_share"] for row in rows[:2]] == [0.25, 0.0] and [row["shapes"] for row in rows[:2]] == [1, 2]


@pytest.mark.parametrize("grouping", [True, False])
def test_own_lengths_are_compared_too(lengths, grouping):
    rows = bucketings(lengths, 32, seed=7, token_lengths=(128, 1024), grouping=grouping)
    assert [row["token_lengths"] for row in rows[-2:]] == [[128, 1024]] * 2 and [row["buckets"] for row in rows] == [1, 2, 4, 8, 2, 2]
    assert [row["in_use"] for row in rows] == [False] * 4 + [grouping, not grouping]


def test_in_file_order_nothing_is_grouped(lengths):
    assert bucketings(lengths, 32, seed=None)[3]["padding_share"] == bucketings(lengths, 32, seed=None)[4]["padding_share"]


def test_shares_of_files_count(lengths):
    """All draws come from the first file, whose records are short."""
    tokens = np.sort(lengths.tokens)
    blend = Blend((500, 500), (1.0, 0.0))
    row = bucketings(lengths._replace(tokens=tokens), 32, seed=7, blend=blend)[3]
    assert [t for t in row["token_lengths"] if t >= tokens[499] + 16] == [-(-int(tokens[-1]) // 16) * 16]


def test_fewer_records_than_a_batch(lengths):
    few = lengths.select(np.arange(5))
    assert all(0 <= row["padding_share"] < 1 and row["shapes"] == 1 for row in bucketings(few, 32, seed=7))
