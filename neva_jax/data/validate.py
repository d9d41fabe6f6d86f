"""Every defect of a data set, in one pass: records, pictures, ids, and text that the original programs would misread.

Judged by exact mode's rules, whatever model.data.compat is. Of a record's own defects the first is found, as in training; its pictures, its texts and its id
are looked at all the same. Gives up: what only an eye sees, such as a whole picture of the wrong thing.
"""

import copy
import functools
import hashlib
import io
import json
import math
import re
import sys
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from neva_jax.data.conversation import PLACEHOLDER, render
from neva_jax.data.encoder import Encoder
from neva_jax.data.example import Examples
from neva_jax.data.image import _FORMATS, _MAX_SIDE, ImageProcessor
from neva_jax.data.record import RecordError, shown
from neva_jax.data.sweep import sweep
from neva_jax.errors import DataError, UserError

# At these, in a text, an original splits a conversation in the wrong place, or its model stops.
SEPARATORS = {"v1": (" ASSISTANT: ",), "llama_2": ("[/INST]",), "mistral": ("[/INST]",), "mistral_instruct": ("[/INST]",), "v0": ("###",)}
REMEMBERED = 2**16  # pictures whose state a process keeps in mind, so that one of many records is decoded once


class Defect(NamedTuple):
    """index: of the record, over all files. field: its path in the record, "" for the whole. message: one line, from where it is to what to do.

    kind: json and those of `parse_record`; template, no_label, too_long; special_token; duplicate_id; of pictures missing, outside (a name that leaves the
    folder), unreadable (no regular file, no right to read it), oversized (bytes or pixels), no_picture and broken (cut off, damaged or empty).
    """

    index: int
    field: str
    kind: str
    message: str


def validate(examples: Examples, num_workers: int = 0, headers_only: bool = False) -> list[Defect]:
    """Defects of all records, in their order; the same for any number of worker processes.

    headers_only: pictures are opened and not decoded, which misses those cut off or damaged. Raises UserError where nothing can be judged: a tokenizer that is
    not the template's, a file that changes meanwhile, pictures in records without an image folder.
    """
    parts = list(sweep(functools.partial(Validator, headers_only=headers_only), examples, num_workers, "validating"))
    defects = [defect for found, _ in parts for defect in found]
    return sorted([*defects, *doubled_ids(examples, np.concatenate([keys for _, keys in parts]))], key=lambda defect: defect.index)


