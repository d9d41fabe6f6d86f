"""Templates: a conversation becomes pieces of text, control tokens and pictures, each marked supervised or not. One entry a template, in TEMPLATES.

Nothing is ever searched for in the text: what is supervised is known because the template wrote it, so an answer may hold "ASSISTANT:", "</s>" or
"[INST]" and no label moves. The strings are those of NeMo NeVA v2.0.0, and under "llava:" those of LLaVA 1.2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

from neva_jax.errors import UserError

PLACEHOLDER = "<image>"
SYSTEM, SEPARATOR, LABELS = "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"  # NeVA's names in a sentencepiece model
PATCH, START, END, BOS, EOS = "<extra_id_3>", "<extra_id_4>", "<extra_id_5>", "<extra_id_6>", "<extra_id_7>"

SYSTEM_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_HUMAN = SYSTEM_V1.replace("curious user", "curious human").replace("the user's", "the human's")
SYSTEM_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
SYSTEM_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
SYSTEM_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers should not include any "
    "harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in "
    "nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
SYSTEM_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
DEFAULT_LABEL = "quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4"


class Turn(NamedTuple):
    """role: "human", "gpt", or "text" for the one turn of an interleaved record. label: SteerLM's attributes of an answer."""

    role: str
    text: str
    label: str | None = None


class Round(NamedTuple):
    """answer: None where there is none. spoken: whether the assistant's turn is opened, which it is for an answer, and for a prompt."""

    question: str
    answer: str | None
    label: str | None
    spoken: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """kind: "text" (value is the text), "control" (value is the token's name) or "image" (value is empty)."""

    kind: str
    value: str = ""
    supervised: bool = False


@dataclasses.dataclass(frozen=True)
class Template:
    """render(system, rounds) -> pieces; see the functions below.

    stop: the control token, or text, behind an answer. takes_system: a record's `system` replaces the template's (NeMo's nvgpt family alone reads it).
    patch_is_unk: NeMo rewrites <extra_id_3> to id 0 under some templates and leaves it under others. llava: LLaVA's stream: BOS, every text between two
    pictures encoded by itself, and no id of a picture but its patches. wraps_images: False where use_im_start_end does nothing (LLaVA's captions).
    """

    render: Callable[[str, list[Round]], list[Piece]]
    system: str = ""
    stop: str = EOS
    takes_system: bool = False
    patch_is_unk: bool = True
    llava: bool = False
    wraps_images: bool = True


def text(value: str, supervised: bool = False) -> Piece:
    return Piece("text", value, supervised)


def control(token: str, supervised: bool = False) -> Piece:
    return Piece("control", token, supervised)


def with_images(value: str, supervised: bool = False) -> list[Piece]:
    """Text of a user: every placeholder becomes a picture, all else stays text."""
    first, *parts = value.split(PLACEHOLDER)
    return [text(first, supervised), *(piece for part in parts for piece in (Piece("image"), text(part, supervised)))]


def speech(turn: Round, *opening: Piece, space: str = "", stop: tuple[Piece, ...] = ()) -> list[Piece]:
    """The assistant's turn: what opens it, then what the model is to say, `space` and `stop` included: the space behind "ASSISTANT:" is its own, since a prompt
    ends before it."""
    if not turn.spoken:
        return []
    return [*opening] if turn.answer is None else [*opening, text(space + turn.answer, True), *stop]


LEARNT_EOS = (control(EOS, True),)


# ---- NeVA's templates --------------------------------------------------------------------------------------------------------------------------------


def render_plain(system, rounds):
    """<image> caption \n: the words of a question with pictures are dropped."""
    if len(rounds) != 1:
        raise UserError(f"the plain template takes one question and one answer; found {len(rounds)} rounds")
    images = [Piece("image")] * rounds[0].question.count(PLACEHOLDER)
    return (images or [text(rounds[0].question)]) + speech(rounds[0], stop=(text("\n", True),))


def render_v1(system, rounds):
    """{system} USER: .. ASSISTANT: ..</s> USER: .. (Vicuna v1)"""
    pieces = [text(system + " ")]
    for i, turn in enumerate(rounds):
        pieces += [text(" " * bool(i) + "USER: "), *with_images(turn.question), text(" "), *speech(turn, text("ASSISTANT:"), space=" ", stop=LEARNT_EOS)]
    return pieces


