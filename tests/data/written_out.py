"""What each template makes of three conversations, written out: <c:..> is a control token, <img> a picture, «..» what is supervised."""

import re

from neva_jax.data.conversation import DEFAULT_LABEL, SYSTEM_HUMAN, SYSTEM_LLAMA_2, SYSTEM_LLAVA, SYSTEM_MMTAG, SYSTEM_MPT, SYSTEM_V1

ONE = (("human", "<image>\nWhat is it?"), ("gpt", "A cat."))
TEXT = (("human", "Hello"), ("gpt", "Hi"))
THREE = (*ONE, ("human", "Why?"), ("gpt", "It purrs."), ("human", "And <image> in <image>?"), ("gpt", "Dogs."))

X0, X1, X2, S, E = (f"<c:<extra_id_{i}>>" for i in (0, 1, 2, 6, 7))
EOT, IM, END = (f"<c:<|{name}|>>" for name in ("eot_id", "im_start", "im_end"))


def llama_3(role):
    return f"<c:<|start_header_id|>>{role}<c:<|end_header_id|>>\n\n"


SYSTEM_3, USER_3, GPT_3 = f"<c:<|begin_of_text|>>{llama_3('system')}{SYSTEM_LLAVA}{EOT}", llama_3("user"), llama_3("assistant")


def nvgpt(system, opening):
    start, asks = f"{X0}System\n{system}{X1}User\n", f"\n{X1}Assistant\n{opening}"
    return (
        f"{start}<img>\nWhat is it?{asks}«A cat.\n{X1}»",
        f"{start}Hello{asks}«Hi\n{X1}»",
        f"{start}<img>\nWhat is it?{asks}«A cat.\n{X1}»User\nWhy?{asks}«It purrs.\n{X1}»User\nAnd <img> in <img>?{asks}«Dogs.\n{X1}»",
    )


NVGPT = nvgpt(f"{SYSTEM_V1}\n\n", f"{X2}{DEFAULT_LABEL}\n")


def llava_v0(system, start="", end=""):
    one, two = f"{start}<img>{end}\n", f"{start}<img>{end}\n" * 2
    return (
        f"{system}\n\n### Human: {one}What is it?\n### Assistant:« A cat.\n###» ",
        f"{system}\n\n### Human: Hello\n### Assistant:« Hi\n###» ",
        f"{system}\n\n### Human: {one}What is it?\n### Assistant:« A cat.\n###» Human: Why?\n### Assistant:« It purrs.\n###»"
        f" Human: {two}And  in ?\n### Assistant:« Dogs.\n###» ",
    )


def llava_v1(system, start="", end=""):
    one, two = f"{start}<img>{end}\n", f"{start}<img>{end}\n" * 2
    return (
        f"{system} USER: {one}What is it? ASSISTANT:« A cat.{E}»",
        f"{system} USER: Hello ASSISTANT:« Hi{E}»",
        f"{system} USER: {one}What is it? ASSISTANT:« A cat.{E}»USER: Why? ASSISTANT:« It purrs.{E}»USER: {two}And  in ? ASSISTANT:« Dogs.{E}»",
    )


def llava_llama_2(header, bos):
    return (
        f"[INST] {header}<img>\nWhat is it? [/INST]« A cat. {E}»",
        f"[INST] {header}Hello [/INST]« Hi {E}»",
        f"[INST] {header}<img>\nWhat is it? [/INST]« A cat. {E}»{bos}[INST] Why? [/INST]« It purrs. {E}»"
        f"{bos}[INST] <img>\n<img>\nAnd  in ? [/INST]« Dogs. {E}»",
    )


def llava_mpt(system):
    start, asks = f"{IM}system\n{system}{END}{IM}user\n", f"{END}{IM}assistant\n"
    return (
        f"{start}<img>\nWhat is it?{asks}«A cat.{END}»",
        f"{start}Hello{asks}«Hi{END}»",
        f"{start}<img>\nWhat is it?{asks}«A cat.{END}»{IM}user\nWhy?{asks}«It purrs.{END}»{IM}user\n<img>\n<img>\nAnd  in ?{asks}«Dogs.{END}»",
    )


