"""All records once, a chunk at a time, in worker processes if asked for: results in the records' order, a progress bar on standard error.

Gives up: going on where a worker process was killed (out of memory, say); control-C ends such a sweep, as it ends any other, without an orphan.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator

from tqdm import tqdm

from neva_jax.data.workers import birthplace

CHUNK = 128  # records a task: less than a second of decoding


def sweep(make: Callable, examples, num_workers: int, description: str) -> Iterator:
    """Yields make(examples)(chunk) for each range of records, in order. make: a function of a module, or a partial of one; called once in each process.

    num_workers: processes, 0 for none. The answers must not depend on which process gives them. An exception of a chunk is raised here.
    """
    chunks = [range(start, min(start + CHUNK, len(examples))) for start in range(0, len(examples), CHUNK)]
    with tqdm(total=len(examples), desc=description, unit=" records", disable=None) as bar:
        for chunk, answer in zip(chunks, _answers(make, examples, min(num_workers, len(chunks)), chunks), strict=True):
            bar.update(len(chunk))
            yield answer


def _answers(make, examples, num_workers, chunks):
    if num_workers < 2:  # a single process beside this one, which would wait
        yield from map(make(examples), chunks)
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers are born deaf to control-C, which reaches this process, and it ends them
    try:
        with birthplace():
            pool = multiprocessing.get_context("spawn").Pool(num_workers, _init_worker, (make, examples))
    finally:
        signal.signal(signal.SIGINT, handler)
    with pool:
        yield from pool.imap(_chunk_in_worker, chunks)


_work = None


def _init_worker(make, examples) -> None:
    global _work
    _work = make(examples)


def _chunk_in_worker(chunk: range):
    return _work(chunk)