def render_llama_2(system, rounds):
    """' [INST] <<SYS>>..<</SYS>> .. [/INST] .. </s><s> [INST] ..': NeVA's stream opens without <s>, later rounds have theirs."""
    pieces = []
    for i, turn in enumerate(rounds):
        header = "" if i else wrapped(system)
        pieces += [control(BOS)] * bool(i) + [text(" [INST] " + header), *with_images(turn.question), text(" [/INST]")]
        pieces += speech(turn, space=" ", stop=(text(" ", True), *LEARNT_EOS))
    return pieces


def wrapped(system: str) -> str:
    return f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""


def render_mistral(system, rounds):
    """<s> [INST] .. [/INST]..</s> [INST] .. [/INST]..</s>"""
    pieces = [control(BOS)]
    for i, turn in enumerate(rounds):
        header = f"{system}\n" if system and not i else ""
        pieces += [text(" [INST] " + header), *with_images(turn.question), text(" [/INST]"), *speech(turn, stop=LEARNT_EOS)]
    return pieces


def _header(role: str) -> list[Piece]:
    return [control("<|start_header_id|>"), text(role), control("<|end_header_id|>"), text("\n\n")]


def render_llama_3(system, rounds):
    """<|begin_of_text|>{header of each role}\n\n..<|eot_id|>"""
    pieces = [control("<|begin_of_text|>"), *_header("system"), text(system), control("<|eot_id|>")]
    for turn in rounds:
        pieces += [*_header("user"), *with_images(turn.question), control("<|eot_id|>")]
        pieces += speech(turn, *_header("assistant"), stop=(control("<|eot_id|>", True),))
    return pieces


def render_yi_34b(system, rounds):
    """<|im_start|>user\n..<|im_end|>\n<|im_start|>assistant\n..<|im_end|>; the newline behind an answer is learnt where another round follows."""
    pieces = [control("<|im_start|>"), text(f"system\n{system}"), control("<|im_end|>")] if system else []
    for i, turn in enumerate(rounds):
        pieces += [text("\n", True)] * bool(i)
        pieces += [control("<|im_start|>"), text("user\n"), *with_images(turn.question.strip()), control("<|im_end|>")]
        pieces += speech(turn, text("\n"), control("<|im_start|>"), text("assistant\n"), stop=(control("<|im_end|>", True),))
    return pieces


def render_nvgpt(system, rounds, default_label: str | None = DEFAULT_LABEL):
    """<extra_id_0>System\n..<extra_id_1>User\n..\n<extra_id_1>Assistant\n<extra_id_2>{label}\n..\n<extra_id_1>; nv_dpo has the label where a record has."""
    pieces = [control(SYSTEM), text("System\n" + system), control(SEPARATOR)]
    for turn in rounds:
        label = default_label if turn.label is None else turn.label
        opening = [text("Assistant\n")] + ([] if label is None else [control(LABELS), text(label + "\n")])
        pieces += [text("User\n"), *with_images(turn.question), text("\n"), control(SEPARATOR)]
        pieces += speech(turn, *opening, stop=(text("\n", True), control(SEPARATOR, True)))
    return pieces


def render_interleaved(system, rounds):
    """The record's one text as it is; all of it is learnt but the pictures."""
    return with_images(rounds[0].question, supervised=True)


# ---- LLaVA's templates -------------------------------------------------------------------------------------------------------------------------------


def to_front(question: str, mmtag: bool = False) -> list[Piece]:
    """LLaVA's question: its pictures come before its words, a line each."""
    count = question.count(PLACEHOLDER)
    if not count:
        return [text(question)]
    tag = f"<Image>{PLACEHOLDER}</Image>" if mmtag else PLACEHOLDER
    return with_images((f"{tag}\n" * count + question.replace(PLACEHOLDER, "").strip()).strip())


def render_llava_plain(system, rounds):
    if not any(PLACEHOLDER in turn.question for turn in rounds):
        raise UserError("LLaVA's plain template needs <image> in the question; a text-only record cannot be a caption")
    return render_plain(system, rounds)


def render_llava_v0(system, rounds, mmtag: bool = False):
    """{system}\n\n### Human: ..\n### Assistant: ..\n### ; the answer is learnt with the "###" behind it, at which generation stops."""
    pieces = [text(system + "\n\n###")]
    for turn in rounds:
        pieces += [text(" Human: "), *to_front(turn.question, mmtag), text("\n###")]
        pieces += speech(turn, text(" Assistant:"), space=" ", stop=(text("\n###", True),))
    return pieces if rounds[-1].spoken and rounds[-1].answer is None else [*pieces, text(" ")]


