"""NeMo NeVA's tokens and labels as v2.0.0 and v1.23.0 make them, defects included, so that one of its runs can be repeated.

NeMo writes the conversation as one string, tokenises it, and then finds the answers by splitting the string at the template's separators and counting the
tokens of each part tokenised by itself. So text of a user may become control tokens, an answer that holds a separator ends the supervision, and where the
parts' tokens are not the whole's the mask drifts. Whatever NeMo takes is taken, and noted; where NeMo raises, so does this.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from neva_jax.data.conversation import BOS, DEFAULT_LABEL, END, EOS, LABELS, PATCH, PLACEHOLDER, SEPARATOR, START, SYSTEM, SYSTEM_LLAVA, SYSTEM_V1
from neva_jax.data.encoder import Encoded, Encoder
from neva_jax.data.record import LooseRecord, RecordError, read_loosely
from neva_jax.data.tokenize import MEDIA_TOKENS, Stream
from neva_jax.errors import DataError, UserError

ROLES = {"human": 0, "gpt": 1}


class Refused(Exception):
    """NeMo raises here."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of the string that NeMo tokenises by itself: its first tokens(prompt) - prompt_less tokens are masked, and the next part begins
    tokens(text) - text_less further on."""

    prompt: str
    text: str
    prompt_less: int = 0
    text_less: int = 0


@dataclasses.dataclass(frozen=True)
class Original:
    """write(record) -> the string. parts(string) -> what is counted in it. rewrites: <extra_id_3>, 6 and 7 become 0, 1 and 2."""

    write: Callable[[LooseRecord], str]
    parts: Callable[[str], Iterator[Part]]
    rewrites: bool = False


# ---- writing -----------------------------------------------------------------------------------------------------------------------------------------


def alternating(record: LooseRecord, needs_first: bool = True) -> list[str]:
    """The turns' texts. A first turn that is not human's is dropped; then human and gpt must take turns."""
    turns = record.turns
    unknown = [turn.role for turn in turns if turn.role not in ROLES]
    if unknown:
        raise Refused(f"the role {unknown[0]!r} is neither human nor gpt")
    turns = turns[1:] if ROLES[turns[0].role] else turns
    if any(ROLES[turn.role] != j % 2 for j, turn in enumerate(turns)):
        raise Refused("the roles do not alternate")
    if needs_first and turns and not turns[0].text:
        raise Refused("the first turn is empty")
    return [turn.text for turn in turns]


def by_position(record: LooseRecord) -> list[str]:
    return [turn.text for turn in record.turns]


def write_v1(record):
    texts, string = alternating(record, needs_first=False), SYSTEM_V1 + " "
    for i, message in enumerate(texts):
        string += ("ASSISTANT" if i % 2 else "USER") + ":"
        if message:
            string += f" {message}" + (EOS + " " * (i + 1 < len(texts)) if i % 2 else " ")
    return string


def write_llama_2(record):
    string = ""
    for i, message in enumerate(alternating(record)):
        if message:
            header = "" if i else f"<<SYS>>\n{SYSTEM_LLAVA}\n<</SYS>>\n\n"
            string += f" {message} {EOS}" if i % 2 else f"{BOS} [INST] {header}{message} [/INST]"
    return string.lstrip(BOS)  # strips characters, as the original does


def write_mistral(record):
    messages = enumerate(alternating(record))
    return BOS + "".join((message + EOS if i % 2 else f" [INST] {message} [/INST]") for i, message in messages if message)


def write_llama_3(record):
    def turn(role, message):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{message}"

    string = "<|begin_of_text|>" + turn("system", SYSTEM_LLAVA) + "<|eot_id|>"
    for i, message in enumerate(alternating(record)):
        string += turn("assistant" if i % 2 else "user", message) + "<|eot_id|>" * bool(message or i % 2 == 0)
    return string


def write_yi_34b(record):
    texts, string = by_position(record), ""
    if not texts[0]:
        raise Refused("the first turn is empty")
    for i, message in enumerate(texts):
        string += f"<|im_start|>assistant\n{message}<|im_end|>" if i % 2 else f"<|im_start|>user\n{message.strip()}<|im_end|>"
        string += "\n" * bool(message or i % 2 == 0)
    string = string.strip()
    return string.removesuffix("\n<|im_end|>") + "\n" if "" in texts[1::2] and string.endswith("\n<|im_end|>") else string


def write_nvgpt(record, system: str = SYSTEM_V1 + "\n\n", default_label: str | None = DEFAULT_LABEL):
    string = f"{SYSTEM}System\n{system if record.system is None else record.system}{SEPARATOR}"
    for i, turn in enumerate(record.turns):
        label = default_label if turn.label is None else turn.label
        message = f"{LABELS}{label}\n{turn.text}" if i % 2 and label is not None else turn.text
        string += ("Assistant" if i % 2 else "User") + "\n" + (f"{message}\n{SEPARATOR}" if message else "")
    if "" in by_position(record)[1::2]:
        end = f"\n{SEPARATOR}"
        if default_label is not None:
            return string.rstrip(end) + "\n"  # strips characters, as the original does
        return string.removesuffix(end) + "\n" if string.endswith(end) else string
    return string


def write_plain(record):
    if len(record.turns) != 2:
        raise Refused(f"the plain template takes two turns, found {len(record.turns)}")
    return "".join(by_position(record)) + "\n"


def write_interleaved(record):
    return record.turns[0].text


# ---- counting ----------------------------------------------------------------------------------------------------------------------------------------


def two(text: str, separator: str) -> list[str] | None:
    """The prompt, separator included, and the answer; None where the text does not split into two, at which NeMo stops counting."""
    parts = text.split(separator)
    return [parts[0] + separator, parts[1]] if text and len(parts) == 2 else None


def parts_by_eos(string: str, separator: str, prompt_less: tuple[int, int]) -> Iterator[Part]:
    for i, text in enumerate(string.split(EOS)):
        split = two(text, separator)
        if split is None:
            return
        yield Part(split[0], text + EOS, prompt_less[i > 0], int(i > 0))


def parts_by_header(string: str, user: str, assistant: str) -> Iterator[Part]:
    rounds = string.split(user)
    rounds = [user.join(rounds[:2]), *(user + text for text in rounds[2:])]
    for text in rounds:
        split = two(text, assistant)
        if split is None:
            return
        yield Part(split[0], text)


def parts_by_separator(string: str, label: re.Pattern) -> Iterator[Part]:
    """label: what is masked of an answer."""
    chunks = string.split(SEPARATOR)
    rounds = [SEPARATOR.join(chunks[:3]), *(SEPARATOR.join(chunks[i : i + 2]) for i in range(3, len(chunks), 2))]
    for text in rounds:
        split = two(text, f"{SEPARATOR}Assistant\n")
        if split is None:
            return
        match = label.search(split[1])
        # nvgpt counts the label itself, nv_dpo all up to its end: the same where the answer begins with it
        yield Part(split[0] + (match.group() if match else ""), text + SEPARATOR)


parts_nv_dpo = functools.partial(parts_by_separator, label=re.compile(rf"^[\s\S]*?{LABELS}.*?\n"))
parts_nvgpt = functools.partial(parts_by_separator, label=re.compile(f"{LABELS}quality:.*\n"))
parts_llama_2 = functools.partial(parts_by_eos, separator="[/INST] ", prompt_less=(1, 2))
USER_3, ASSISTANT_3 = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))

V1 = Original(write_v1, functools.partial(parts_by_eos, separator=" ASSISTANT: ", prompt_less=(1, 2)), rewrites=True)
LLAMA_2 = Original(write_llama_2, parts_llama_2, rewrites=True)
NVGPT = Original(write_nvgpt, parts_nvgpt)
PLAIN = Original(write_plain, lambda string: iter(()))

V2_0_0 = {
    "plain": PLAIN,
    "v1": V1,
    "llama_2": LLAMA_2,
    "mistral": Original(write_mistral, functools.partial(parts_by_eos, separator="[/INST]", prompt_less=(0, 1)), rewrites=True),
    "llama_3": Original(write_llama_3, functools.partial(parts_by_header, user=USER_3, assistant=ASSISTANT_3)),
    "yi_34b": Original(write_yi_34b, functools.partial(parts_by_header, user="<|im_start|>user\n", assistant="<|im_start|>assistant\n")),
    "nvgpt": NVGPT,
    "nv_steerlm": NVGPT,
    "nv_dpo": Original(functools.partial(write_nvgpt, system="\n", default_label=None), parts_nv_dpo),
    "interleaved": Original(write_interleaved, lambda string: iter(())),
}
V1_23_0 = {
    "plain": PLAIN,
    "v1": V1,
    "llama_2": dataclasses.replace(LLAMA_2, parts=functools.partial(parts_llama_2, prompt_less=(2, 2))),  # one less: the first "]" is learnt
    "nvgpt": NVGPT,
}


class NemoEncoder(Encoder):
    """v2.0.0."""

    compat: ClassVar[str] = "nemo_v2.0.0"
    originals: ClassVar[dict[str, Original]] = V2_0_0

    def __post_init__(self):
        if self.template not in self.originals:
            raise UserError(f"model.data.compat {self.compat}: it has no template {self.template!r}; it has {', '.join(self.originals)}")

    def __call__(self, record: dict, where: str) -> Encoded:
        loose = read_loosely(record, where=where, interleaved=self.template == "interleaved")
        try:
            ids, learnt, cut = self._encode(loose)
        except Refused as error:
            raise DataError(f"{where}: conversations: {error}; {self.compat} stops at this record too") from None
        if len(ids) <= self.extra_token:
            raise DataError(f"{where}: conversations: no text, so that no token is left to read; remove the record")
        stream = self.masked(Stream(ids, learnt, self._media_index(ids, len(loose.images)), self.media_length, answers_cut=cut))
        return Encoded(loose.images[: stream.num_media], stream, self._note(record, where, stream))

    def _note(self, record: dict, where: str, stream: Stream) -> str:
        try:
            self.parse(record, where)
        except RecordError as error:
            return str(error)
        return "" if stream.supervised[1:].any() else f"{where}: conversations: no supervised token"

    # ---- as the original

    def _encode(self, record: LooseRecord) -> tuple[np.ndarray, np.ndarray, bool]:
        """ids, which of them are targets, and whether they were cut."""
        record = self._expand(record)
        original = self.originals[self.template]
        string = original.write(record)
        whole = self.tokenizer.whole(string)
        ids = np.array(whole[: self.limit], np.int32)
        if original.rewrites:
            for found, written in zip(self._rewritten_ids(), (0, 1, 2), strict=True):
                ids[ids == found] = written
        learnt = np.ones(len(ids), bool)
        if self.template == "plain":
            learnt[: self._count(record.turns[0].text)] = False
        elif self.template == "interleaved":
            patch, start, end, pad = (self._id(token) for token in (*self._media_tokens, "<pad>"))
            ids[ids == patch] = 0
            learnt = ~np.isin(ids, (start, end, 0, pad))
        else:
            here = 0
            for part in original.parts(string):
                learnt[here : here + self._count(part.prompt) - part.prompt_less] = False
                here += self._count(part.text) - part.text_less
            learnt[here:] = False
        return ids, learnt, len(whole) > len(ids)

    def _expand(self, record: LooseRecord) -> LooseRecord:
        """Placeholders become runs of media tokens, in a record with a picture alone."""
        if not record.images:
            return record
        turns = list(record.turns)
        first = turns[0].text
        if self.sep_image_conv_front:
            if self.template == "interleaved":
                raise Refused("sep_image_conv_front needs turns, and an interleaved record has none")
            self._needs_placeholder(first)
            first = f"{PLACEHOLDER} USER: {first.replace(PLACEHOLDER, '').strip()}"
        if self.template == "plain":
            self._needs_placeholder(first)
            first = PLACEHOLDER
        patch, start, end = self._media_tokens
        run = start + patch * (self.media_length - 2 * (not self.use_im_start_end)) + end
        turns[0] = turns[0]._replace(text=first)
        return dataclasses.replace(record, turns=tuple(turn._replace(text=turn.text.replace(PLACEHOLDER, run)) for turn in turns))

    def _needs_placeholder(self, text: str) -> None:
        if PLACEHOLDER not in text:
            raise Refused("the first turn has no <image>")

    @property
    def _media_tokens(self) -> tuple[str, str, str]:
        return MEDIA_TOKENS.get(self.model_type, (PATCH, START, END))

    def _rewritten_ids(self) -> tuple[int, int, int]:
        return tuple(self._id(token) for token in (PATCH, BOS, EOS))

    def _id(self, token: str) -> int:
        number = self.tokenizer.id_of(token)
        return (self.tokenizer.unk_id if self.tokenizer.unk_id is not None else -1) if number is None else number

    def _count(self, text: str) -> int:
        return len(self.tokenizer.whole(text))

    def _media_index(self, ids: np.ndarray, num_images: int) -> np.ndarray:
        """The k-th END token that is read stands behind the k-th picture, or is its last position. A run whose end was cut off is not replaced."""
        _, start, end = (self._id(token) for token in self._media_tokens)
        index, length, outside = np.full(len(ids), -1, np.int32), self.media_length, int(self.use_im_start_end)
        for k, place in enumerate(np.flatnonzero(ids[: len(ids) - self.extra_token] == end)[:num_images]):
            first = place + 1 - outside - length
            if first - outside >= 0 and ids[first - outside] == start:
                index[first : first + length] = np.arange(k * length, (k + 1) * length)
        return index


class Nemo123Encoder(NemoEncoder):
    """v1.23.0: four templates, ids by number, one set of media tokens."""

    compat: ClassVar[str] = "nemo_v1.23.0"
    originals: ClassVar[dict[str, Original]] = V1_23_0

    @property
    def _media_tokens(self):
        return PATCH, START, END

    def _rewritten_ids(self):
        return 32003, 32006, 32007
