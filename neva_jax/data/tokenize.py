"""Pieces -> ids, and which of them are supervised, and where media vectors stand.

The shift, which everything after takes for granted, on a stream of five ids of which the last two are an answer:

    ids           7   8   9  10   2          tokens = ids[:-1]   7  8    9  10
    supervised    -   -   -   x   x          labels = ids[1:]    -100 -100 10  2
"""

import dataclasses

import numpy as np

from neva_jax.data.conversation import BOS, END, EOS, PATCH, START, TEMPLATES, Piece
from neva_jax.errors import UserError

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids that a template's control tokens become. patch, start, end: what stands where media vectors will (NeVA: 0, <extra_id_4>, <extra_id_5>)."""

    bos: int
    eos: int
    patch: int
    start: int
    end: int
    use_im_start_end: bool = False

    @classmethod
    def of(cls, tokenizer, template: str, *, use_im_start_end: bool) -> "SpecialIds":
        """NeVA's rule: <extra_id_6> and <extra_id_7> become the tokenizer's own <s> and </s>, <extra_id_3> becomes 0 where the template says so. A tokenizer
        without <extra_id_4> and <extra_id_5> will do unless use_im_start_end is on: elsewhere media vectors replace both."""
        start, end = tokenizer.id_of(START), tokenizer.id_of(END)
        if use_im_start_end and (start is None or end is None):
            raise UserError(
                f"model.mm_cfg.use_im_start_end needs {START} and {END} in the tokenizer, and {tokenizer.path} lacks them; "
                "add <extra_id_0>..<extra_id_7> to it, or turn use_im_start_end off"
            )
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        if eos is None or eos < 0:
            raise UserError(f"{tokenizer.path} has no end-of-sequence token, and the template ends answers with it")
        patch = 0 if TEMPLATES[template].patch_is_unk else tokenizer.id_of(PATCH) or 0
        return cls(eos if bos is None or bos < 0 else bos, eos, patch, start or 0, end or 0, use_im_start_end)

    def control(self, token: str) -> int:
        return {BOS: self.bos, EOS: self.eos, PATCH: self.patch}[token]

    def media(self, length: int) -> tuple[list[int], list[int]]:
        """ids of one medium of `length` vectors, and the vector's number at each (-1: none). With start and end outside of it, or overwritten as NeVA does."""
        if self.use_im_start_end:
            return [self.start] + [self.patch] * length + [self.end], [-1, *range(length), -1]
        return ([self.start] + [self.patch] * (length - 2) + [self.end])[:length] if length > 1 else [self.patch], list(range(length))


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
        text = "".join(piece.value for piece in run)
        if text:
            marks = np.repeat([piece.supervised for piece in run], [len(piece.value) for piece in run])
            text_ids, spans = tokenizer.encode(text, start=not ids)
            add(text_ids, [bool(marks[begin : max(end, begin + 1)].any()) for begin, end in spans])
        elif not ids:
            add(tokenizer.prefix_ids, [False] * len(tokenizer.prefix_ids))
        run.clear()

    for piece in pieces:
        if piece.kind == "text":
            run.append(piece)
            continue
        flush()
        if piece.kind == "control":
            add([special.control(piece.value)], [piece.supervised])
        else:
            media_ids, numbers = special.media(media_length)
            add(media_ids, [False] * len(media_ids), [n if n < 0 else num_media * media_length + n for n in numbers])
            num_media += 1
    flush()
    return Stream(np.array(ids, np.int32), np.array(supervised, bool), np.array(media, np.int32), media_length)


def shift(stream: Stream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, labels, media_index: int32[n - 1]. labels are next-token targets, -100 where nothing is supervised."""
    labels = np.where(stream.supervised, stream.ids, IGNORE)[1:].astype(np.int32)
    return stream.ids[:-1], labels, stream.media_index[:-1]
