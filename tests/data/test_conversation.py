"""Templates: the pieces each makes, written out, and texts that look like control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neva_jax.data.conversation import BOS, EOS, SYSTEM_LLAMA_2, SYSTEM_V1, TEMPLATES, Piece, render, rounds_of
from neva_jax.errors import UserError

ONE = (("human", "<image>\nWhat is it?"), ("gpt", "A cat."))
TEXT = (("human", "Hello"), ("gpt", "Hi"))
THREE = (*ONE, ("human", "Why?"), ("gpt", "It purrs."), ("human", "And <image> and <image>?"), ("gpt", "Dogs."))


def shown(pieces):
    """Pieces as one string: <c:..> control tokens, <img> pictures, «..» what is supervised."""
    parts = []
    for piece in pieces:
        part = {"text": piece.value, "control": f"<c:{piece.value}>", "image": "<img>"}[piece.kind]
        parts.append(f"«{part}»" if piece.supervised and part else part)
    return "".join(parts).replace("»«", "")


V1 = f"{SYSTEM_V1} USER: "
LLAMA_2 = f" [INST] <<SYS>>\n{SYSTEM_LLAMA_2}\n<</SYS>>\n\n"
S, E = f"<c:{BOS}>", f"<c:{EOS}>"
TABLE = [
    ("plain", ONE, "<img>«A cat.\n»"),
    ("plain", (("human", "Give <image> a <image> caption"), ("gpt", "Two.")), "<img><img>«Two.\n»"),
    ("v1", ONE, f"{V1}<img>\nWhat is it? ASSISTANT:« A cat.{E}»"),
    ("v1", TEXT, f"{V1}Hello ASSISTANT:« Hi{E}»"),
    (
        "v1", THREE,
        f"{V1}<img>\nWhat is it? ASSISTANT:« A cat.{E}» USER: Why? ASSISTANT:« It purrs.{E}» USER: And <img> and <img>? ASSISTANT:« Dogs.{E}»",
    ),
    ("llama_2", ONE, f"{LLAMA_2}<img>\nWhat is it? [/INST]« A cat. {E}»"),
    ("llama_2", TEXT, f"{LLAMA_2}Hello [/INST]« Hi {E}»"),
    (
        "llama_2", THREE,
        f"{LLAMA_2}<img>\nWhat is it? [/INST]« A cat. {E}»{S} [INST] Why? [/INST]« It purrs. {E}»{S} [INST] And <img> and <img>? [/INST]« Dogs. {E}»",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("template", "turns", "expected"), TABLE)
def test_written_out(template, turns, expected):
    assert shown(render(template, turns)) == expected


@pytest.mark.parametrize(("template", "turns", "expected"), TABLE)
def test_prompt_is_the_beginning_of_training(template, turns, expected):
    """A last question without an answer renders what training had before the answer, to the character."""
    assert shown(render(template, turns[:-1])) == expected[: expected.rindex("«")]


@pytest.mark.parametrize(("template", "system", "expected"), [
    ("v1", "Be brief.", f"Be brief. USER: Hello ASSISTANT:« Hi{E}»"),
    ("v1", "", f" USER: Hello ASSISTANT:« Hi{E}»"),
    ("llama_2", "Be brief.", f" [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST]« Hi {E}»"),
    ("llama_2", "", f" [INST] Hello [/INST]« Hi {E}»"),
])  # fmt: skip
def test_system_of_a_record(template, system, expected):
    assert shown(render(template, TEXT, system)) == expected


@pytest.mark.parametrize(("turns", "message"), [(THREE, "3 rounds"), (TEXT, "<image>")])
def test_plain_refuses(turns, message):
    with pytest.raises(UserError, match=message):
        render("plain", turns)


def test_rounds():
    assert rounds_of((("human", "a"), ("gpt", "b"), ("human", "c"))) == [("a", "b"), ("c", None)]


PARTS = ["ASSISTANT:", "USER:", "</s>", "<s>", "[INST]", "[/INST]", "<<SYS>>", BOS, EOS, "<extra_id_4>", " ", "\n", "a"]
NASTY = st.lists(st.sampled_from(PARTS), min_size=1).map("".join)


@given(NASTY, NASTY, NASTY, st.sampled_from(["v1", "llama_2"]))
def test_text_is_never_searched(question, answer, second, template):
    """What a user or an answer says changes no piece but its own: the skeleton is that of harmless words."""
    turns = (("human", question), ("gpt", answer), ("human", second), ("gpt", answer))
    harmless = render(template, (("human", "Q"), ("gpt", "A"), ("human", "Q"), ("gpt", "A")))
    pieces = render(template, turns)
    assert [(p.kind, p.supervised) for p in pieces] == [(p.kind, p.supervised) for p in harmless]
    texts = iter((question, answer, second, answer))
    for piece, other in zip(pieces, harmless, strict=True):
        says = {"Q": "Q", "A": "A", " A": "A"}.get(other.value)
        assert piece == (Piece(other.kind, other.value.replace(says, next(texts)), other.supervised) if says else other)
    assert next(texts, None) is None


def test_every_template_ends_an_answer_as_it_says():
    for name, template in TEMPLATES.items():
        last = render(name, ONE)[-1]
        assert last.supervised and last.value == template.stop
