"""The embedded data set examples/digits, as shipped: valid records, true answers, pictures that show them, no leak into training, a whole tokenizer."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sentencepiece import SentencePieceProcessor

from neva_jax.data.record import parse_record

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
FILES = ["train", "test", "pretrain", "pretrain_test"]


def load(name: str) -> list[dict]:
    return json.loads((DIGITS / f"{name}.json").read_text())


def rounds(record: dict) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in record["conversations"]]
    return list(zip(values[::2], values[1::2], strict=True))


def listed(*digits: int) -> str:
    """3, 9, 1 -> "three, nine and one"."""
    return re.sub(r", (\w+)$", r" and \1", ", ".join(WORDS[digit] for digit in digits))


def expected(kind: str, question: str, digits: list[int]) -> str:
    """What to answer, worked out from the question's words and the digits in the pictures."""
    named = [WORDS.index(word) for word in re.findall(r"\w+", question) if word in WORDS]
    match kind:
        case "which" | "pair_both":
            return listed(*digits)
        case "count":
            return WORDS[len(digits)]
        case "parity" | "text_parity":
            return ["even", "odd"][(named or digits)[0] % 2]
        case "above_four":
            return "yes" if digits[0] >= 5 else "no"
        case "pair_first":
            return WORDS[digits[0]]
        case "pair_second":
            return WORDS[digits[-1]]
        case "largest" | "text_larger":
            return WORDS[max(digits or named)]
        case "smallest" | "text_smaller":
            return WORDS[min(digits or named)]
        case "text_after":
            return WORDS[named[0] + 1]
        case "text_before":
            return WORDS[named[0] - 1]
    raise AssertionError(f"unknown kind {kind}")


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    with tarfile.open(DIGITS / "images.tar") as tar:
        return {member.name: Image.open(io.BytesIO(tar.extractfile(member).read())) for member in tar}


def test_pictures_are_grey_squares_and_all_are_used(pictures):
    assert {(picture.format, picture.mode, picture.size) for picture in pictures.values()} == {("PNG", "L", (32, 32))}
    for names in (FILES[:2], FILES[2:]):
        assert {image for name in names for record in load(name) for image in parse_record(record, where=name).images} == set(pictures)


def test_pictures_show_the_digits_in_reading_order(pictures):
    """As many slots have ink as the record has digits, and a nearest mean over the slots' pixels, made from train, mostly reads the test pictures right."""

    def tiles(name):
        pixels, labels = [], []
        for record in load(name):
            slots = np.asarray(pictures[record["image"]], np.float32).reshape(2, 16, 2, 16).swapaxes(1, 2).reshape(4, 16, 16)
            inked = [slot for slot in slots if slot.max() > 160]
            assert len(inked) == len(record["digits"]), record["id"]
            pixels += inked
            labels += record["digits"]
        return np.array(pixels).reshape(len(pixels), -1), np.array(labels)

    pixels, labels = tiles("pretrain")
    means = np.array([pixels[labels == digit].mean(0) for digit in range(10)])
    pixels, labels = tiles("pretrain_test")
    read = np.linalg.norm(pixels[:, None] - means, axis=-1).argmin(-1)
    assert (read == labels).mean() > 0.8


@pytest.mark.parametrize("name", FILES)
def test_records_are_llava_records(name, pictures):
    records = load(name)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        parsed = parse_record(record, where=record["id"])  # roles by turns, one tag for each picture, no empty answer
        assert all("<image>" not in turn["value"] for turn in record["conversations"][1:])
        assert len(parsed.turns) in ((2,) if name.startswith("pretrain") else (2, 4, 6, 8, 10))
        assert set(parsed.images) <= set(pictures)
        assert all(image.startswith("test/" if name.endswith("test") else "train/") for image in parsed.images)
        assert ("digits" in record) == ("scans" in record) == bool(parsed.images)


def test_no_held_out_scan_is_seen_in_training():
    scans = {name: {scan for record in load(name) for scan in record.get("scans", [])} for name in FILES}
    assert scans["pretrain"] | scans["pretrain_test"] == set(range(1797)) and scans["pretrain"].isdisjoint(scans["pretrain_test"])
    assert scans["train"] == scans["pretrain"] and scans["test"] == scans["pretrain_test"]


def test_a_scan_is_one_digit_everywhere():
    labels = {(scan, digit) for name in FILES for r in load(name) if "scans" in r for scan, digit in zip(r["scans"], r["digits"], strict=True)}
    assert len(labels) == 1797


@pytest.mark.parametrize("name", ["train", "test"])
def test_answers_are_true(name):
    for record in load(name):
        assert len(set(record["kinds"])) == len(record["kinds"])
        for kind, (question, answer) in zip(record["kinds"], rounds(record), strict=True):
            assert answer == expected(kind, question, record.get("digits", [])), (record["id"], question)


@pytest.mark.parametrize("name", ["pretrain", "pretrain_test"])
def test_captions_are_true(name):
    for record in load(name):
        [(_, caption)] = rounds(record)
        assert caption == ("the digits " if record["digits"][1:] else "the digit ") + listed(*record["digits"])


def test_shares():
    train, test = load("train"), load("test")
    assert 0.05 < sum("image" not in record for record in train) / len(train) < 0.06
    for records in (train, test):
        assert 0.07 < sum(isinstance(record.get("image"), list) for record in records) / len(records) < 0.11
        sizes = Counter(len(record["digits"]) for record in records if isinstance(record.get("image"), str))
        assert [round(sizes[n] / sizes.total(), 2) for n in (1, 2, 3)] == [0.6, 0.35, 0.05]


def test_tokenizer_knows_every_character_and_word():
    tokenizer = SentencePieceProcessor(model_file=str(DIGITS / "tokenizer.model"))
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert all(tokenizer.piece_to_id(character) != tokenizer.unk_id() for character in [*map(chr, range(33, 127)), "\n", "▁"])
    texts = [turn["value"].replace("<image>", "") for name in FILES for record in load(name) for turn in record["conversations"]]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id() not in ids and tokenizer.decode(ids) == text
    words = {word for name in ("train", "test") for record in load(name) for pair in rounds(record) for word in re.findall("[a-z]+", pair[1])}
    assert len(words) > 14 and all(len(tokenizer.encode(word)) == 1 for word in words)


def test_special_pieces_stand_last():
    tokenizer = SentencePieceProcessor(model_file=str(DIGITS / "tokenizer.model"))
    specials = [f"<extra_id_{i}>" for i in range(8)]
    ids = list(range(len(tokenizer) - 8, len(tokenizer)))
    assert [tokenizer.id_to_piece(i) for i in ids] == specials
    assert tokenizer.encode("".join(specials))[-8:] == ids  # matched in text: user-defined, not control
    assert all(tokenizer.get_score(i) == 0 for i in ids)
