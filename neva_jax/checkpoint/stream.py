"""Trees of weights in bounded memory: written from lazy arrays and read again a layer at a time, in Orbax's own format and through its extension points.

Writing keeps IN_FLIGHT bytes and the layer being read, reading only what is asked for. It gives up device placement: a tree written here says nothing of
devices, so that without targets Orbax restores numpy arrays, on any machine; and one process writes it.
"""

import collections
import contextlib
import json
import operator
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from neva_jax.errors import UserError
from neva_jax.transforms.select import nest

CHUNK = 64 * 2**20  # bytes: the least that can be read of an array is at most this
IN_FLIGHT = 256 * 2**20  # bytes read and not yet on disk: several chunks to compress at once while the next layer is read
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OSError)  # what JSON and tensorstore raise about files


def is_stacked(path: str) -> bool:
    """Whether axis 0 is layers: of a weight ("llm/layers/...") and of an optimizer's moment, whose path ends with the weight's."""
    return "/layers/" in path


def chunking(arrays: dict, dtype=None) -> dict[str, ocp.SaveArgs]:
    """How Orbax is to store `arrays` ({path: anything with .shape}): chunks of at most CHUNK bytes and one layer, that divide a shard. dtype: of all."""
    dtype = None if dtype is None else jax.numpy.dtype(dtype)
    return {p: ocp.SaveArgs(dtype=dtype, chunk_byte_size=CHUNK, shard_axes=(0,) if is_stacked(p) and a.shape else ()) for p, a in arrays.items()}


# ---- writing -----------------------------------------------------------------------------------------------------------------------------------------


def save_lazily(directory: str | Path, arrays: dict, dtype=None, progress: Callable[[int], None] | None = None) -> None:
    """Weights by path, written a layer at a time. It goes aside first (`<directory>.partial`) and takes the place of what was there once it is whole, so
    that an interrupted write changes nothing, and `arrays` may read from what it replaces.

    arrays: {path: anything with `.shape`, `[layer]` where layers are stacked, and np.asarray}; an error of reading one passes through as it is.
    dtype: what to store all of them in; None: each as its first layer comes. progress: called with the number of bytes that are newly on disk.
    Raises UserError where the disk refuses, and with several processes, of which each would write everything.
    """
    directory = Path(directory).absolute()
    if jax.process_count() > 1:
        raise UserError(f"{directory}: one process writes it, and {jax.process_count()} are running; start this command without a launcher")
    aside = directory.with_name(directory.name + ".partial")
    registry = ocp.type_handlers.create_type_handler_registry((object, LayerHandler(directory, progress)))
    try:
        with writable(directory):
            shutil.rmtree(aside, ignore_errors=True)  # of a write that was killed
            aside.mkdir(parents=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(aside / "tree", args=ocp.args.PyTreeSave(nest(arrays), save_args=nest(chunking(arrays, dtype))))
        with writable(directory):
            if directory.exists():
                shutil.rmtree(directory)
            os.rename(aside / "tree", directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's are ValueErrors
        raise UserError(f"{directory}: cannot be written ({reason(error)}); check the free space and the permissions there") from error


class LayerHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, for whatever has `.shape` and np.asarray. Where SaveArgs shards axis 0, each index of it is read and written alone."""

    _array_metadata_store = None  # Orbax looks for one and warns; it is about shards, and numpy arrays have none

    def __init__(self, directory: Path, progress: Callable[[int], None] | None):
        super().__init__()
        self.directory, self.progress = directory, progress or (lambda num_bytes: None)

    async def serialize(self, values, infos, args=None):
        """All is on disk when this returns: tensorstore's own threads compress and write while the next layer is read here."""
        writing: collections.deque[tuple[ts.WriteFutures, int]] = collections.deque()
        try:
            for value, info, arg in zip(values, infos, args, strict=True):
                store = None
                for index in range(value.shape[0]) if arg.shard_axes else (...,):
                    while sum(num_bytes for _, num_bytes in writing) > IN_FLIGHT:
                        self._finish(writing)
                    part = np.asarray(value if index is ... else value[index])
                    if store is None:
                        store = self._create(value.shape, arg.dtype or part.dtype, info, arg)
                    part = part.astype(store.dtype.numpy_dtype, copy=False)
                    writing.append((store[index].write(part, can_reference_source_data_indefinitely=True), part.nbytes))
            while writing:
                self._finish(writing)
        finally:
            for written, _ in writing:
                written.exception()  # waits: nothing may be written any more once the folder is removed
        return []

    def _create(self, shape: tuple[int, ...], dtype: np.dtype, info: ocp.type_handlers.ParamInfo, arg: ocp.SaveArgs) -> ts.TensorStore:
        spec = ocp.type_handlers.get_json_tspec_write(info, True, tuple(shape), tuple(shape), dtype, process_index=0, arg=arg)
        with writable(self.directory):
            return ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context).result()

    def _finish(self, writing: collections.deque) -> None:
        written, num_bytes = writing.popleft()
        with writable(self.directory):
            written.result()
        self.progress(num_bytes)


# ---- reading -----------------------------------------------------------------------------------------------------------------------------------------


def open_lazily(directory: str | Path) -> dict[str, "SavedArray"]:
    """{path: SavedArray} of what save_lazily, save_tree or a training step wrote. Shapes and dtypes are read now, values when they are asked for."""
    directory = Path(directory).absolute()
    with readable(directory):
        tree = json.loads((directory / "_METADATA").read_text())
        names = [[key["key"] for key in entry["key_metadata"]] for entry in tree["tree_metadata"].values()]
        context = ocp.type_handlers.get_ts_context(use_ocdbt=tree["use_ocdbt"])
        opening = {}
        for name in names:
            info = ocp.type_handlers.ParamInfo(name=".".join(name), parent_dir=directory, use_zarr3=tree["use_zarr3"], ts_context=context)
            spec = ocp.type_handlers.get_json_tspec_read(info, tree["use_ocdbt"])
            opening["/".join(name)] = ts.open(ts.Spec(spec), open=True, read=True, context=context)
        return {path: SavedArray(directory, store.result()) for path, store in opening.items()}


class SavedArray:
    """One array of a saved tree: `.shape`, `.dtype`, `[...]` with integers and slices as in numpy, and np.asarray. Only the chunks that are touched are
    read; a missing or damaged one is a UserError then."""

    def __init__(self, directory: Path, store: ts.TensorStore):
        self.directory, self._store = directory, store
        self.shape, self.dtype = tuple(store.shape), store.dtype.numpy_dtype

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} indices for {len(self.shape)} dimensions")
        wanted = tuple(forwards(one, size) for one, size in zip(index, self.shape, strict=False))
        with readable(self.directory):
            return self._store[wanted].read().result()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[()] if dtype is None else self[()].astype(dtype, copy=False)


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        found = reason(error) if directory.is_dir() else "there is no such directory"
        raise UserError(f"{directory}: cannot be read ({found}); expected a whole tree of weights of this program: copy it again, or write it anew") from error


def reason(error: Exception) -> str:
    """The first words of an error: tensorstore appends whole specs."""
    return f"{type(error).__name__}: {' '.join(str(error).split(' [')[0].split())[:300]}"


def forwards(index, size: int) -> int | slice:
    """An index as tensorstore takes it, which neither counts from the end nor clips."""
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step < 1:
            raise IndexError(f"a slice of step {step}: saved arrays are read forwards")
        return slice(start, max(start, stop), step)
    if not -size <= (position := operator.index(index)) < size:
        raise IndexError(f"index {position} in a dimension of {size}")
    return position % size
