"""One record: what is accepted in one form, and every defect refused with its field and kind."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neva_jax.data.record import Record, RecordError, parse_record
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
    assert parse_record(GOOD, where="w") == Record(("a.png",), (("human", "<image>\nWhat?"), ("gpt", "A cat.")))
    turns = [turn("system", "Be brief."), turn("user", "<image> and <image>"), turn("assistant", "No."), turn("human", "Why?"), turn("gpt", "So.")]
    found = parse_record({"image": ["a.png", "b.png"], "conversations": turns}, where="w")
    assert found.images == ("a.png", "b.png") and found.system == "Be brief."
    assert [role for role, _ in found.turns] == ["human", "gpt"] * 2


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_text_only(image):
    found = parse_record(image | {"conversations": [turn("human", "Hi"), turn("gpt", "Ho")]}, where="w")
    assert found.images == () and found.system is None
    assert parse_record(image | {"system": "", "conversations": [turn("human", "Hi"), turn("gpt", "Ho")]}, where="w").system == ""


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
        assert [role for role, _ in found.turns] == (["human", "gpt"] * 4)[: len(found.turns)] and len(found.turns) > 1
        assert sum(text.count("<image>") for _, text in found.turns) == len(found.images) <= 2
