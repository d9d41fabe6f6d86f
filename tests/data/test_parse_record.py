"""One record: what is accepted in one form, every defect refused with its field and kind, and the originals' looser readings."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neva_jax.data.conversation import Turn
from neva_jax.data.record import LooseRecord, Record, RecordError, adopt_img_tags, parse_record, read_loosely
from neva_jax.errors import DataError


def turn(role, text):
    return {"from": role, "value": text}


PAIR = [turn("human", "<image>\nWhat?"), turn("gpt", "A cat.")]
GOOD = {"id": 1, "image": "a.png", "conversations": PAIR}


TRICKY = st.text(alphabet=st.sampled_from('ab"\\/[]{},: \n\té€😀\ud83d'), max_size=12) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=8,
)


def test_parse_normalises():
    assert parse_record(GOOD, where="w") == Record(("a.png",), (Turn("human", "<image>\nWhat?"), Turn("gpt", "A cat.")))
    turns = [turn("system", "Be brief."), turn("user", "<image> and <image>"), turn("assistant", "No."), turn("human", "Why?"), turn("gpt", "So.")]
    found = parse_record({"image": ["a.png", "b.png"], "conversations": turns}, where="w")
    assert found.images == ("a.png", "b.png") and found.system == "Be brief."
    assert [turn.role for turn in found.turns] == ["human", "gpt"] * 2 and found.system_key is None


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_text_only(image):
    found = parse_record(image | {"conversations": [turn("human", "Hi"), turn("gpt", "Ho")]}, where="w")
    assert found.images == () and found.system is None
    found = parse_record(image | {"system": "", "conversations": [turn("human", "Hi"), turn("gpt", "Ho")]}, where="w")
    assert found.system_key == "" and found.system is None, "which of the two counts is the template's affair"


def test_labels():
    labelled = [PAIR[0], turn("gpt", "A cat.") | {"label": "quality:4"}, turn("human", "Why?"), turn("gpt", "So.") | {"label": None}]
    assert [turn.label for turn in parse_record({"image": "a", "conversations": labelled}, where="w").turns] == [None, "quality:4", None, None]


def test_interleaved():
    found = parse_record({"image": ["a", "b"], "conversations": "A <image> and <image>."}, where="w", interleaved=True)
    assert found == Record(("a", "b"), (Turn("text", "A <image> and <image>."),))
    for record, field, words in (
        (GOOD, "conversations", "found a list of 2, expected a string"),
        ({"image": "a", "conversations": "no tag"}, "image", "0 <image>"),
        ({"conversations": 4}, "conversations", "found 4"),
    ):
        with pytest.raises(RecordError, match=words) as error:
            parse_record(record, where="w", interleaved=True)
        assert error.value.field == field


BAD = {
    "not an object": ([], "", "type", "a list of 0"),
    "image is a number": (GOOD | {"image": 3}, "image", "type", "found 3"),
    "image is true": (GOOD | {"image": True}, "image", "type", "found true"),
    "image holds null": (GOOD | {"image": [None]}, "image[0]", "type", "nothing or null"),
    "image holds empty": (GOOD | {"image": ["a", ""]}, "image[1]", "empty", "empty name"),
    "video": (GOOD | {"video": "a.mp4"}, "video", "video", "not supported"),
    "no conversations": ({"image": "a"}, "conversations", "type", "nothing or null"),
    "conversations is text": ({"conversations": "a"}, "conversations", "type", "a list of turns"),
    "no turns": ({"conversations": []}, "conversations", "empty", "a list of 0"),
    "turn is text": ({"conversations": ["a"]}, "conversations[0]", "type", 'found "a"'),
    "no from": ({"conversations": [{"role": "user", "content": "a"}]}, "conversations[0].from", "type", "nothing or null"),
    "value is null": ({"conversations": [turn("human", None)]}, "conversations[0].value", "type", "nothing or null"),
    "value is a number": ({"conversations": [turn("human", "a"), turn("gpt", 5)]}, "conversations[1].value", "type", "found 5"),
    "half a surrogate": ({"conversations": [turn("human", "\ud83d")]}, "conversations[0].value", "type", "surrogate"),
    "unknown role": ({"conversations": [turn("function", "a")]}, "conversations[0].from", "role", '"function"'),
    "late system": ({"conversations": [*PAIR, turn("system", "a")]}, "conversations[2].from", "role", '"system"'),
    "two systems": ({"system": "a", "conversations": [turn("system", "a"), *PAIR]}, "system", "system", "keep one"),
    "system is a list": (GOOD | {"system": ["a"]}, "system", "type", "a list of 1"),
    "gpt first": ({"conversations": PAIR[::-1]}, "conversations[0].from", "role_order", "first turn is gpt"),
    "gpt first after system": ({"conversations": [turn("system", "a"), PAIR[1]]}, "conversations[1].from", "role_order", "first turn is gpt"),
    "human twice": ({"conversations": [PAIR[0], turn("user", "b"), PAIR[1]]}, "conversations[1].from", "role_order", "two human turns"),
    "gpt twice": ({"conversations": [*PAIR, turn("assistant", "b")]}, "conversations[2].from", "role_order", "two gpt turns"),
    "no answer": ({"conversations": [turn("human", "a")]}, "conversations", "no_answer", "no gpt turn"),
    "only a system": ({"conversations": [turn("system", "a")]}, "conversations", "no_answer", "no gpt turn"),
    "empty answer": ({"conversations": [turn("human", "a"), turn("gpt", " \n")]}, "conversations[1].value", "empty", "empty answer"),
    "tag without image": ({"conversations": PAIR}, "image", "image_count", "1 <image> .* but 0"),
    "image without tag": ({"image": "a", "conversations": [turn("human", "a"), turn("gpt", "b")]}, "image", "image_count", "0 <image> .* but 1"),
    "two tags, one image": (GOOD | {"conversations": [turn("human", "<image><image>"), PAIR[1]]}, "image", "image_count", "2 <image> .* but 1"),
    "tag in answer": (GOOD | {"conversations": [PAIR[0], turn("gpt", "a <image>")]}, "conversations[1].value", "image_tag", "in an answer"),
    "tag in a system turn": ({"conversations": [turn("system", "<image>"), *PAIR]}, "system", "image_tag", "system prompt"),
    "label is a number": ({"conversations": [PAIR[0], PAIR[1] | {"label": 4}]}, "conversations[1].label", "type", "found 4"),
    "half a surrogate in a name": (GOOD | {"image": "\ud83d.png"}, "image[0]", "type", "surrogate"),
    "half a surrogate in a system": (GOOD | {"system": "\ud83d"}, "system", "type", "surrogate"),
    "tag in system": (GOOD | {"system": "<image>"}, "system", "image_tag", "system prompt"),
    "too many": ({"image": ["a"] * 3, "conversations": [turn("human", "<image>" * 3), PAIR[1]]}, "image", "max_media", "3 images, expected at most 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records(case):
    record, field, kind, words = BAD[case]
    with pytest.raises(RecordError, match=words) as error:
        parse_record(record, where="data.json: record 7", max_media=2)
    assert (error.value.field, error.value.kind) == (field, kind)
    assert str(error.value).startswith(f"data.json: record 7: {field}") and "\n" not in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.field, again.kind) == (str(error.value), field, kind)


ROLE = st.sampled_from(["human", "gpt", "user", "assistant", "system", "x"]) | VALUES
TURN = st.fixed_dictionaries({}, optional={"from": ROLE, "value": st.sampled_from(["<image>", "a", " "]) | VALUES}) | VALUES
ANY_RECORD = VALUES | st.fixed_dictionaries(
    {}, optional={"image": VALUES, "system": VALUES, "conversations": st.lists(TURN, max_size=4) | VALUES, "video": st.none() | VALUES}
)


@settings(max_examples=200, deadline=None)
@given(ANY_RECORD)
def test_any_value_is_parsed_or_refused_in_one_line(value):
    try:
        found = parse_record(value, where="w", max_media=2)
    except DataError as error:
        assert str(error).isascii() and "\n" not in str(error)
    else:
        assert [turn.role for turn in found.turns] == (["human", "gpt"] * 4)[: len(found.turns)] and len(found.turns) > 1
        assert sum(turn.text.count("<image>") for turn in found.turns) == len(found.images) <= 2


# ---- NeVA's and LLaVA's looser ways


def test_read_loosely_keeps_what_is_there():
    odd = [turn("gpt", "") | {"label": ""}, turn("tool", "<image>"), turn("human", "a"), turn("human", "b")]
    read = read_loosely({"image": ["x", "y", "z"], "system": "S", "conversations": odd}, where="w")
    assert read == LooseRecord(("x", "y", "z"), True, (Turn("gpt", "", ""), Turn("tool", "<image>"), Turn("human", "a"), Turn("human", "b")), "S")
    assert read_loosely({"conversations": "a <image>"}, where="w", interleaved=True) == LooseRecord((), False, (Turn("text", "a <image>"),), None)
    assert read_loosely({"image": None, "conversations": PAIR}, where="w").has_image


@settings(max_examples=200, deadline=None)
@given(ANY_RECORD, st.booleans())
def test_any_value_is_read_loosely_or_refused_in_one_line(value, interleaved):
    try:
        found = read_loosely(value, where="w", interleaved=interleaved)
    except RecordError as error:
        assert str(error).isascii() and "\n" not in str(error)
    else:
        assert len(found.turns) == (1 if interleaved else len(value["conversations"]))


def test_adopt_img_tags():
    """Of human turns alone, by the last part of the path; what has none, or has `image`, is the same object."""
    turns = [turn("human", '<img src="a/b.png"> or <img src="c d.jpg">?'), turn("gpt", '<img src="e.png">'), turn("user", '<img src="f.png">')]
    found = adopt_img_tags({"id": 1, "conversations": turns})
    assert found["image"] == ["b.png", "c d.jpg", "f.png"] and found["id"] == 1
    assert [turn["value"] for turn in found["conversations"]] == ["<image> or <image>?", '<img src="e.png">', "<image>"]
    assert turns[0]["value"].startswith("<img"), "the record itself stays as it was"
    for same in ({"conversations": turns, "image": None}, GOOD, {"conversations": "<img src='a'>"}, {"conversations": [turn("human", '<img src="">')]}, {}):
        assert adopt_img_tags(same) is same


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional={"image": VALUES, "conversations": st.lists(TURN, max_size=4) | VALUES}))
def test_adopt_img_tags_of_anything(value):
    """What is no turn is left for the parser to refuse."""
    assert adopt_img_tags(value).keys() <= {"image", "conversations"}
