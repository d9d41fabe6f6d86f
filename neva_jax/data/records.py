"""LLaVA records on disk: one JSON list (`.json`) or one object a line (`.jsonl`), read one record at a time.

A one-off scan finds each record's byte range by counting quotes and brackets, and no more; a record's own JSON is checked when it is read.
So opening a million records costs a memory map, and reading one costs a seek. Gives up: compressed or remote files, and a file that is edited
while in use (refused, because the ranges no longer fit).
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neva_jax.data.scan import FORMAT, scan
from neva_jax.errors import DataError

IMAGE_TAG = "<image>"
MAX_RECORD_BYTES = 64 * 2**20  # a longer one is a wrong file or a lost quote; NeVA's records are a few kilobytes
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class RecordError(DataError):
    """A defect of one record. field: its path in the record ("conversations[1].value", "" for the whole); kind: a word that scripts may count by."""

    def __init__(self, message, field="", kind=""):
        super().__init__(message)
        self.field, self.kind = field, kind


class Records:
    """Random access to the records of one file: `len(records)`, `records[i] -> dict`. Pickles as paths; opens anew in each process, safe in threads.

    path: a `.json` or `.jsonl` file, UTF-8, with or without a byte order mark.
    cache_dir: where the index lies; by default `$XDG_CACHE_HOME/neva_jax` or `~/.cache/neva_jax`.
    fingerprint: hex name of this state of the file (path, size, time of change), for other indexes to key on.
    """

    def __init__(self, path, cache_dir=None):
        if not path:
            raise DataError("no data file given: set model.data.data_path to a .json or .jsonl file")
        self.path = os.path.abspath(path)
        self.cache_dir = os.path.abspath(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "neva_jax")
        self._size, self._mtime = _examined(self.path)
        name = repr((self.path, self._size, self._mtime, FORMAT))
        self.fingerprint = hashlib.sha256(os.fsencode(name)).hexdigest()
        self._offsets = self._file = None
        self._open()

    def __getstate__(self):
        return self.__dict__ | {"_offsets": None, "_file": None}

    def __len__(self):
        return len(self._open()[0]) - 1

    def __getitem__(self, index) -> dict:
        offsets, file = self._open()
        index = range(len(offsets) - 1)[index]
        start, size = int(offsets[index]), int(offsets[index + 1] - offsets[index]) - 1
        if size > MAX_RECORD_BYTES:
            raise self._refusal(index, f"{size} bytes long, expected at most {MAX_RECORD_BYTES}; the likely cause is a missing quote or newline before it")
        try:
            # pread keeps no position, so threads and forked processes may share the file
            record = _DECODER.decode(os.pread(file.fileno(), size, start).decode())
        except UnicodeDecodeError as error:
            raise self._refusal(index, f"not UTF-8 at byte {start + error.start} of the file; save the file as UTF-8") from None
        except RecursionError:
            raise self._refusal(index, "brackets nested too deeply, expected an object with image and conversations") from None
        except json.JSONDecodeError as error:
            raise self._refusal(index, f"not valid JSON ({error.msg} at character {error.pos} of the record, which starts at byte {start})") from None
        except ValueError as error:
            raise self._refusal(index, str(error)) from None
        if not isinstance(record, dict):
            raise self._refusal(index, f"found {_shown(record)}, expected an object with image and conversations")
        return record

    def where(self, index) -> str:
        """The words that name a record in an error."""
        return f"{self.path}: record {index}"

    def _refusal(self, index, message):
        return RecordError(f"{self.where(index)}: {message}", kind="json")

    def _open(self):
        """-> offsets: int64[N + 1] (see `scan`), file."""
        if self._offsets is None or self._file is None:
            if _examined(self.path) != (self._size, self._mtime):
                raise DataError(f"{self.path}: changed since this run opened it; start again, and leave data files alone while a run reads them")
            self._offsets = self._load_index()
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (lives as long as this object)
        return self._offsets, self._file

    @property
    def _index_path(self):
        return Path(self.cache_dir, f"records-{self.fingerprint}.npy")

    def _load_index(self):
        try:
            offsets = np.load(self._index_path, mmap_mode="r")
        except (ValueError, EOFError, OSError):
            offsets = np.empty(0)
        fits = offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) > 1 and 0 <= offsets[0] < offsets[-1] <= self._size + 1
        return offsets if fits else self._build_index()  # the first time, or where a power cut left a name without bytes

    def _build_index(self):
        offsets = scan(self.path)
        if _examined(self.path) != (self._size, self._mtime):
            raise DataError(f"{self.path}: changed while it was read; start again when its writer is done")
        # Several processes may build at once: each writes a file of its own, and the last rename wins with equal bytes.
        temporary = self._index_path.with_suffix(f".{secrets.token_hex(8)}.tmp")
        try:
            os.makedirs(self.cache_dir, exist_ok=True)
            with open(temporary, "xb") as file:
                np.save(file, offsets)
            os.replace(temporary, self._index_path)
            return np.load(self._index_path, mmap_mode="r")
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            problem = f"cannot hold the index of records ({error.strerror or error})"
            raise DataError(f"{self.cache_dir}: {problem}; set model.data.cache_dir to a writable folder") from None


# ---- Opening and parsing

def _examined(path):
    """-> (size in bytes, time of change in ns) of a data file worth opening."""
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            open(path, "rb").close()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({problem}); set model.data.data_path to a .json or .jsonl file") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise DataError(f"{path}: is {kind}, expected a .json or .jsonl file; set model.data.data_path to the file")
    if not path.endswith((".json", ".jsonl")):
        raise DataError(f"{path}: unknown extension, expected .json (one list of records) or .jsonl (one record a line)")
    return found.st_size, found.st_mtime_ns


def _without_duplicates(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_shown(next(key for key in keys if keys.count(key) > 1))} stands twice in one object; keep one")
    return record


def _no_constant(name):
    raise ValueError(f"{name} is not JSON, expected a number or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant)


# ---- One record: dict in, checked and plain out

@dataclass(frozen=True)
class Record:
    """images: names relative to the image folder, in the order of the tags. turns: (role, text), "human" and "gpt" by turns, human first.

    system: None where the record says nothing, so that the template's own stands; "" asks for none.
    """

    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    system: str | None = None


def parse_record(record, *, where, max_media=None) -> Record:
    """Checks one record and brings it into one form. Raises RecordError that opens with `where` (`Records.where(i)`).

    Stricter than the originals where they train on something else than the file says: LLaVA drops a leading gpt turn, takes a missing picture's
    tag as text, and lets a surplus tag eat the next sample's picture.
    max_media: how many images a record may have; None: any number.
    """
    fail = functools.partial(_fail, where)
    if not isinstance(record, dict):
        fail("", "type", f"found {_shown(record)}, expected an object with image and conversations")
    if record.get("video") is not None:
        fail("video", "video", "videos are not supported; extract frames and list them under image")
    images = _images(record.get("image"), fail)
    system, turns = _turns(record.get("conversations"), fail)
    if record.get("system") is not None:
        if system is not None:
            fail("system", "system", "stands beside a system turn; keep one of them")
        system = _text(record["system"], "system", fail)
    if IMAGE_TAG in (system or ""):
        fail("system", "image_tag", f"found {IMAGE_TAG} in a system prompt; pictures belong to human turns")
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)  # answers have none
    if tags != len(images):
        fail("image", "image_count", f"{tags} {IMAGE_TAG} in the human turns but {len(images)} under image; write one tag for each image")
    if max_media is not None and len(images) > max_media:
        fail("image", "max_media", f"{len(images)} images, expected at most {max_media}; raise model.data.max_media or split the record")
    return Record(images, turns, system)


def _images(value, fail):
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        fail("image", "type", f"found {_shown(value)}, expected a name, a list of names or nothing")
    for i, name in enumerate(names):
        if _text(name, f"image[{i}]", fail) == "":
            fail(f"image[{i}]", "empty", "an empty name; give the image's path or remove the entry")
    return tuple(names)


def _turns(value, fail):
    """-> (system or None, ((role, text), ...))"""
    if not isinstance(value, list) or not value:
        fail("conversations", "empty" if value == [] else "type", f"found {_shown(value)}, expected a list of turns with from and value")
    system, turns = None, []
    for i, turn in enumerate(value):
        field = f"conversations[{i}]"
        if not isinstance(turn, dict):
            fail(field, "type", f"found {_shown(turn)}, expected an object with from and value")
        role, text = _text(turn.get("from"), f"{field}.from", fail), _text(turn.get("value"), f"{field}.value", fail)
        if role == "system" and i == 0:
            system = text
            continue
        if role not in ROLES:
            fail(f"{field}.from", "role", f"found {_shown(role)}, expected human (user) or gpt (assistant), or system in the first turn")
        role = ROLES[role]
        if not turns and role == "gpt":
            fail(f"{field}.from", "role_order", "the first turn is gpt's, expected human's; LLaVA and NeVA drop such a turn without a word: remove it")
        if turns and turns[-1][0] == role:
            fail(f"{field}.from", "role_order", f"two {role} turns in a row, expected human and gpt by turns; join or split them")
        if role == "gpt" and not text.strip():
            fail(f"{field}.value", "empty", "an empty answer; there is nothing to learn: remove the turn pair")
        if role == "gpt" and IMAGE_TAG in text:
            fail(f"{field}.value", "image_tag", f"found {IMAGE_TAG} in an answer; pictures belong to human turns")
        turns.append((role, text))
    if not any(role == "gpt" for role, _ in turns):
        fail("conversations", "no_answer", "no gpt turn, expected at least one answer to learn")
    return system, tuple(turns)


def _text(value, field, fail):
    if not isinstance(value, str):
        fail(field, "type", f"found {_shown(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        fail(field, "type", f"found half of a surrogate pair in {_shown(value)}, expected text; tokenizers and file systems cannot take it")
    return value


def _fail(where, field, kind, message):
    raise RecordError(f"{where}: {field}: {message}" if field else f"{where}: {message}", field, kind)


def _shown(value):
    """A value in a few ASCII characters on one line, whatever is in it."""
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    shown = json.dumps(value[:40] if isinstance(value, str) else value, default=repr)
    return "nothing or null" if value is None else shown[:60]
