"""LLaVA records on disk: one JSON list (`.json`) or one object a line (`.jsonl`), read one record at a time.

A one-off scan finds each record's byte range by counting quotes and brackets, and no more; a record's own JSON is checked when it is read.
So opening a million records costs a memory map, and reading one costs a seek. Gives up: compressed or remote files, and a file that is edited
while in use (refused, because the ranges no longer fit).
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import threading
from pathlib import Path

import numpy as np

from neva_jax.data.record import RecordError, shown
from neva_jax.data.scan import FORMAT, scan
from neva_jax.errors import DataError

_lock = threading.Lock()
MAX_RECORD_BYTES = 64 * 2**20  # a longer one is a wrong file or a lost quote; NeVA's records are a few kilobytes


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
            raise self._refusal(index, f"found {shown(record)}, expected an object with image and conversations")
        return record

    def where(self, index) -> str:
        """The words that name a record in an error."""
        return f"{self.path}: record {index}"

    def _refusal(self, index, message):
        return RecordError(f"{self.where(index)}: {message}", kind="json")

    def _open(self):
        """-> offsets: int64[N + 1] (see `scan`), file."""
        if self._file is None:
            with _lock:  # of two threads that open it, one would close the other's
                if self._file is None:
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
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice in one object; keep one")
    return record


def _no_constant(name):
    raise ValueError(f"{name} is not JSON, expected a number or null")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
