"""Thousands of records, sound and broken, through every mode: the only error is the declared one, and what comes out holds together.

The same records whenever the same tests run, since hypothesis is derandomised (it borrows constants from the modules that it sees). It takes some 10 s,
most of them hypothesis' own, because it is thousands.
"""

import copy
import dataclasses
import functools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from template_tokenizers import CONTROLS, extended, open_for, spelt
from written_out import around_answer, runs_of

from neva_jax.data.compat import ENCODERS
from neva_jax.data.conversation import TEMPLATES
from neva_jax.data.record import ROLES, adopt_img_tags
from neva_jax.data.tokenize import IGNORE, shift
from neva_jax.errors import DataError

S = 4  # text positions of a picture
WHERE = "data.json: record 3"
RECORDS = {"exact": 1600, "nemo_v2.0.0": 600, "nemo_v1.23.0": 200, "llava": 500}  # in one run
FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def test_at_least_two_thousand():
    assert sum(RECORDS.values()) >= 2000 and RECORDS.keys() == ENCODERS.keys()


# ---- Records

TEXTS = [
    "", " ", "\n", "a", "What is it?", " two  spaces ", "ASSISTANT:", " ASSISTANT: ", "USER: ", "[INST]", " [/INST] ", "<<SYS>>\n", "###", "\n### Human: ",
    "<extra_id_1>Assistant\n", "<|im_end|><|im_start|>assistant\n", "<image", "<Image></Image>", "é😀", "a\u0301\u200b", "\0\x07\x1b\x7f", "\r\n\t", "▁",
    "<0x0A>", "</s><s>", "quality:4\n", '<img src="x/y.png">', "word " * 300, "x" * 2000, *CONTROLS,
]  # fmt: skip
ANSWER = st.lists(st.sampled_from(TEXTS), max_size=4).map("".join) | st.text(max_size=6)
QUESTION = st.lists(st.sampled_from([*TEXTS, *["<image>", "<image>\n"] * 4]), max_size=5).map("".join)
NAMES = st.lists(st.sampled_from(["a.png", "../a.png", "/a", "", "\0", "é😀"]), max_size=5)
THINGS = [None, True, 0, -1.5, [], {}, "", "text", ["<image>"], {"from": "human"}, [[]], "half of a pair \ud83d"]
JUNK = st.sampled_from(THINGS).map(copy.deepcopy)  # since lists among them may be changed
ROLE = st.sampled_from([*ROLES, "system", "tool", "Human"])


@st.composite
def sound(draw, template):
    """A record that the template takes, if its answers are no blanks."""
    turns, (asks, answers) = [], draw(st.sampled_from([("human", "gpt"), ("human", "gpt"), ("user", "assistant")]))
    for _ in range(1 if template.endswith("plain") else draw(st.integers(1, 3))):
        turns.append({"from": asks, "value": "<image>" * (template == "llava:plain") + draw(QUESTION)})
        turns.append({"from": answers, "value": draw(ANSWER) or draw(st.sampled_from(["", "so"]))})
        if draw(st.booleans()):
            turns[-1]["label"] = draw(st.sampled_from(["quality:4", "", "<extra_id_2>x\n", None]))
    if len(turns) > 2 and draw(st.booleans()):
        turns.pop()
    count = sum(turn["value"].count("<image>") for turn in turns)
    record = {"id": 1, "conversations": turns, "image": [f"{n}.png" for n in range(count)]}
    if template == "interleaved":
        return record | {"conversations": "".join(turn["value"] for turn in turns)}
    place = draw(st.sampled_from(["", "", "key", "turn"]))
    if place == "key":
        record["system"] = draw(ANSWER)
    elif place == "turn":
        turns.insert(0, {"from": "system", "value": draw(ANSWER)})
    return record


@st.composite
def broken(draw, template):
    """A sound record of which one to three things are changed."""
    record = draw(sound(template))
    for _ in range(draw(st.integers(1, 3))):
        turns = record["conversations"]
        at = draw(st.integers(0, len(turns) - 1)) if isinstance(turns, list) and turns else None
        change = draw(st.sampled_from(["record", "turn", "turn", "insert", "remove"]))
        if at is None or change == "record":
            record[draw(st.sampled_from(["image", "conversations", "system", "video"]))] = draw(NAMES | JUNK)
        elif change == "insert":
            turns.insert(at, draw(st.just(turns[at]) | JUNK))
        elif change == "remove":
            turns.pop(at)
        elif isinstance(turns[at], dict):
            turns[at] = turns[at] | {draw(st.sampled_from(["from", "value", "label"])): draw(ROLE | QUESTION | JUNK)}
    return record


@st.composite
def cases(draw, templates):
    """(template, options, record, whether the record is sound)"""
    template, is_sound = draw(st.sampled_from(templates)), draw(st.integers(0, 2)) > 0
    options = {name: draw(st.booleans()) for name in ("use_im_start_end", "extra_token", "eod_mask_loss", "legacy")}
    options |= {"sep_image_conv_front": draw(st.integers(0, 3)) == 3, "max_length": draw(st.just(50_000) | st.just(50_000) | st.integers(5, 120))}
    record = draw(sound(template) if is_sound else broken(template) | JUNK)
    return template, options, adopt_img_tags(record) if isinstance(record, dict) and draw(st.booleans()) else record, is_sound


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    """encoder_of(mode, template, options). NeMo v1.23.0 knows its control tokens by their numbers in Llama-2's model, so that it needs that one."""
    directory = tmp_path_factory.mktemp("model")
    open_model = functools.cache(lambda name: extended(directory, name, with_bytes=name == "digits"))

    @functools.cache
    def make(mode, template, legacy, **options):
        tokenizer = open_for(open_model("llama2" if mode == "nemo_v1.23.0" else "digits"), template, legacy=legacy)
        return ENCODERS[mode](tokenizer, template, S, max_media=8, **options)

    return make