class Validator:
    """Called with a range of records -> their defects, and uint64[n]: a key of each record's id, 0 where it has none."""

    def __init__(self, examples: Examples, headers_only: bool = False):
        self.examples, self.encoder, self.headers_only = examples, examples.encoder, headers_only
        self.endless = copy.copy(self.encoder)
        self.endless.max_length = sys.maxsize
        self.processor = getattr(examples.image_processor, "processor", examples.image_processor)  # what lies in a pixel cache is not asked
        self.marks = marks_of(self.encoder)
        self._remembered_picture = functools.lru_cache(maxsize=REMEMBERED)(self._picture)

    def __call__(self, chunk: range) -> tuple[list[Defect], np.ndarray]:
        found, keys = [], np.zeros(len(chunk), np.uint64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of pictures that are judged right here
            for place, index in enumerate(chunk):
                try:
                    raw = self.examples.raw(index)
                except RecordError as error:
                    found.append(Defect(index, error.field, error.kind, str(error)))
                    continue
                keys[place] = key_of(raw)
                where = self.examples.where(index)
                defects = [*self._record(raw, where), *self._texts(raw, where), *self._pictures(raw, where)]
                found += [Defect(index, *defect) for defect in defects]
        return found, keys

    def _record(self, raw, where):
        """Yields (field, kind, message)."""
        try:
            record = self.encoder.parse(raw, where)
        except RecordError as error:
            yield error.field, error.kind, str(error)
            return
        try:
            stream = self.encoder.encode(record, where).stream
        except DataError as error:
            yield "conversations", "no_label" if self._renders(record) else "template", str(error)
            return
        if stream.answers_cut:
            length, limit = len(self.endless.encode(record, where).stream.ids) - self.encoder.extra_token, self.encoder.max_length
            advice = "shorten or split the record, or raise model.encoder_seq_length"
            yield "conversations", "too_long", f"{where}: conversations: {length} tokens, expected at most {limit}; the end of its answers is lost: {advice}"

    def _renders(self, record) -> bool:
        try:
            return bool(render(self.encoder.template, self.encoder._turns(record), self.encoder._system(record), prompt=False))
        except UserError:
            return False

    def _texts(self, raw, where):
        for field, text in texts_of(raw):
            if marks := list(dict.fromkeys(self.marks.findall(text))):
                found = ", ".join(map(shown, marks))
                meaning = "which the original programs take for the template's own; exact mode reads it as text"
                yield field, "special_token", f"{where}: {field}: found {found}, {meaning}: remove or reword it, most likely it was left behind by another tool"

    # ---- pictures

    def _pictures(self, raw, where):
        for field, name in pictures_of(raw):
            if self.examples.media is None:
                raise DataError(f"{where}: {field}: names a picture, but model.data.image_folder is not set; set it to the folder or tar of the pictures")
            if defect := self._remembered_picture(name):
                yield field, defect[0], f"{where}: {field}: {defect[1]}"

    def _picture(self, name: str) -> tuple[str, str] | None:
        """(kind, message) of a bad picture."""
        media = self.examples.media
        try:
            data = media.read(name)
        except DataError as error:
            return kind_of_file(str(error), media.path), str(error)
        return picture_defect(self.processor, data, f"image {shown(name)}", self.headers_only)


def picture_defect(processor: ImageProcessor, data: bytes, where: str, headers_only: bool = False) -> tuple[str, str] | None:
    """(kind, message) of what the processor refuses, else None. JPEGs are decoded at an eighth of their size: every byte is read, in 0.6 of the time.
    What fails here is left to the processor's own judgement and words."""
    kind = "broken"
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if math.prod(picture.size) > processor.max_pixels or max(picture.size) > _MAX_SIDE:
                kind = "oversized"
            else:
                if not headers_only:
                    picture.draft(None, (1, 1))
                    picture.load()
                return None
    except Image.UnidentifiedImageError:
        kind = "no_picture"
    except Image.DecompressionBombError:
        kind = "oversized"
    except Exception:  # decoders answer hostile bytes with nearly every exception there is
        kind = "broken"
    try:
        processor._decode(data, where)
    except DataError as error:
        return kind, str(error)
    return None


def kind_of_file(message: str, path: str) -> str:
    """The kind of what `media.read` raised; path: the folder's or tar's, at which every such message says what is wrong."""
    place, _, reason = message.rpartition(f"{path}: ")
    if place.endswith("is missing from "):
        return "missing"
    if reason.startswith(("points outside", "names no file", "is a link to")):
        return "outside"
    if reason.startswith("is empty"):
        return "broken"
    return "oversized" if "bytes, expected at most" in reason else "unreadable"


# ---- what a record holds, sound or not


def pictures_of(raw: dict):
    """Yields (field, name) of the pictures that can be made out."""
    value = raw.get("image")
    names = [("image", value)] if isinstance(value, str) else [(f"image[{i}]", name) for i, name in enumerate(value)] if isinstance(value, list) else []
    return ((field, name) for field, name in names if isinstance(name, str) and name)


def texts_of(raw: dict):
    """Yields (field, text) of questions, answers and system prompts."""
    turns = raw.get("conversations")
    texts = [("system", raw.get("system")), ("conversations", turns)]
    for i, turn in enumerate(turns if isinstance(turns, list) else ()):
        texts.append((f"conversations[{i}].value", turn.get("value") if isinstance(turn, dict) else None))
    return ((field, text) for field, text in texts if isinstance(text, str))


def marks_of(encoder: Encoder) -> re.Pattern:
    """Finds strings that an original would not take as text: control tokens of the tokenizer and the template, and the template's separators."""
    written = render(encoder.template, [("human", PLACEHOLDER), ("gpt", "", "label")])
    names = {"<s>", "</s>", *encoder.tokenizer.special, *(piece.value for piece in written if piece.kind == "control")} - {PLACEHOLDER}
    names = {name for name in names if re.search(r"\w", name) and re.search(r"[^\w\s▁]", name)}  # a vocabulary may also keep words and spaces whole
    family = re.sub(r"^(llava:)?(llava_)?|_mmtag$", "", encoder.template)
    strings = [*SEPARATORS.get(family, ()), *names]
    return re.compile("|".join(re.escape(string) for string in sorted(strings, key=lambda string: (-len(string), string))))


# ---- ids


def key_of(raw: dict) -> int:
    """64 bits of a record's id; 0: it has none."""
    return 0 if raw.get("id") is None else int.from_bytes(hashlib.blake2b(_spelt(raw), digest_size=8).digest())


def _spelt(raw: dict) -> bytes:
    return json.dumps(raw["id"]).encode()


def doubled_ids(examples: Examples, keys: np.ndarray) -> list[Defect]:
    """keys: uint64[R], of all records. Eight bytes a record are kept, and those whose keys meet are read again."""
    values, counts = np.unique(keys[keys > 0], return_counts=True)
    first, defects = {}, []
    for index in np.flatnonzero(np.isin(keys, values[counts > 1])).tolist():
        raw = examples.raw(index)
        earlier = first.setdefault(_spelt(raw), index)
        if earlier != index:
            message = f"{examples.where(index)}: id: {shown(raw['id'])} is the id of {examples.where(earlier)} too; give each record an id of its own, or none"
            defects.append(Defect(index, "id", "duplicate_id", message))
    return defects