def render_llava_v1(system, rounds, mmtag: bool = False):
    """{system} USER: .. ASSISTANT: ..</s>USER: .."""
    pieces = [text(system + " ")]
    for turn in rounds:
        pieces += [text("USER: "), *to_front(turn.question, mmtag), text(" "), *speech(turn, text("ASSISTANT:"), space=" ", stop=LEARNT_EOS)]
    return pieces


def render_llava_llama_2(system, rounds, bos: bool = True):
    """[INST] <<SYS>>..<</SYS>> .. [/INST] .. </s><s>[INST] ..; bos: whether later rounds open with <s>, as they do but for mistral_instruct."""
    pieces = []
    for i, turn in enumerate(rounds):
        header = "" if i else wrapped(system)
        pieces += [control(BOS)] * bool(i and bos) + [text("[INST] " + header), *to_front(turn.question), text(" [/INST]")]
        pieces += speech(turn, space=" ", stop=(text(" ", True), *LEARNT_EOS))
    return pieces


def render_llava_mpt(system, rounds):
    """<|im_start|>system\n..<|im_end|><|im_start|>user\n..<|im_end|><|im_start|>assistant\n..<|im_end|>, without newlines between turns."""
    pieces = [control("<|im_start|>"), text("system\n" + system), control("<|im_end|>")]
    for turn in rounds:
        pieces += [control("<|im_start|>"), text("user\n"), *to_front(turn.question), control("<|im_end|>")]
        pieces += speech(turn, control("<|im_start|>"), text("assistant\n"), stop=(control("<|im_end|>", True),))
    return pieces


NVGPT = Template(render_nvgpt, SYSTEM_V1 + "\n\n", SEPARATOR, takes_system=True, patch_is_unk=False)
LLAVA = functools.partial(Template, llava=True)

TEMPLATES = {
    "plain": Template(render_plain, stop="\n", patch_is_unk=False),
    "v1": Template(render_v1, SYSTEM_V1),
    "llama_2": Template(render_llama_2, SYSTEM_LLAVA),
    "llama_3": Template(render_llama_3, SYSTEM_LLAVA, "<|eot_id|>", patch_is_unk=False),
    "mistral": Template(render_mistral),
    "nvgpt": NVGPT,
    "nv_steerlm": NVGPT,
    "nv_dpo": dataclasses.replace(NVGPT, render=functools.partial(render_nvgpt, default_label=None), system="\n"),
    "yi_34b": Template(render_yi_34b, stop="<|im_end|>", patch_is_unk=False),
    "interleaved": Template(render_interleaved),
    "llava:plain": LLAVA(render_llava_plain, stop="\n", wraps_images=False),
    "llava:v0": LLAVA(render_llava_v0, SYSTEM_HUMAN, "###"),
    "llava:v1": LLAVA(render_llava_v1, SYSTEM_V1),
    "llava:llava_v1": LLAVA(render_llava_v1, SYSTEM_HUMAN),
    "llava:llama_2": LLAVA(render_llava_llama_2, SYSTEM_LLAMA_2),
    "llava:llava_llama_2": LLAVA(render_llava_llama_2, SYSTEM_LLAVA),
    "llava:v0_mmtag": LLAVA(functools.partial(render_llava_v0, mmtag=True), SYSTEM_MMTAG, "###"),
    "llava:v1_mmtag": LLAVA(functools.partial(render_llava_v1, mmtag=True), SYSTEM_MMTAG),
    "llava:mpt": LLAVA(render_llava_mpt, SYSTEM_MPT, "<|im_end|>"),
    "llava:chatml_direct": LLAVA(render_llava_mpt, "Answer the questions.", "<|im_end|>"),
    "llava:mistral_instruct": LLAVA(functools.partial(render_llava_llama_2, bos=False)),
}


def rounds_of(turns, prompt: bool = True) -> list[Round]:
    """Turns of alternating roles, human first -> rounds. prompt: behind a last question without an answer the model is to speak."""
    turns = [Turn(*turn) for turn in turns]
    rounds = [Round(question.text, reply.text, reply.label, True) for question, reply in zip(turns[::2], turns[1::2], strict=False)]
    return rounds + ([Round(turns[-1].text, None, None, prompt)] if len(turns) % 2 else [])


def render(template: str, turns, system: str | None = None, *, prompt: bool = True) -> list[Piece]:
    """turns: (Turn, ...) human first, alternating; labels may be left out. system: None for the template's own."""
    entry = TEMPLATES[template]
    return entry.render(entry.system if system is None else system, rounds_of(turns, prompt))