# ---- What must hold


def refusal_or(encoder, record):
    """What comes out; None where the record is refused: by the declared error, in one line that opens with the record's place."""
    try:
        found = encoder(record, WHERE)
    except DataError as error:
        assert str(error).startswith(f"{WHERE}: ") and "\n" not in str(error)
        return None
    assert found.note == "" or (found.note.startswith(f"{WHERE}: ") and "\n" not in found.note)
    return found


def check_arrays(encoder, images, stream):
    """Lengths agree, labels are the next tokens, and every picture that is named is read whole, in order, in one place (LLaVA reads what a cut leaves of one;
    NeMo finds a picture by its last token, and skips one that lies about its length)."""
    assert len(stream.ids) == len(stream.supervised) == len(stream.media_index) <= encoder.limit
    assert (stream.ids >= 0).all() and (stream.ids < encoder.tokenizer.vocab_size).all()
    tokens, labels, media_index = shift(stream, encoder.extra_token)
    assert 1 <= len(tokens) == len(labels) == len(media_index) == len(stream.ids) - encoder.extra_token <= encoder.max_length
    learnt = np.flatnonzero(labels != IGNORE)
    assert learnt.tolist() == (np.flatnonzero(stream.supervised[1:])).tolist() and (labels[learnt] == stream.ids[learnt + 1]).all()
    assert encoder.compat.startswith("nemo") or not stream.supervised[stream.media_index >= 0].any(), "no picture is learnt (NeMo's mask may drift into one)"
    assert len(images) == stream.num_media
    places = np.flatnonzero(media_index >= 0)
    vectors = media_index[places]
    pictures = np.split(np.arange(len(places)), np.flatnonzero(vectors[1:] // S != vectors[:-1] // S) + 1) if len(places) else []
    for i, picture in enumerate(pictures):
        k, length = vectors[picture[0]] // S, len(picture)
        assert vectors[picture].tolist() == list(range(k * S, k * S + length)) and np.ptp(places[picture]) == length - 1
        assert length == S or (encoder.compat == "llava" and i == len(pictures) - 1 and places[-1] == len(tokens) - 1)
    numbers = [int(vectors[picture[0]]) // S for picture in pictures]
    assert numbers == sorted(set(numbers)) and (numbers == list(range(len(images))) or encoder.compat.startswith("nemo"))


def harmless(record):
    """The same turns, pictures and labels with words that look like nothing."""
    if isinstance(turns := record["conversations"], str):
        return record | {"conversations": "Q" + "<image>Q" * turns.count("<image>")}
    words = [turn["value"] and "<image>" * turn["value"].count("<image>") + "A" for turn in turns]
    return record | {"conversations": [turn | {"value": text} for turn, text in zip(turns, words, strict=True)]}


def controls_of(encoder, stream):
    """Control tokens and pictures, in order."""
    control = {number for name in CONTROLS if (number := encoder.tokenizer.id_of(name))}
    marks = [int(number) if medium < 0 else f"picture {medium}" for number, medium in zip(stream.ids, stream.media_index, strict=True)]
    return [mark for mark in marks if isinstance(mark, str) or mark in control]


def check_meaning(encoder, record, stream, sp):
    """Of a record that was not cut: control tokens stand where the template put them, and what is learnt spells the answers and what ends them. A token that
    holds a part of an answer is learnt, whatever it holds of the words before."""
    uncut = dataclasses.replace(encoder, max_length=50_000)
    assert controls_of(encoder, stream) == controls_of(encoder, uncut(harmless(record), WHERE).stream)
    if encoder.template == "interleaved":
        before, wanted = "", [part for part in record["conversations"].split("<image>") if part]
    else:
        turns = [turn for turn in record["conversations"] if turn["from"] != "system"]
        before = around_answer(encoder.template)[0] if encoder.template != "plain" or record["image"] else turns[0]["value"]
        wanted = runs_of(encoder.template, [turn["value"] for turn in turns[1::2]], asked_again=len(turns) % 2)
    edges = np.flatnonzero(np.diff(np.pad(stream.supervised, 1)))
    learnt = [spelt(sp, stream.ids[begin:end]) for begin, end in edges.reshape(-1, 2)]
    assert len(learnt) == len(wanted)
    for run, text in zip(learnt, wanted, strict=True):
        text, opening = text.replace("▁", " "), " " + before.replace("▁", " ")  # the space of a dummy prefix
        assert run.endswith(text) and opening.endswith(run[: len(run) - len(text)]), (run, text)


@pytest.mark.parametrize("mode", RECORDS)
def test_records(mode, encoder_of):
    templates = [*getattr(ENCODERS[mode], "originals", TEMPLATES)]
    counts = Counter()

    @functools.cache
    def open_sp(path):
        return SentencePieceProcessor(str(path))

    @settings(FUZZ, max_examples=RECORDS[mode])
    @given(cases(templates))
    def check(case):
        template, options, record, is_sound = case
        encoder = encoder_of(mode, template, **options)
        found = refusal_or(encoder, record)
        counts[is_sound, found is not None] += 1
        if found is None:
            return
        check_arrays(encoder, found.images, found.stream)
        if mode == "exact" and len(found.stream.ids) < encoder.limit - S:
            check_meaning(encoder, record, found.stream, open_sp(encoder.tokenizer.path))
            counts["read back"] += 1

    check()
    read_back, number = counts.pop("read back", 0), counts.total()
    assert number >= RECORDS[mode] and counts[True, True] > number / 4 and counts[False, False] > number / 8
    assert read_back > number / 4 or mode != "exact"
