"""Templates: the pieces each makes, written out, and texts that look like control tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_out import ONE, TABLE, TEXT, THREE, WRITTEN, E, S, nvgpt

from neva_jax.data import conversation
from neva_jax.data.conversation import DEFAULT_LABEL, SYSTEM_HUMAN, SYSTEM_LLAVA, TEMPLATES, Piece, Round, Turn, render, rounds_of
from neva_jax.errors import UserError


def shown(pieces):
    """Pieces as one string, in the terms of `written_out`."""
    parts = []
    for piece in pieces:
        part = {"text": piece.value, "control": f"<c:{piece.value}>", "image": "<img>"}[piece.kind]
        parts.append(f"«{part}»" if piece.supervised and part else part)
    return "".join(parts).replace("»«", "")


def test_every_template_is_written_out():
    assert {*WRITTEN, "interleaved"} == set(TEMPLATES)


@pytest.mark.parametrize(("template", "turns", "expected"), TABLE)
def test_written_out(template, turns, expected):
    assert shown(render(template, turns)) == expected


@pytest.mark.parametrize(("template", "turns", "expected"), TABLE)
def test_prompt_is_the_beginning_of_training(template, turns, expected):
    """A last question without an answer renders what training had before the answer, to the character."""
    assert shown(render(template, turns[:-1])) == expected[: expected.rindex("«")]


@pytest.mark.parametrize(("template", "expected"), [
    ("v1", f"ASSISTANT:« A cat.{E}» USER: Why? "),
    ("llama_2", f"[/INST]« A cat. {E}»{S} [INST] Why? [/INST]"),
    ("llama_3", "«A cat.<c:<|eot_id|>>»<c:<|start_header_id|>>user<c:<|end_header_id|>>\n\nWhy?<c:<|eot_id|>>"),
    ("mistral", f"[/INST]«A cat.{E}» [INST] Why? [/INST]"),
    ("nv_dpo", "«A cat.\n<c:<extra_id_1>>»User\nWhy?\n<c:<extra_id_1>>"),
    ("yi_34b", "«A cat.<c:<|im_end|>>\n»<c:<|im_start|>>user\nWhy?<c:<|im_end|>>"),
    ("llava:v0", "Assistant:« A cat.\n###» Human: Why?\n### "),
    ("llava:v1", f"ASSISTANT:« A cat.{E}»USER: Why? "),
    ("llava:mpt", "«A cat.<c:<|im_end|>>»<c:<|im_start|>>user\nWhy?<c:<|im_end|>>"),
])  # fmt: skip
def test_a_record_that_ends_with_a_question(template, expected):
    """In training the assistant's turn is not opened behind it."""
    assert shown(render(template, THREE[:3], prompt=False)).endswith(expected)


def test_interleaved():
    assert shown(render("interleaved", [("text", "A <image> and <image><image>.")], prompt=False)) == "«A »<img>« and »<img><img>«.»"


def test_systems_are_the_originals():
    """Where two names of one text would be easily mixed up."""
    assert TEMPLATES["llama_2"].system == TEMPLATES["llama_3"].system == TEMPLATES["llava:llava_llama_2"].system == SYSTEM_LLAVA
    assert SYSTEM_LLAVA.startswith("You are a helpful language and vision assistant. You are able to") and "  " not in SYSTEM_LLAVA
    chat = "A chat between a curious human and an artificial intelligence assistant. "
    assert chat + "The assistant gives helpful, detailed, and polite answers to the human's questions." == SYSTEM_HUMAN
    assert conversation.SYSTEM_LLAMA_2.startswith("You are a helpful, respectful and honest assistant.") and "safe.  Your" in conversation.SYSTEM_LLAMA_2
    assert "natural language.The visual content" in conversation.SYSTEM_MMTAG
    assert conversation.SYSTEM_MPT == "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    numbers = {"quality": 4, "toxicity": 0, "humor": 0, "creativity": 0, "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 4, "verbosity": 4}
    assert ",".join(f"{name}:{number}" for name, number in numbers.items()) == DEFAULT_LABEL


OWN = "Be brief."
IM, END = "<c:<|im_start|>>", "<c:<|im_end|>>"


