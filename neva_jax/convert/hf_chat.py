"""Chat templates (Jinja) that write the prompts of data/conversation.py, so that another program's tokenizer gives the very ids that a model was trained on.

One entry a template, in CHATS; the macros around it do what data/tokenize.py does to ids. A tokenizer of another program cuts its text at control strings,
whoever wrote them, so what a user wrote has GAP put into every control string, and the exported tokenizer deletes GAP once the text is cut: no user's text
becomes a control token. Given up: "interleaved", which is no conversation, and text that holds GAP itself.
"""

import dataclasses
import json
import re

from neva_jax.data.conversation import DEFAULT_LABEL, LABELS, PLACEHOLDER, SEPARATOR, SYSTEM, TEMPLATES

GAP = "\ue000"  # of the private use area, where no text has a character


@dataclasses.dataclass(frozen=True)
class Chat:
    """Jinja expressions for what opens the stream, a user's turn, what opens an answer, an answer and its stop, and what ends a stream without a prompt.

    They may use system, question, answer, label, bos, eos, i (which round it is) and the macros.
    """

    question: str
    answer: str
    head: str = '""'
    opening: str = '""'
    closing: str = '""'


def _header(role: str) -> str:
    return f'control("<|start_header_id|>") ~ text("{role}") ~ control("<|end_header_id|>") ~ text("\\n\\n")'


def _plain(otherwise: str) -> Chat:
    once = 'raise_exception("this template takes one question and one answer") if i else '
    return Chat(once + f"(images(question) if pictures(question)|int else {otherwise})", 'text(answer ~ "\\n")')


def _llama_2(opening: str, question: str, bos: bool = True) -> Chat:
    header = '("<<SYS>>\\n" ~ system ~ "\\n<</SYS>>\\n\\n" if system and not i else "")'
    begin = '(control(bos) if i else "") ~ ' * bos
    return Chat(f'{begin}text("{opening}" ~ {header}) ~ {question} ~ text(" [/INST]")', 'text(" " ~ answer ~ " ") ~ control(eos)')


def _v1(begin: str, question: str) -> Chat:
    return Chat(f'text({begin}"USER: ") ~ {question} ~ text(" ")', 'text(" " ~ answer) ~ control(eos)', head='text(system ~ " ")', opening='text("ASSISTANT:")')


def _v0(question: str) -> Chat:
    return Chat(
        f'text(" Human: ") ~ {question} ~ text("\\n###")', 'text(" " ~ answer ~ "\\n###")',
        head='text(system ~ "\\n\\n###")', opening='text(" Assistant:")', closing='text(" ")',
    )  # fmt: skip


FRONT, MMTAG = 'to_front(question, "<image>")', 'to_front(question, "<Image><image></Image>")'
ENDED = 'text(answer) ~ control("<|im_end|>")'
NVGPT = Chat(
    f'text("User\\n") ~ with_images(question) ~ text("\\n") ~ control("{SEPARATOR}")',
    f'text(answer ~ "\\n") ~ control("{SEPARATOR}")',
    head=f'control("{SYSTEM}") ~ text("System\\n" ~ system) ~ control("{SEPARATOR}")',
    opening=f'text("Assistant\\n") ~ ("" if label is none else control("{LABELS}") ~ text(label ~ "\\n"))',
)
MPT = Chat(
    f'control("<|im_start|>") ~ text("user\\n") ~ {FRONT} ~ control("<|im_end|>")', ENDED,
    head='control("<|im_start|>") ~ text("system\\n" ~ system) ~ control("<|im_end|>")', opening='control("<|im_start|>") ~ text("assistant\\n")',
)  # fmt: skip

CHATS = {
    "plain": _plain("text(question)"),
    "v1": _v1('(" " if i else "") ~ ', "with_images(question)"),
    "llama_2": _llama_2(" [INST] ", "with_images(question)"),
    "llama_3": Chat(
        f'{_header("user")} ~ with_images(question) ~ control("<|eot_id|>")', 'text(answer) ~ control("<|eot_id|>")',
        head=f'control("<|begin_of_text|>") ~ {_header("system")} ~ text(system) ~ control("<|eot_id|>")', opening=_header("assistant"),
    ),
    "mistral": Chat(
        'text(" [INST] " ~ (system ~ "\\n" if system and not i else "")) ~ with_images(question) ~ text(" [/INST]")', "text(answer) ~ control(eos)",
        head="control(bos)",
    ),
    "nvgpt": NVGPT,
    "nv_steerlm": NVGPT,
    "nv_dpo": NVGPT,
    "yi_34b": Chat(
        'text("\\n" if i else "") ~ control("<|im_start|>") ~ text("user\\n") ~ with_images(question|trim) ~ control("<|im_end|>")', ENDED,
        head='(control("<|im_start|>") ~ text("system\\n" ~ system) ~ control("<|im_end|>") if system else "")',
        opening='text("\\n") ~ control("<|im_start|>") ~ text("assistant\\n")',
    ),
    "llava:plain": _plain('raise_exception("this template needs a picture")'),
    "llava:v0": _v0(FRONT),
    "llava:v1": _v1("", FRONT),
    "llava:llava_v1": _v1("", FRONT),
    "llava:llama_2": _llama_2("[INST] ", FRONT),
    "llava:llava_llama_2": _llama_2("[INST] ", FRONT),
    "llava:v0_mmtag": _v0(MMTAG),
    "llava:v1_mmtag": _v1("", MMTAG),
    "llava:mpt": MPT,
    "llava:chatml_direct": MPT,
    "llava:mistral_instruct": _llama_2("[INST] ", FRONT, bos=False),
}  # fmt: skip

