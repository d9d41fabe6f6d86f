"""LLaVA's tokens and labels as its train.py makes them (version 1.2), defects included, so that one of its runs can be repeated.

LLaVA finds the answers by splitting the conversation's string and counting the tokens of each part; where the sum is not the whole's length it prints
"tokenization mismatch" and learns nothing of the record. Whatever LLaVA takes is taken, and noted; where LLaVA raises, so does this. Not repeated: a surplus
<image> eats the next record's picture there; here its vectors are missing.
"""

import functools
import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from neva_jax.data.compat.nemo import NemoEncoder, Part, Refused, alternating, two
from neva_jax.data.conversation import PLACEHOLDER, SYSTEM_HUMAN, TEMPLATES, wrapped
from neva_jax.data.record import LooseRecord
from neva_jax.data.tokenize import IGNORE

IMAGE = -200  # stands for a whole picture until the ids are expanded
S, E = "<s>", "</s>"


# ---- writing -----------------------------------------------------------------------------------------------------------------------------------------


def write_two(texts: list[str], system: str) -> str:
    string = system + " "
    for i, message in enumerate(texts):
        string += ("ASSISTANT" if i % 2 else "USER") + ":" + (f" {message}" + (E if i % 2 else " ") if message else "")
    return string


def write_llama_2(texts: list[str], system: str, bos: str) -> str:
    if not texts or not texts[0]:
        raise Refused("the first turn is empty")
    string = ""
    for i, message in enumerate(texts):
        if message:
            string += f" {message} {E}" if i % 2 else f"{bos}[INST] {'' if i else wrapped(system)}{message} [/INST]"
    return string.lstrip(bos)  # strips characters, as the original does


def write_mpt(texts: list[str], system: str) -> str:
    string = f"<|im_start|>system\n{system}<|im_end|>"
    for i, message in enumerate(texts):
        string += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n" + (f"{message}<|im_end|>" if message else "")
    return string


# ---- counting ----------------------------------------------------------------------------------------------------------------------------------------


def parts_by_eos(string: str, separator: str, later_less: int) -> Iterator[Part]:
    """later_less: what is taken off both counts from the second round on."""
    for i, text in enumerate(string.split(E)):
        split = two(text, separator)
        if split is None:
            return
        less = later_less * (i > 0)
        yield Part(split[0], text, 2 + less, less)


def parts_by_im_end(string: str, later_more: int) -> Iterator[Part]:
    end = "<|im_end|>"
    chunks = string.split(end)
    rounds = [end.join(chunks[:3]), *(end.join(chunks[i : i + 2]) for i in range(3, len(chunks), 2))]
    for i, text in enumerate(rounds):
        split = two(text, f"{end}<|im_start|>assistant\n")
        if split is None:
            return
        more = later_more * (i > 0)
        yield Part(split[0], text, 1 - more, -more)


