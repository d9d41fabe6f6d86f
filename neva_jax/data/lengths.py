"""The one-off index of exact lengths: each record's tokens, supervised targets and media, kept in `cache_dir` under the fingerprint of all that decides them.

Every record is parsed, rendered and tokenised once here, so a defect of any record is named before the first step, not hours later.
"""

import contextlib
import logging
import multiprocessing
import os
import secrets
from pathlib import Path

import numpy as np
from tqdm import tqdm

from neva_jax.data.example import Examples
from neva_jax.data.plan import Lengths
from neva_jax.data.workers import birthplace
from neva_jax.errors import DataError

log = logging.getLogger(__name__)

CHUNK = 4096  # records a task


def read_lengths(examples: Examples, cache_dir: str | Path, num_workers: int = 0) -> Lengths:
    """Lengths of all records, from the cache or made now; num_workers: processes to make them with."""
    path = index_path(examples, cache_dir)
    try:
        table = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError):  # the first time, or where a power cut left a name without bytes
        table = _make(examples, num_workers)
        _store(path, table)
    cut, noted = int(table[:, 3].sum()), np.flatnonzero(table[:, 4])
    if cut:
        log.warning(f"{cut} of {len(table)} records are longer than model.encoder_seq_length {examples.encoder.max_length} and lose the end of an answer")
    if len(noted):
        first = examples.encoded(int(noted[0])).note
        mode = examples.encoder.compat
        log.warning(f"{len(noted)} of {len(table)} records are taken as model.data.compat {mode} takes them; exact mode refuses such, the first: {first}")
    return Lengths(table[:, 0], table[:, 1], table[:, 2])


def index_path(examples: Examples, cache_dir: str | Path) -> Path:
    """Where the index lies, once it is made."""
    return Path(cache_dir) / f"lengths-{examples.fingerprint()}.npy"


def _make(examples: Examples, num_workers: int) -> np.ndarray:
    chunks = [range(start, min(start + CHUNK, len(examples))) for start in range(0, len(examples), CHUNK)]
    if num_workers and len(chunks) > 1:
        with birthplace():
            pool = multiprocessing.get_context("spawn").Pool(min(num_workers, len(chunks)), _init_worker, (examples,))
        with pool:
            parts = list(tqdm(pool.imap(_chunk_in_worker, chunks), "indexing lengths", len(chunks), disable=None))
    else:
        parts = [_chunk(examples, chunk) for chunk in tqdm(chunks, "indexing lengths", disable=None if len(chunks) > 1 else True)]
    return np.concatenate(parts)


def _chunk(examples: Examples, chunk: range) -> np.ndarray:
    """int32[n, 5]: tokens, supervised, media, whether answers were cut, whether exact mode would refuse the record."""
    rows = []
    for index in chunk:
        stream, note = examples.encoded(index)[1:]
        tokens = len(stream.ids) - examples.encoder.extra_token
        rows.append((tokens, stream.supervised[1:].sum(), stream.num_media, stream.answers_cut, bool(note)))
    return np.array(rows, np.int32)


_examples = None


def _init_worker(examples: Examples) -> None:
    global _examples
    _examples = examples


def _chunk_in_worker(chunk: range) -> np.ndarray:
    return _chunk(_examples, chunk)


def _store(path: Path, table: np.ndarray) -> None:
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.save(file, table)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(f"{path.parent}: cannot hold the index of lengths ({error.strerror or error}); set model.data.cache_dir to a writable folder") from None