JINJA = """\
{#- The prompts of the template "@TEMPLATE@", to the token. A character that does not show breaks control strings of a user; the tokenizer deletes it. -#}
{%- set bos = @BOS@ -%}
{%- set eos = @EOS@ -%}
{%- set spelt = @SPELT@ -%}
{%- set ns = namespace(begins=true, opens=true, system=@SYSTEM@, label=@LABEL@) -%}
{%- macro text(value) -%}
    {%- if value -%}
        {%- if ns.begins -%}{{ @LEAD@ }}{%- endif -%}
        {{ value@BREAK@ }}
        {%- set ns.begins = false -%}
        {%- set ns.opens = false -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro control(name) -%}
    {%- if name in spelt -%}
        {{ text(name) }}
    {%- else -%}
        {{ (@OPENS@ if ns.opens else "") ~ name }}
        {%- set ns.begins = @RESTARTS@ -%}
        {%- set ns.opens = false -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro image() -%}
    {{ (@OPENS@ if ns.opens else "") ~ @IMAGE@ }}
    {%- set ns.begins = @BEHIND_IMAGE@ -%}
    {%- set ns.opens = false -%}
{%- endmacro -%}
{%- macro pictures(question) -%}
    {{ question.split("<image>")|length - 1 }}
{%- endmacro -%}
{%- macro images(question) -%}
    {%- for part in question.split("<image>") -%}
        {%- if not loop.first -%}{{ image() }}{%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- macro with_images(question) -%}
    {%- for part in question.split("<image>") -%}
        {%- if not loop.first -%}{{ image() }}{%- endif -%}
        {{ text(part) }}
    {%- endfor -%}
{%- endmacro -%}
{%- macro to_front(question, tag) -%}
    {%- set count = pictures(question)|int -%}
    {%- if count -%}
        {{ with_images(((tag ~ "\\n") * count ~ question.replace("<image>", "")|trim)|trim) }}
    {%- else -%}
        {{ text(question) }}
    {%- endif -%}
{%- endmacro -%}
{%- macro content(message) -%}
    {%- if message.content is string -%}
        {{ message.content }}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == "text" -%}{{ part.text|replace("<image>", "<@GAP@image>") }}
            {%- else -%}{{ "<image>" if loop.last else "<image>\\n" }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == "system" -%}
    {%- set ns.system = content(messages[0]) -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- set system = ns.system -%}
{{ @START@ ~ (@HEAD@) }}
{%- for message in messages -%}
    {%- set i = loop.index0 // 2 -%}
    {%- set question = content(message) -%}
    {%- set answer = question -%}
    {%- set label = message.label if message.label is defined else ns.label -%}
    {%- if message.role != ("assistant" if loop.index0 % 2 else "user") -%}
        {{ raise_exception("turns must be of user and assistant, one after the other") }}
    {%- elif message.role == "user" -%}
        {{ @QUESTION@ }}
    {%- else -%}
        {{ @OPENING@ ~ @ANSWER@ }}
    {%- endif -%}
{%- endfor -%}
{%- set label = ns.label -%}
{{ @OPENING@ if add_generation_prompt and messages[-1].role == "user" else @CLOSING@ }}"""


@dataclasses.dataclass(frozen=True)
class Style:
    """How a tokenizer's stream is written.

    lead: a Jinja expression, of `value`, for what stands before a text that opens the stream; opens: what stands before a control token or picture that does.
    restarts, behind_image: whether a text behind a control token, or a picture, begins like one that opens the stream. start: what stands before everything.
    image: <image> with what stands around it. controls: all special tokens; spelt: control strings that the tokenizer does not have.
    """

    lead: str
    opens: str
    restarts: bool
    behind_image: bool
    start: str
    bos: str
    eos: str
    image: str
    controls: tuple[str, ...]
    spelt: tuple[str, ...]


def chat_template(template: str, style: Style) -> str | None:
    """The Jinja of one of TEMPLATES; None where it cannot be written as a chat."""
    if template not in CHATS:
        return None
    chat, literal = CHATS[template], json.dumps
    label = DEFAULT_LABEL if template in ("nvgpt", "nv_steerlm") else None
    broken = sorted({re.sub(r"^(<\||<extra_id_).*", r"\1", name, flags=re.DOTALL) for name in (*style.controls, PLACEHOLDER) if len(name) > 1})
    values = {
        "TEMPLATE": template, "BOS": literal(style.bos), "EOS": literal(style.eos), "SPELT": literal(list(style.spelt)),
        "SYSTEM": literal(TEMPLATES[template].system), "LABEL": "none" if label is None else literal(label), "LEAD": style.lead, "OPENS": literal(style.opens),
        "BREAK": "".join(f"|replace({literal(name)}, {literal(name[0] + GAP + name[1:], ensure_ascii=False)})" for name in broken),
        "RESTARTS": literal(style.restarts), "BEHIND_IMAGE": literal(style.behind_image), "IMAGE": literal(style.image), "GAP": GAP,
        "START": literal(style.start), "HEAD": chat.head, "QUESTION": chat.question, "OPENING": f"({chat.opening})", "ANSWER": f"({chat.answer})",
        "CLOSING": f"({chat.closing})",
    }  # fmt: skip
    return re.sub("@([A-Z_]+)@", lambda match: values[match[1]], JINJA)
