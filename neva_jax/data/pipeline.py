"""Plan -> batches: Grain reads, decodes and stacks the rows of this process, in threads or in worker processes, in the plan's order.

A batch is a dict of arrays [M, B, ...]: M micro-batches of B rows (of this process). Fields: tokens, labels, position_ids, segment_ids,
media_index int32[M, B, T]; loss_mask float32[M, B, T]; supervised_positions int32[M, B, K]; media uint8[M, B, N, H, W, 3]; bad_image int32[M, B].
"""

import contextlib
import dataclasses
import functools
import multiprocessing.util
import os

import grain
import numpy as np
from absl import flags

from neva_jax.data.example import Example, Examples
from neva_jax.data.plan import Bucket, local_rows
from neva_jax.data.tokenize import IGNORE
from neva_jax.data.workers import birthplace
from neva_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of every global batch this process holds (see `local_rows`)."""

    micro_batch_size: int
    num_shards: int = 1
    shards: range = range(1)

    def of(self, ids: np.ndarray) -> np.ndarray:
        return local_rows(ids, micro_batch_size=self.micro_batch_size, num_shards=self.num_shards, shards=self.shards)

    @property
    def share(self) -> float:
        """Of every global batch, how much stands here."""
        return len(self.shards) / self.num_shards

    @property
    def width(self) -> int:
        """B: rows of a micro-batch here."""
        return self.micro_batch_size * len(self.shards)


class _RowSource:
    """Grain's source: element i is (record id, bucket) of the i-th row from global batch `start` on."""

    def __init__(self, plan, rows: Rows, ids: np.ndarray, start: int, stop: int, rows_per_batch: int):
        self.plan, self.rows, self.ids, self.start, self.rows_per_batch = plan, rows, ids, start, rows_per_batch
        self.num_rows = (stop - start) * rows_per_batch

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> tuple[int, Bucket]:
        batch, row = divmod(i, self.rows_per_batch)
        bucket, ids = self.plan[self.start + batch]
        chosen = self.rows.of(ids)[row]
        return (int(self.ids[chosen]) if chosen >= 0 else -1), bucket


def load_row(examples: Examples, item: tuple[int, Bucket]) -> tuple[Example | UserError | None, Bucket]:
    """An error travels as a value: one that is raised in a worker makes Grain tear down its processes, in a race with the end of the program."""
    index, bucket = item
    try:
        return (examples[index] if index >= 0 else None), bucket
    except UserError as error:
        return error, bucket


def collate(width: int, no_media: np.ndarray, items: list[tuple[Example | UserError | None, Bucket]]) -> dict[str, np.ndarray] | UserError:
    """Rows of one global batch -> the batch, padded to its bucket; or the first row's error that has one."""
    bucket = items[0][1]
    for example, _ in items:
        if isinstance(example, UserError):
            return example
    batch = pad_examples([example for example, _ in items], bucket, no_media)
    return {name: array.reshape(len(items) // width, width, *array.shape[1:]) for name, array in batch.items()}


def pad_examples(examples: list[Example | None], bucket: Bucket, no_media: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a batch, [B, ...] each. None gives an empty row: one token, nothing supervised. no_media: [0, H, W, 3] in the dtype of pictures."""
    count, length = len(examples), bucket.tokens
    batch = {
        "tokens": np.zeros((count, length), np.int32),
        "labels": np.full((count, length), IGNORE, np.int32),
        "loss_mask": np.zeros((count, length), np.float32),
        "position_ids": np.tile(np.arange(length, dtype=np.int32), (count, 1)),
        "segment_ids": np.zeros((count, length), np.int32),
        "media_index": np.full((count, length), -1, np.int32),
        "supervised_positions": np.full((count, bucket.supervised), -1, np.int32),
        "media": np.zeros((count, bucket.media, *no_media.shape[1:]), no_media.dtype),
        "bad_image": np.zeros(count, np.int32),
    }
    for row, example in enumerate(examples):
        if example is None:
            batch["segment_ids"][row, 0] = 1
            continue
        size, supervised = len(example.tokens), np.flatnonzero(example.labels != IGNORE)
        assert size <= length and len(example.media) <= bucket.media and len(supervised) <= bucket.supervised, (size, len(example.media), bucket)
        batch["tokens"][row, :size] = example.tokens
        batch["labels"][row, :size] = example.labels
        batch["loss_mask"][row, supervised] = 1
        batch["segment_ids"][row, :size] = 1
        batch["media_index"][row, :size] = example.media_index
        batch["supervised_positions"][row, : len(supervised)] = supervised
        batch["media"][row, : len(example.media)] = example.media
        batch["bad_image"][row] = example.bad_image
    return batch


def batches(examples: Examples, plan, rows: Rows, *, ids: np.ndarray, start: int, stop: int, global_batch_size: int, num_workers: int = 0):
    """An iterator over global batches start .. stop-1 of `plan` (this process' rows). ids: record of each id that the plan speaks of."""
    rows_per_batch = global_batch_size // rows.num_shards * len(rows.shards)
    source = _RowSource(plan, rows, ids, start, stop, rows_per_batch)
    dataset = (
        grain.MapDataset.source(source)
        .map(functools.partial(load_row, examples))
        .batch(rows_per_batch, batch_fn=functools.partial(collate, rows.width, examples.no_media))
        .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2))
    )
    if not num_workers:
        return map(_checked, dataset)
    if not flags.FLAGS.is_parsed():  # Grain asks absl for settings of its workers, which raises in a program that never parsed absl's own flags
        flags.FLAGS.mark_as_parsed()
    return _from_workers(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2), worker_init_fn=_enter_worker))


def _checked(batch: dict[str, np.ndarray] | UserError) -> dict[str, np.ndarray]:
    if isinstance(batch, UserError):
        raise batch
    return batch


def _from_workers(dataset):
    with contextlib.ExitStack() as stack:
        with birthplace():  # Grain imports JAX in its workers; none of them may take a device
            iterator = stack.enter_context(contextlib.closing(iter(dataset)))
            batch = next(iterator, None)  # all workers run by the time one of them has given a batch
        while batch is not None:
            yield {name: np.array(array) for name, array in _checked(batch).items()}  # Grain's lie in shared memory, which is to be free again soon
            batch = next(iterator, None)


def _enter_worker(worker: int, num_workers: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)  # once its queues are flushed: libraries that hang at exit cost 25 s each
