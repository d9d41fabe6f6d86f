"""The index of lengths: what examples really are, kept once made, and defects named before the first step."""

import json
import logging

import numpy as np
import pytest
from helpers import ROOT

from neva_jax.data import lengths as lengths_module
from neva_jax.data.compat import ENCODERS
from neva_jax.data.example import Examples
from neva_jax.data.image import ImageProcessor
from neva_jax.data.lengths import read_lengths
from neva_jax.data.media import open_media
from neva_jax.data.records import Records
from neva_jax.data.tokenize import IGNORE
from neva_jax.data.tokenizer import SentencePieceTokenizer
from neva_jax.errors import DataError

DIGITS = ROOT / "examples" / "digits"
TEXT = {"conversations": [{"from": "human", "value": "Which is larger, two or five?"}, {"from": "gpt", "value": "five"}]}


def made(directory, records=None, template="v1", media_length=16, max_length=256, compat="exact", **options):
    path = DIGITS / "test.json"
    if records is not None:
        path = directory / "data.json"
        if not path.exists() or path.read_text() != json.dumps(records):
            path.write_text(json.dumps(records))
    tokenizer = SentencePieceTokenizer(DIGITS / "tokenizer.model", style="huggingface" if template.startswith("llava:") else "nemo")
    encoder = ENCODERS[compat](tokenizer, template, media_length, max_length, **options)
    processor = ImageProcessor(crop_size=(32, 32), shortest_edge=32)
    return Examples((Records(path, directory / "records"),), open_media(DIGITS / "images.tar"), processor, encoder)


def files(directory):
    return sorted(path.name for path in directory.glob("lengths-*"))


@pytest.mark.parametrize("options", [
    {}, {"extra_token": False}, {"template": "llava:v1"}, {"compat": "nemo_v2.0.0"}, {"compat": "llava", "template": "llava:v1"},
], ids=str)  # fmt: skip
def test_lengths_are_those_of_the_examples(tmp_path, options):
    examples = made(tmp_path, **options)
    found = read_lengths(examples, tmp_path / "cache")
    assert all(len(column) == len(examples) for column in found)
    for i in range(0, len(examples), 7):
        example = examples[i]
        assert (found.tokens[i], found.supervised[i], found.media[i]) == (len(example.tokens), (example.labels != IGNORE).sum(), len(example.media))


def test_lengths_of_cut_records(tmp_path, caplog):
    """Also where the cut falls on a second picture, which then is not read at all."""
    texts = ["<image>Which?", "one", "And <image>?", "two"]
    turns = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, texts, strict=True)]
    two = {"image": ["test/00000.png", "test/00001.png"], "conversations": turns}
    examples = made(tmp_path, [two, TEXT], media_length=8)
    start = int(np.flatnonzero(examples.stream(0).media_index == 8)[0])
    for limit in range(start - 2, start + 12):
        examples.encoder.max_length = limit
        found, example = read_lengths(examples, tmp_path / "cache"), examples[0]
        assert (found.tokens[0], found.supervised[0], found.media[0]) == (len(example.tokens), (example.labels != IGNORE).sum(), len(example.media))
        assert len(example.media) == (2 if limit >= start + 8 else 1)
        assert "1 of 2 records are longer than model.encoder_seq_length" in caplog.text
        caplog.clear()


def test_records_that_exact_mode_refuses_are_counted(tmp_path, caplog):
    """One warning, with the first of them; also when the index is there already."""
    good, odd = TEXT, {"conversations": TEXT["conversations"] * 2, "video": "a.mp4"}
    silent = {"conversations": [{"from": "human", "value": "Which?"}]}
    examples = made(tmp_path, [good, odd, silent, good], compat="nemo_v2.0.0")
    for _ in range(2):
        found = read_lengths(examples, tmp_path / "cache")
        (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert warning.getMessage().startswith("2 of 4 records are taken as model.data.compat nemo_v2.0.0 takes them; exact mode refuses such, the first: ")
        assert warning.getMessage().endswith(f"{tmp_path / 'data.json'}: record 1: video: videos are not supported; extract frames and list them under image")
        caplog.clear()
    assert found.supervised[2] == 0 and (np.delete(found.supervised, 2) > 0).all()
    with pytest.raises(DataError, match="record 1: video"):
        read_lengths(made(tmp_path, [good, odd, silent, good]), tmp_path / "cache")


def test_made_once(tmp_path, monkeypatch):
    examples = made(tmp_path)
    first = read_lengths(examples, tmp_path / "cache")
    assert len(files(tmp_path / "cache")) == 1

    def forbidden(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(lengths_module, "_make", forbidden)
    again = read_lengths(made(tmp_path), tmp_path / "cache")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_decides_lengths_makes_another_file(tmp_path):
    """Template, picture length, limit, mode, NeMo's options, the records' file: each its own index. Pixels do not matter."""
    records = [TEXT, TEXT]
    read_lengths(made(tmp_path, records), tmp_path / "cache")
    others = [{"template": "llama_2"}, {"media_length": 17}, {"max_length": 255}, {"max_media": 3}, {"extra_token": False}, {"compat": "nemo_v2.0.0"}]
    for n, changes in enumerate(others, 2):
        read_lengths(made(tmp_path, records, **changes), tmp_path / "cache")
        assert len(files(tmp_path / "cache")) == n, changes
    examples = made(tmp_path, records)
    before = examples.fingerprint()
    examples.on_bad_image, examples.image_processor = "skip", ImageProcessor()
    assert examples.fingerprint() == before
    read_lengths(made(tmp_path, [TEXT]), tmp_path / "cache")
    assert len(files(tmp_path / "cache")) == n + 1


def test_workers_make_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths_module, "CHUNK", 100)
    examples = made(tmp_path)
    alone, together = read_lengths(examples, tmp_path / "alone"), read_lengths(examples, tmp_path / "together", num_workers=2)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True)) and len(alone.tokens) == len(examples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_defective_record_is_named(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(lengths_module, "CHUNK", 4)
    bad = {"conversations": [{"from": "human", "value": "Which?"}]}
    with pytest.raises(DataError) as error:
        read_lengths(made(tmp_path, [TEXT] * 6 + [bad, TEXT]), tmp_path / "cache", num_workers)
    assert str(error.value) == f"{tmp_path / 'data.json'}: record 6: conversations: no gpt turn, expected at least one answer to learn"
    assert files(tmp_path / "cache") == []


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"nonsense"])
def test_broken_index_is_made_again(tmp_path, content):
    examples = made(tmp_path, [TEXT])
    expected = read_lengths(examples, tmp_path / "cache")
    (name,) = files(tmp_path / "cache")
    (tmp_path / "cache" / name).write_bytes(content)
    assert read_lengths(examples, tmp_path / "cache").tokens.tolist() == expected.tokens.tolist()
    assert (tmp_path / "cache" / name).stat().st_size > 100


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError) as error:
        read_lengths(made(tmp_path, [TEXT]), tmp_path / "cache")
    assert str(error.value).startswith(f"{tmp_path / 'cache'}: cannot hold the index of lengths") and "model.data.cache_dir" in str(error.value)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(file, _):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    examples = made(tmp_path, [TEXT])
    monkeypatch.setattr(lengths_module.np, "save", full)
    with pytest.raises(DataError, match="No space left on device"):
        read_lengths(examples, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