@pytest.mark.parametrize(("template", "system", "expected"), [
    ("plain", OWN, "Hello«Hi\n»"),
    ("v1", OWN, f"Be brief. USER: Hello ASSISTANT:« Hi{E}»"),
    ("v1", "", f" USER: Hello ASSISTANT:« Hi{E}»"),
    ("llama_2", OWN, f" [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST]« Hi {E}»"),
    ("llama_2", "", f" [INST] Hello [/INST]« Hi {E}»"),
    ("mistral", OWN, f"{S} [INST] Be brief.\nHello [/INST]«Hi{E}»"),
    ("nvgpt", OWN, nvgpt(OWN, f"<c:<extra_id_2>>{DEFAULT_LABEL}\n")[1]),
    ("nv_dpo", OWN, nvgpt(OWN, "")[1]),
    ("yi_34b", OWN, f"{IM}system\nBe brief.{END}{WRITTEN['yi_34b'][1]}"),
    ("llama_3", OWN, WRITTEN["llama_3"][1].replace(SYSTEM_LLAVA, OWN)),
    ("llava:v0", OWN, WRITTEN["llava:v0"][1].replace(SYSTEM_HUMAN, OWN)),
    ("llava:v1", OWN, f"Be brief. USER: Hello ASSISTANT:« Hi{E}»"),
    ("llava:mistral_instruct", OWN, f"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello [/INST]« Hi {E}»"),
    ("llava:mpt", "", f"{IM}system\n{END}{IM}user\nHello{END}{IM}assistant\n«Hi{END}»"),
])  # fmt: skip
def test_system_of_a_record(template, system, expected):
    assert shown(render(template, TEXT, system)) == expected


@pytest.mark.parametrize(("template", "turns", "message"), [
    ("plain", THREE, "3 rounds"), ("plain", THREE[:3], "2 rounds"), ("llava:plain", THREE, "3 rounds"), ("llava:plain", TEXT, "needs <image> in the question"),
])  # fmt: skip
def test_plain_refuses(template, turns, message):
    with pytest.raises(UserError, match=message):
        render(template, turns)


def test_plain_drops_the_words_of_a_question_with_pictures():
    assert shown(render("plain", (("human", "Give <image> a <image> caption"), ("gpt", "Two.")))) == "<img><img>«Two.\n»"


@pytest.mark.parametrize(("question", "expected"), [
    ("Say <image> what\n", "<img>\nSay  what"), ("<image>", "<img>"), ("<image><image>", "<img>\n<img>"), (" no picture ", " no picture "),
])  # fmt: skip
def test_llava_puts_pictures_first(question, expected):
    """And strips the words, where there is a picture."""
    assert f"USER: {expected} ASSISTANT:" in shown(render("llava:v1", (("human", question), ("gpt", "A"))))


def test_labels_of_answers():
    """nvgpt's answers have the record's label, or else the default; nv_dpo's have the record's or none. No label is supervised."""
    turns = (("human", "Q"), ("gpt", "A", "quality:9"), ("human", "Q"), ("gpt", "B"), ("human", "Q"), ("gpt", "C", ""))
    label = "<c:<extra_id_2>>"
    for template, default in (("nvgpt", f"{label}{DEFAULT_LABEL}\n"), ("nv_dpo", "")):
        opened = [part.split("«")[0] for part in shown(render(template, turns)).split("Assistant\n")[1:]]
        assert opened == [f"{label}quality:9\n", default, f"{label}\n"]
    assert shown(render("v1", turns)) == shown(render("v1", [turn[:2] for turn in turns])), "elsewhere nothing reads them"


def test_rounds():
    turns = (("human", "a"), ("gpt", "b", "l"), ("human", "c"))
    assert rounds_of(turns) == [("a", "b", "l", True), ("c", None, None, True)]
    assert rounds_of(turns, prompt=False)[-1] == Round("c", None, None, False)
    assert rounds_of(map(Turn._make, [("human", "a", None), ("gpt", "b", None)])) == [("a", "b", None, True)]


PARTS = [
    "ASSISTANT:",
    "USER:",
    "</s>",
    "<s>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "###",
    "<|im_end|>",
    "<|eot_id|>",
    "<extra_id_6>",
    "<extra_id_7>",
    "<extra_id_1>",
    " ",
    "\n",
    "a",
]
NASTY = st.lists(st.sampled_from(PARTS), min_size=1).map("".join)


@given(NASTY, NASTY, NASTY, st.sampled_from(sorted(WRITTEN.keys() - {"plain", "llava:plain"})))
def test_text_is_never_searched(question, answer, second, template):
    """What a user or an answer says changes no piece but its own: the skeleton is that of harmless words."""
    turns = (("human", question), ("gpt", answer), ("human", second), ("gpt", answer))
    harmless = render(template, (("human", "Q"), ("gpt", "A"), ("human", "Q"), ("gpt", "A")))
    pieces = render(template, turns)
    assert [(p.kind, p.supervised) for p in pieces] == [(p.kind, p.supervised) for p in harmless]
    if template == "yi_34b":  # strips questions
        question, second = question.strip(), second.strip()
    texts = iter((question, answer, second, answer))
    for piece, other in zip(pieces, harmless, strict=True):
        says = {"Q": "Q", "A": "A", " A": "A"}.get(other.value)
        assert piece == (Piece(other.kind, other.value.replace(says, next(texts)), other.supervised) if says else other)
    assert next(texts, None) is None


@pytest.mark.parametrize("template", WRITTEN)
def test_every_template_ends_an_answer_as_it_says(template):
    last = [piece for piece in render(template, ONE) if piece.supervised][-1]
    assert last.value.endswith(TEMPLATES[template].stop) and (last.kind == "control" or TEMPLATES[template].stop in ("\n", "###"))