LLAMA_2 = f" [INST] <<SYS>>\n{SYSTEM_LLAVA}\n<</SYS>>\n\n"
WRITTEN = {  # of ONE, TEXT and THREE; None where a template takes no such conversation
    "plain": ("<img>«A cat.\n»", "Hello«Hi\n»", None),
    "v1": (
        f"{SYSTEM_V1} USER: <img>\nWhat is it? ASSISTANT:« A cat.{E}»",
        f"{SYSTEM_V1} USER: Hello ASSISTANT:« Hi{E}»",
        f"{SYSTEM_V1} USER: <img>\nWhat is it? ASSISTANT:« A cat.{E}» USER: Why? ASSISTANT:« It purrs.{E}» USER: And <img> in <img>? ASSISTANT:« Dogs.{E}»",
    ),
    "llama_2": (
        f"{LLAMA_2}<img>\nWhat is it? [/INST]« A cat. {E}»",
        f"{LLAMA_2}Hello [/INST]« Hi {E}»",
        f"{LLAMA_2}<img>\nWhat is it? [/INST]« A cat. {E}»{S} [INST] Why? [/INST]« It purrs. {E}»{S} [INST] And <img> in <img>? [/INST]« Dogs. {E}»",
    ),
    "llama_3": (
        f"{SYSTEM_3}{USER_3}<img>\nWhat is it?{EOT}{GPT_3}«A cat.{EOT}»",
        f"{SYSTEM_3}{USER_3}Hello{EOT}{GPT_3}«Hi{EOT}»",
        f"{SYSTEM_3}{USER_3}<img>\nWhat is it?{EOT}{GPT_3}«A cat.{EOT}»{USER_3}Why?{EOT}{GPT_3}«It purrs.{EOT}»"
        f"{USER_3}And <img> in <img>?{EOT}{GPT_3}«Dogs.{EOT}»",
    ),
    "mistral": (
        f"{S} [INST] <img>\nWhat is it? [/INST]«A cat.{E}»",
        f"{S} [INST] Hello [/INST]«Hi{E}»",
        f"{S} [INST] <img>\nWhat is it? [/INST]«A cat.{E}» [INST] Why? [/INST]«It purrs.{E}» [INST] And <img> in <img>? [/INST]«Dogs.{E}»",
    ),
    "nvgpt": NVGPT,
    "nv_steerlm": NVGPT,
    "nv_dpo": nvgpt("\n", ""),
    "yi_34b": (
        f"{IM}user\n<img>\nWhat is it?{END}\n{IM}assistant\n«A cat.{END}»",
        f"{IM}user\nHello{END}\n{IM}assistant\n«Hi{END}»",
        f"{IM}user\n<img>\nWhat is it?{END}\n{IM}assistant\n«A cat.{END}\n»{IM}user\nWhy?{END}\n{IM}assistant\n«It purrs.{END}\n»"
        f"{IM}user\nAnd <img> in <img>?{END}\n{IM}assistant\n«Dogs.{END}»",
    ),
    "llava:plain": ("<img>«A cat.\n»", None, None),
    "llava:v0": llava_v0(SYSTEM_HUMAN),
    "llava:v1": llava_v1(SYSTEM_V1),
    "llava:llava_v1": llava_v1(SYSTEM_HUMAN),
    "llava:llama_2": llava_llama_2(f"<<SYS>>\n{SYSTEM_LLAMA_2}\n<</SYS>>\n\n", S),
    "llava:llava_llama_2": llava_llama_2(f"<<SYS>>\n{SYSTEM_LLAVA}\n<</SYS>>\n\n", S),
    "llava:v0_mmtag": llava_v0(SYSTEM_MMTAG, "<Image>", "</Image>"),
    "llava:v1_mmtag": llava_v1(SYSTEM_MMTAG, "<Image>", "</Image>"),
    "llava:mpt": llava_mpt(SYSTEM_MPT),
    "llava:chatml_direct": llava_mpt("Answer the questions."),
    "llava:mistral_instruct": llava_llama_2("", ""),
}
TABLE = [(name, turns, text) for name, texts in WRITTEN.items() for turns, text in zip((ONE, TEXT, THREE), texts, strict=True) if text]


def named(text):
    """The control tokens of a text by their names in a tokenizer."""
    return re.sub("<c:(.*?>)>", lambda found: {"<extra_id_6>": "<s>", "<extra_id_7>": "</s>"}.get(found[1], found[1]), text)


def around_answer(template):
    """(the unsupervised text up to an answer, what is supervised before its words, and behind them)"""
    before, space, stop = re.fullmatch(r"(.*?)«( ?)A cat\.(.*?)».*", WRITTEN[template][0], re.DOTALL).groups()
    return re.split("<img>|<c:.*?>>", before)[-1], space, named(stop)


def runs_of(template, answers, asked_again=False):
    """What is supervised for each answer of a record, as text. asked_again: a question without an answer follows. Yi's newline is learnt before a question."""
    _, space, stop = around_answer(template)
    return [space + answer + stop + "\n" * (template == "yi_34b" and (i + 1 < len(answers) or asked_again)) for i, answer in enumerate(answers)]