class LlavaEncoder(NemoEncoder):
    """The same outer course as NeMo's: loose record, string, ids, counted parts."""

    compat: ClassVar[str] = "llava"
    originals: ClassVar[dict] = {name: entry for name, entry in TEMPLATES.items() if entry.llava}

    def __post_init__(self):
        super().__post_init__()
        self.extra_token = False

    @functools.cached_property
    def _style(self) -> str:
        name = self.template.removeprefix("llava:")
        if name in ("mpt", "chatml_direct"):
            return "mpt"
        return "llama_2" if "llama_2" in name or "mistral" in name else re.match("(llava_)?(v0|v1|plain)", name)[2]

    @property
    def _pad(self) -> int:
        """What LLaVA counts as no token: [PAD], which v0 alone adds, else <unk>."""
        return self._id("[PAD]") if self.template == "llava:v0" else self.tokenizer.unk_id

    def _encode(self, record: LooseRecord) -> tuple[np.ndarray, np.ndarray, bool]:
        """ids with one -200 a picture are counted and cut, then expanded."""
        texts = [self._question(turn.text) for turn in record.turns] if record.has_image else [turn.text for turn in record.turns]
        record_turns = tuple(turn._replace(text=text) for turn, text in zip(record.turns, texts, strict=True))
        tokens = self._tokens if record.has_image else functools.partial(self._cut_tokens, limit=self.limit)
        if self._style == "plain":
            ids, learnt = self._plain(record_turns)
        elif self._style == "v0":
            ids, learnt = self._v0(record_turns, tokens)
        else:
            ids, learnt = self._counted(record_turns, tokens, record.has_image)
        return self._expanded(ids[: self.limit], learnt[: self.limit], cut=len(ids) > self.limit)

    def _question(self, text: str) -> str:
        """The picture first, then the words; of several tags one is left."""
        tag = PLACEHOLDER
        if tag in text:
            text = f"{tag}\n{text.replace(tag, '').strip()}".strip()
            if "mmtag" in self.template:
                text = text.replace(tag, f"<Image>{tag}</Image>")
        return text.replace(tag, f"<im_start>{tag}<im_end>") if self.use_im_start_end else text

    def _bos(self) -> list[int]:
        return [self.tokenizer.bos_id] if self.tokenizer.adds_bos else []

    def _tokens(self, text: str) -> list[int]:
        """Every text between two pictures by itself."""
        first, *rest = (self.tokenizer.whole(chunk) for chunk in text.split(PLACEHOLDER))
        return [*self._bos(), *first, *(number for chunk in rest for number in (IMAGE, *chunk))]

    def _cut_tokens(self, text: str, limit: int | None) -> list[int]:
        return (self._bos() + self.tokenizer.whole(text))[:limit]

    def _counted(self, turns, tokens, has_image: bool) -> tuple[np.ndarray, np.ndarray]:
        texts = alternating(LooseRecord((), False, turns, None), needs_first=False)
        system, legacy = TEMPLATES[self.template].system, self.tokenizer.restarts
        if self._style == "v1":
            string, here = write_two(texts, system), 1
            parts = parts_by_eos(string, " ASSISTANT: ", 0 if legacy else 1)
        elif self._style == "llama_2":
            string, here = write_llama_2(texts, system, "" if "mistral" in self.template else S), 1
            parts = parts_by_eos(string, "[/INST] ", 0)
        else:
            string, here = write_mpt(texts, system), 0
            parts = parts_by_im_end(string, 1 if legacy else 0)
        ids = np.array(tokens(string), np.int64)
        learnt = np.ones(len(ids), bool)
        learnt[:here] = False
        count = self._tokens if has_image else functools.partial(self._cut_tokens, limit=None)
        for part in parts:
            learnt[here : here + len(count(part.prompt)) - part.prompt_less] = False
            here += len(count(part.text)) - part.text_less
        learnt[here:] = False
        if here < self.max_length and here != (ids != self._pad).sum():
            learnt[:] = False  # "tokenization mismatch"
        return ids, learnt

    def _plain(self, turns) -> tuple[np.ndarray, np.ndarray]:
        if len(turns) != 2 or PLACEHOLDER not in turns[0].text:
            raise Refused("the plain template takes two turns, the first with <image>")
        ids = np.array(self._tokens(PLACEHOLDER + turns[1].text + "\n"), np.int64)
        return ids, np.arange(len(ids)) >= len(self._tokens(PLACEHOLDER))

    def _v0(self, turns, tokens) -> tuple[np.ndarray, np.ndarray]:
        header = (TEMPLATES[self.template].system or SYSTEM_HUMAN) + "\n\n"
        names = {"human": "Human", "gpt": "Assistant"}
        texts = [f"### {names.get(turn.role.lower(), 'unknown')}: {turn.text}\n" for turn in turns]
        ids = np.array(tokens(header + "".join(texts) + "### "), np.int64)
        pad = self._pad if tokens != self._tokens else None  # with a picture all tokens count
        lengths = [sum(number != pad for number in tokens(text)) for text in (header, *texts)]
        here, learnt = lengths[0], np.ones(len(ids), bool)
        learnt[:here] = False
        for turn, length in zip(turns, lengths[1:], strict=True):
            if turn.role == "human":
                learnt[here + 2 : here + length] = False
            here += length
        return ids, learnt

    def _expanded(self, ids: np.ndarray, learnt: np.ndarray, cut: bool) -> tuple[np.ndarray, np.ndarray, bool]:
        """Each -200 becomes media_length ids 0, none of which is learnt. Marks the pictures by IGNORE until `_media_index`."""
        counts = np.where(ids == IMAGE, self.media_length, 1)
        pictures = np.repeat(ids == IMAGE, counts)
        ids = np.where(pictures, IGNORE, np.repeat(ids, counts)).astype(np.int32)
        return ids[: self.limit], (np.repeat(learnt, counts) & ~pictures)[: self.limit], cut or len(ids) > self.limit

    def _media_index(self, ids: np.ndarray, num_images: int) -> np.ndarray:
        places = np.flatnonzero(ids == IGNORE)
        ids[places] = 0
        index, numbers = np.full(len(ids), -1, np.int32), np.arange(len(places))
        index[places] = np.where(numbers < num_images * self.media_length, numbers, -1)
        return index
