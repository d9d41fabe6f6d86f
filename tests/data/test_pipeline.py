"""Batches of real records and pictures: their fields, the same sequence from any workers, processes and starts, and what a worker is."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from digit_data import DIGITS, MBS, SIZE, S, digits, planned, read, record

from neva_jax.data.example import Example
from neva_jax.data.image import ImageProcessor
from neva_jax.data.lengths import read_lengths
from neva_jax.data.pipeline import Rows, batches, pad_examples
from neva_jax.data.plan import Bucket, FixedPlan, Plan, make_buckets
from neva_jax.data.tokenize import IGNORE

INT_FIELDS = ("tokens", "labels", "position_ids", "segment_ids", "media_index")


class WatchedProcessor(ImageProcessor):
    """Notes what the process is that decodes a picture: one file for each process that is not the test's."""

    def __call__(self, data, where):
        if "WATCHED" in os.environ and str(os.getpid()) != os.environ["WATCHED"]:
            bridge = sys.modules.get("jax._src.xla_bridge")
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            note = {
                "backends": sorted(bridge._backends) if bridge else [],
                "environment": {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")},
                "ours": sorted(name for name in sys.modules if name.startswith("neva_jax") and not name.startswith(("neva_jax.data", "neva_jax.errors"))),
                "libraries": sorted({"torch", "flax", "optax", "transformers"} & set(sys.modules)),
                "main": getattr(sys.modules["__main__"], "__file__", None),
                "mib": int(peak[1]) / 1024,
            }
            Path(os.environ["WATCHED_IN"], f"{os.getpid()}.json").write_text(json.dumps(note))
        return super().__call__(data, where)


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name
    return True


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    examples = digits(tmp_path_factory.mktemp("digits"))
    plan = planned(examples)
    return examples, plan, read(examples, plan, 0, 12)


# ---- A batch


def test_fields(data):
    examples, plan, found = data
    for b, batch in enumerate(found):
        bucket, ids = plan[b]
        t, k, n = bucket
        assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
            **{name: ("int32", (SIZE // MBS, MBS, t)) for name in INT_FIELDS},
            "loss_mask": ("float32", (SIZE // MBS, MBS, t)),
            "supervised_positions": ("int32", (SIZE // MBS, MBS, k)),
            "media": ("uint8", (SIZE // MBS, MBS, n, 32, 32, 3)),
            "bad_image": ("int32", (SIZE // MBS, MBS)),
        }
        rows = {name: value.reshape(SIZE, *value.shape[2:]) for name, value in batch.items()}
        for r, index in enumerate(ids):
            example, length = examples[int(index)], len(examples[int(index)].tokens)
            assert rows["tokens"][r].tolist() == example.tokens.tolist() + [0] * (t - length)
            assert rows["labels"][r].tolist() == example.labels.tolist() + [IGNORE] * (t - length)
            assert rows["loss_mask"][r].tolist() == [float(label != IGNORE) for label in rows["labels"][r]]
            assert rows["position_ids"][r].tolist() == list(range(t))
            assert rows["segment_ids"][r].tolist() == [1] * length + [0] * (t - length)
            assert rows["media_index"][r].tolist() == example.media_index.tolist() + [-1] * (t - length)
            supervised = [i for i, label in enumerate(rows["labels"][r]) if label != IGNORE]
            assert supervised and rows["supervised_positions"][r].tolist() == supervised + [-1] * (k - len(supervised))
            assert np.array_equal(rows["media"][r, : len(example.media)], example.media) and not rows["media"][r, len(example.media) :].any()
            assert not rows["bad_image"][r]


def test_media_index_points_into_media(data):
    """Indices of a row are its pictures' vectors, each once, in order: 0 .. n*S-1 of N*S."""
    examples, plan, found = data
    for b, batch in enumerate(found):
        for r, index in enumerate(plan[b][1]):
            row = batch["media_index"].reshape(SIZE, -1)[r]
            count = len(examples.record(int(index)).images)
            assert count in (1, 2) and row[row >= 0].tolist() == list(range(count * S)) and row.max() < batch["media"].shape[2] * S


def test_pictures_are_the_record_s_own(tmp_path):
    pictures = [f"test/{i:05d}.png" for i in range(3)]
    examples = digits(tmp_path, [record(pictures[0]), record([pictures[2], pictures[1]])])
    pixels = [examples.image_processor(examples.media.read(name), name) for name in pictures]
    assert not np.array_equal(pixels[1], pixels[2])
    assert np.array_equal(examples[0].media, pixels[:1]) and np.array_equal(examples[1].media, [pixels[2], pixels[1]])


def test_text_only_batch(tmp_path):
    examples = digits(tmp_path, [record([], answer=str(i)) for i in range(SIZE)], images=DIGITS)
    examples.media = None
    (batch,) = read(examples, planned(examples), 0, 1)
    assert batch["media"].shape == (SIZE // MBS, MBS, 0, 32, 32, 3) and batch["media"].dtype == np.uint8
    assert (batch["media_index"] == -1).all() and (batch["labels"] >= 0).any()


def test_texts_among_pictures(tmp_path):
    """A row without a picture in a batch with pictures: black, and pointed to by nothing."""
    examples = digits(tmp_path, [record([], answer="no")] + [record(f"test/{i:05d}.png") for i in range(SIZE - 1)])
    (batch,) = read(examples, planned(examples, seed=None), 0, 1)
    assert batch["media"].shape[2] == 1 and not batch["media"][0, 0].any() and batch["media"][0, 1].any()
    assert (batch["media_index"][0, 0] == -1).all() and batch["media_index"][0, 1].max() == S - 1


def test_empty_rows(tmp_path):
    """Validation fills its last batch with rows of one token that nobody reads or learns."""
    examples = digits(tmp_path, [record(f"test/{i:05d}.png") for i in range(SIZE + 3)])
    lengths = read_lengths(examples, tmp_path)
    fixed = FixedPlan(lengths, SIZE, make_buckets(lengths))
    full, filled = read(examples, fixed, 0, fixed.num_batches)
    assert (full["supervised_positions"].reshape(SIZE, -1)[:, 0] >= 0).all()
    rows = {name: value.reshape(SIZE, *value.shape[2:]) for name, value in filled.items()}
    assert (rows["supervised_positions"][:3, 0] >= 0).all() and rows["media"][:3].any(axis=(1, 2, 3, 4)).all()
    assert (rows["labels"][3:] == IGNORE).all() and not rows["loss_mask"][3:].any() and (rows["supervised_positions"][3:] == -1).all()
    assert (rows["segment_ids"][3:].sum(axis=1) == 1).all() and (rows["media_index"][3:] == -1).all()
    assert not rows["media"][3:].any() and not rows["bad_image"].any()


def test_nothing_is_ever_cut():
    example = Example(np.zeros(5, np.int32), np.zeros(5, np.int32), np.zeros(5, np.int32), np.zeros((1, 2, 2, 3), np.uint8))
    for bucket in (Bucket(4, 64, 1), Bucket(5, 64, 0), Bucket(5, 4, 1)):
        with pytest.raises((AssertionError, ValueError)):
            pad_examples([example], bucket, np.zeros((0, 2, 2, 3), np.uint8))
    assert pad_examples([example], Bucket(5, 5, 1), np.zeros((0, 2, 2, 3), np.uint8))["supervised_positions"].tolist() == [[0, 1, 2, 3, 4]]


# ---- The same sequence, however it is read


@pytest.mark.parametrize("start", [1, 5, 11, 12])
def test_start_in_the_middle(data, start):
    examples, plan, found = data
    assert same(read(examples, plan, start, 12), found[start:])


def test_over_the_end_of_an_epoch(data):
    examples, plan, _ = data
    last = len(examples) // SIZE
    assert plan.epoch_of(last - 1) == 0 and plan.epoch_of(last) == 1
    (batch,) = read(examples, plan, last, last + 1)
    assert np.array_equal(batch["tokens"].reshape(SIZE, -1)[3][:20], examples[int(plan[last][1][3])].tokens[:20])


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_side_by_side(data, num_processes):
    examples, plan, _ = data
    whole = read(examples, plan, 2, 5, rows=Rows(1, 4, range(4)))
    per_process = 4 // num_processes
    parts = [read(examples, plan, 2, 5, rows=Rows(1, 4, range(p * per_process, (p + 1) * per_process))) for p in range(num_processes)]
    assert parts[0][0]["tokens"].shape[:2] == (SIZE // 4, per_process)
    assert same([{name: np.concatenate([part[b][name] for part in parts], axis=1) for name in whole[0]} for b in range(3)], whole)


def test_a_part_of_the_records(data):
    """`ids`: the plan speaks of positions in it, so that validation's share never reaches training."""
    examples, _, _ = data
    ids = np.arange(1, len(examples), 2)
    lengths = read_lengths(examples, examples.sources[0].cache_dir).select(ids)
    plan = Plan(0, lengths, SIZE, make_buckets(lengths))
    (batch,) = batches(examples, plan, Rows(MBS), ids=ids, start=3, stop=4, global_batch_size=SIZE)
    for row, i in zip(batch["tokens"].reshape(SIZE, -1), plan[3][1], strict=True):
        tokens = examples[int(ids[i])].tokens
        assert row[: len(tokens)].tolist() == tokens.tolist()


# ---- Workers


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """The same batches from two workers, and what they noted about themselves, in a program with devices and a file of its own, as before behind it."""
    directory = tmp_path_factory.mktemp("watched")
    examples = digits(directory, processor=WatchedProcessor)
    program = directory / "program.py"
    program.write_text("raise SystemExit('a worker imports the program')")
    said = {"WATCHED": str(os.getpid()), "WATCHED_IN": str(directory), "CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cuda,cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        patch.setattr(sys.modules["__main__"], "__spec__", None)
        patch.setattr(sys.modules["__main__"], "__file__", str(program), raising=False)
        found = read(examples, data[1], 0, 12, num_workers=2)
        assert {name: os.environ.get(name) for name in said} == said and sys.modules["__main__"].__file__ == str(program)
    return found, [json.loads(path.read_text()) for path in directory.glob("*.json")]


def test_two_workers(data, watched):
    assert same(watched[0], data[2])
    assert all(type(value) is np.ndarray for value in watched[0][0].values())


def test_one_worker_from_the_middle(data):
    examples, plan, found = data
    assert same(read(examples, plan, 7, 10, num_workers=1), found[7:10])


def test_what_a_worker_is(watched):
    """No backend of JAX, no device in sight, nothing of ours but the data's, nothing of the program that started it, and small."""
    notes = watched[1]
    assert len(notes) == 2
    for note in notes:
        assert note["backends"] == [] and note["environment"] == {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        assert note["ours"] == ["neva_jax"] and note["libraries"] == [] and note["main"] is None
        assert note["mib"] < 300, note["mib"]
