"""Templates: a conversation becomes pieces of text, control tokens and pictures, each marked supervised or not. One entry a template, in TEMPLATES.

Nothing is ever searched for in the text: what is supervised is known because the template wrote it, so an answer may hold "ASSISTANT:", "</s>" or
"[INST]" and no label moves. The strings are NeMo NeVA's (v2.0.0).
"""

import dataclasses
from collections.abc import Callable

from neva_jax.errors import UserError

PLACEHOLDER = "<image>"
BOS, EOS, PATCH, START, END = "<extra_id_6>", "<extra_id_7>", "<extra_id_3>", "<extra_id_4>", "<extra_id_5>"  # NeVA's names in a sentencepiece model

SYSTEM_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """kind: "text" (value is the text), "control" (value is the token's name) or "image" (value is empty)."""

    kind: str
    value: str = ""
    supervised: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """render(system, rounds) -> pieces; rounds: [(question, answer)], the last answer None where the model is to speak.

    patch_is_unk: NeMo rewrites <extra_id_3> to id 0 under some templates and leaves it under others.
    """

    render: Callable[[str, list[tuple[str, str | None]]], list[Piece]]
    system: str = ""
    stop: str = EOS  # the control token, or text, behind an answer
    patch_is_unk: bool = True


def _text(text: str) -> list[Piece]:
    """Text of a user: every placeholder becomes a picture, all else stays text."""
    parts = text.split(PLACEHOLDER)
    pieces = [Piece("text", parts[0])]
    for part in parts[1:]:
        pieces += [Piece("image"), Piece("text", part)]
    return pieces


def _answer(text: str, *stop: Piece) -> list[Piece]:
    """What the model is to say after the prompt as inference ends it; the space behind "ASSISTANT:" is its own, then."""
    return [Piece("text", text, supervised=True), *stop]


def render_plain(system, rounds):
    """<image> caption \\n: the question's words are dropped, its pictures stay."""
    if len(rounds) != 1:
        raise UserError(f"the plain template takes one question and one answer; found {len(rounds)} rounds")
    question, answer = rounds[0]
    if PLACEHOLDER not in question:
        raise UserError("the plain template needs <image> in the question; a text-only record cannot be a caption")
    images = [Piece("image")] * question.count(PLACEHOLDER)
    return images if answer is None else images + _answer(answer, Piece("text", "\n", supervised=True))


def render_v1(system, rounds):
    """{system} USER: .. ASSISTANT: ..</s> USER: .. (Vicuna v1)"""
    pieces = [Piece("text", system + " ")]
    for i, (question, answer) in enumerate(rounds):
        pieces += [Piece("text", " ")] if i else []
        pieces += [Piece("text", "USER: "), *_text(question), Piece("text", " ASSISTANT:")]
        if answer is not None:
            pieces += _answer(" " + answer, Piece("control", EOS, supervised=True))
    return pieces


def render_llama_2(system, rounds):
    """' [INST] <<SYS>>..<</SYS>> .. [/INST] .. </s><s> [INST] ..': NeVA's stream opens without <s>, later rounds have theirs."""
    pieces = []
    for i, (question, answer) in enumerate(rounds):
        pieces += [Piece("control", BOS)] if i else []
        header = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and not i else ""
        pieces += [Piece("text", " [INST] " + header), *_text(question), Piece("text", " [/INST]")]
        if answer is not None:
            pieces += _answer(" " + answer, Piece("text", " ", supervised=True), Piece("control", EOS, supervised=True))
    return pieces


TEMPLATES = {
    "plain": Template(render_plain, stop="\n", patch_is_unk=False),
    "v1": Template(render_v1, system=SYSTEM_V1),
    "llama_2": Template(render_llama_2, system=SYSTEM_LLAMA_2),
}


def rounds_of(turns) -> list[tuple[str, str | None]]:
    """Turns of alternating roles, human first -> [(question, answer)]; a last question without answer has None."""
    texts = [text for _, text in turns]
    return [(texts[i], texts[i + 1] if i + 1 < len(texts) else None) for i in range(0, len(texts), 2)]


def render(template: str, turns, system: str | None = None) -> list[Piece]:
    """turns: ((role, text), ...) human first, alternating."""
    entry = TEMPLATES[template]
    return entry.render(entry.system if system is None else system, rounds_of(turns))
