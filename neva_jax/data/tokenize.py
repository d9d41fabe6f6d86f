"""Pieces -> ids, and which of them are supervised, and where media vectors stand.

The shift, which everything after takes for granted, on a stream of five ids of which the last two are an answer:

    ids           7   8   9  10   2          tokens = ids[:-1]   7  8    9  10
    supervised    -   -   -   x   x          labels = ids[1:]    -100 -100 10  2
"""

import dataclasses
import logging

import numpy as np

from neva_jax.data.conversation import BOS, END, EOS, PATCH, START, TEMPLATES, Piece, render
from neva_jax.errors import UserError

log = logging.getLogger(__name__)

IGNORE = -100
LLAVA_TOKENS = (None, "<im_start>", "<im_end>")
MEDIA_TOKENS = {"llama_3": tuple(f"<|reserved_special_token_{i}|>" for i in (3, 4, 5))}  # patch, start, end by mm_cfg.llm.model_type


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that a template's control tokens become. patch, start, end: what stands where media vectors will (NeVA: 0, <extra_id_4>, <extra_id_5>).

    controls: (name, id) of the template's other control tokens; one that the tokenizer lacks is not in it, and is spelt in pieces.
    """

    bos: int
    eos: int
    patch: int
    start: int
    end: int
    use_im_start_end: bool = False
    llava: bool = False
    controls: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, tokenizer, template: str, *, use_im_start_end: bool, model_type: str = "llama_2") -> "SpecialIds":
        """NeVA's rule: <extra_id_6> and <extra_id_7> become the tokenizer's own <s> and </s>, <extra_id_3> becomes 0 where the template says so. A tokenizer
        without start and end tokens will do unless use_im_start_end is on: elsewhere media vectors replace both."""
        entry = TEMPLATES[template]
        use_im_start_end = use_im_start_end and entry.wraps_images
        names = LLAVA_TOKENS if entry.llava else MEDIA_TOKENS.get(model_type, (PATCH, START, END))
        patch, start, end = (tokenizer.id_of(name) if name else 0 for name in names)
        if use_im_start_end and (start is None or end is None):
            raise UserError(f"model.mm_cfg.use_im_start_end needs {names[1]} and {names[2]} in the tokenizer; {lacking(tokenizer, names[1:])}")
        used = {piece.value: None for piece in render(template, [("human", "<image>"), ("gpt", "", "label")]) if piece.kind == "control"}
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        if EOS in used and (eos is None or eos < 0):
            raise UserError(f"{tokenizer.path} has no end-of-sequence token, and the template ends answers with it")
        controls = {name: tokenizer.id_of(name) for name in used if name not in (BOS, EOS)}
        missing = [name for name, number in controls.items() if number is None]
        if any(name.startswith("<extra_id_") for name in missing):
            raise UserError(f"the template {template} needs {', '.join(missing)} as single pieces; {lacking(tokenizer, missing)}")
        if missing:
            log.warning(f"the template {template} writes {', '.join(missing)}, which {tokenizer.path} spells in pieces: likely not this template's tokenizer")
        patch = 0 if entry.patch_is_unk and names[0] in (None, PATCH) else patch or 0
        known = tuple((name, number) for name, number in controls.items() if number is not None)
        return cls(eos if bos is None or bos < 0 else bos, eos, patch, start or 0, end or 0, use_im_start_end, entry.llava, known)

    def control(self, token: str) -> int | None:
        """None: the tokenizer has no such token."""
        return {BOS: self.bos, EOS: self.eos, **dict(self.controls)}.get(token)

    def media(self, length: int) -> tuple[list[int], list[int]]:
        """ids of one medium of `length` vectors, and the vector's number at each (-1: none). With start and end outside of it, or overwritten as NeVA does, or
        patches alone as in LLaVA."""
        patches = [self.patch] * length
        if self.use_im_start_end:
            return [self.start, *patches, self.end], [-1, *range(length), -1]
        if length > 1 and not self.llava:
            patches[0], patches[-1] = self.start, self.end
        return patches, list(range(length))


def lacking(tokenizer, names) -> str:
    """Which of the names a tokenizer lacks, and what to do, as the end of a sentence."""
    missing = ", ".join(name for name in names if tokenizer.id_of(name) is None)
    return (
        f"{tokenizer.path} lacks {missing}; add them with python -m neva_jax.extend_tokenizer (sentencepiece), "
        "or list them in model.tokenizer.additional_special_tokens (huggingface)"
    )


@dataclasses.dataclass(frozen=True)
class Stream:
    """ids: int32[n]; supervised: bool[n]; media_index: int32[n], the number of the media vector that stands there, -1 for none; media_length: S'."""

    ids: np.ndarray
    supervised: np.ndarray
    media_index: np.ndarray
    media_length: int
    answers_cut: bool = False

    @property
    def num_media(self) -> int:
        return -(-int(self.media_index.max(initial=-1) + 1) // self.media_length)

    def truncate(self, limit: int) -> "Stream":
        """At most `limit` ids. A medium is never cut in two: where the last id, which is a target only, is one of its, the cut falls before the medium.
        answers_cut: supervised ids were lost."""
        if len(self.ids) <= limit:
            return self
        last = int(self.media_index[limit - 1])
        end = limit if last < 0 else limit - 1 - last % self.media_length
        return dataclasses.replace(
            self, ids=self.ids[:end], supervised=self.supervised[:end], media_index=self.media_index[:end], answers_cut=bool(self.supervised[end:].any())
        )


def encode(pieces: list[Piece], tokenizer, special: SpecialIds, media_length: int) -> Stream:
    """Neighbouring texts are encoded as one, so that no piece boundary shows in the ids; an id is supervised if its characters touch a supervised span."""
    ids: list[int] = []
    supervised: list[bool] = []
    media: list[int] = []
    num_media = 0
    run: list[Piece] = []

    def add(new_ids, new_supervised, new_media=None):
        ids.extend(new_ids)
        supervised.extend(new_supervised)
        media.extend(new_media or [-1] * len(new_ids))

    def flush():
        """Behind <s> and behind a picture LLaVA encodes what follows by itself; NeVA encodes all as one string."""
        text, behind = "".join(piece.value for piece in run), len(ids) > opening
        if text:
            marks = np.repeat([piece.supervised for piece in run], [len(piece.value) for piece in run])
            before = np.append(0, np.cumsum(marks))  # supervised characters before each place
            start = not behind or tokenizer.restarts or (special.llava and media[-1] >= 0)
            text_ids, spans = tokenizer.encode(text, start=start)
            begin, end = np.array(spans, int).reshape(-1, 2).T
            end = np.minimum(np.maximum(end, begin + 1), len(text))  # a byte of a character whose span another byte has
            add(text_ids, (before[end] > before[np.minimum(begin, end)]).tolist())
        elif not behind and not special.llava:
            add(tokenizer.prefix_ids, [False] * len(tokenizer.prefix_ids))
        run.clear()

    if special.llava and tokenizer.adds_bos:
        add([special.bos], [False])
    opening = len(ids)
    for piece in pieces:
        number = special.control(piece.value) if piece.kind == "control" else None
        if piece.kind == "text" or (piece.kind == "control" and number is None):
            run.append(piece)
            continue
        flush()
        if number is not None:
            add([number], [piece.supervised])
        else:
            media_ids, numbers = special.media(media_length)
            add(media_ids, [False] * len(media_ids), [n if n < 0 else num_media * media_length + n for n in numbers])
            num_media += 1
    flush()
    return Stream(np.array(ids, np.int32), np.array(supervised, bool), np.array(media, np.int32), media_length)


def shift(stream: Stream, extra_token: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, labels, media_index: int32[T]. labels are next-token targets, -100 where nothing is supervised. extra_token: the last id is a target only (NeMo's
    default), so that T is one less than the ids; else the last position has no target."""
    labels = np.where(stream.supervised, stream.ids, IGNORE)[1:].astype(np.int32)
    if not extra_token:
        return stream.ids, np.append(labels, np.int32(IGNORE)), stream.media_index
    return stream.ids[:-1], labels, stream.media_index[:-1]
