"""Distributed checkpoints of megatron-core, as they lie in a .nemo's `model_weights/`: written by torch.distributed.checkpoint (torch_dist) or by zarr.

Their tensors are whole, over all ranks, and those of the layers stacked on axis 0 under a name without a number; here they get their numbers back and are read
a layer at a time. `.metadata` is a pickle: every class in it is replaced by a record that runs nothing, and common.pt is not read. Damage inside an
uncompressed zarr chunk cannot be told, since zarr keeps no checksums.
"""

import functools
import io
import itertools
import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neva_jax.convert.torch_file import to_numpy, unpickle
from neva_jax.errors import UserError

STACKED = re.compile(r"\.layers\.(?!\d)")  # decoder.layers.mlp...: the layers' number is an axis


@dataclass(frozen=True)
class DistTensor:
    """One tensor, or one layer of a stacked one. read_layer: layer (None: all) -> array."""

    name: str
    shape: tuple[int, ...]
    read_layer: Callable
    layer: int | None = None

    def read(self) -> np.ndarray:
        return self.read_layer(self.layer)


@dataclass(frozen=True)
class Piece:
    """A block of a tensor, and the bytes of a file in which torch.save put it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def open_dist(directory: Path) -> dict[str, DistTensor]:
    """{name as in a .nemo of ranks: tensor}. Optimizer states and what holds no tensor are left out."""
    backend = _backend(directory)
    found = {}
    for key, (shape, read_layer) in (_torch_dist if backend == "torch_dist" else _zarr)(directory).items():
        if key.startswith("optimizer."):
            continue
        if match := STACKED.search(key):
            for layer in range(shape[0] if shape else 0):
                name = f"{key[: match.end()]}{layer}.{key[match.end() :]}"
                found[name] = DistTensor(name, shape[1:], read_layer, layer)
        else:
            found[key] = DistTensor(key, shape, read_layer)
    return found


def _backend(directory: Path) -> str:
    path = directory / "metadata.json"
    try:
        backend = json.loads(path.read_bytes())["sharded_backend"]
    except FileNotFoundError:
        backend = "torch_dist" if (directory / ".metadata").is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: does not say its sharded_backend ({type(error).__name__}: {error}); copy the checkpoint again") from None
    if backend not in ("torch_dist", "zarr"):
        raise UserError(f"{path}: a distributed checkpoint of kind {backend!r}; this version reads torch_dist and zarr")
    return backend


# ---- torch_dist --------------------------------------------------------------------------------------------------------------------------------------


class _Record:
    """Stands in for every class of a .metadata: it keeps its state and runs nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module.split(".")[0] in ("torch", "megatron", "nemo", "pathlib"):
            return _Record
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _torch_dist(directory: Path) -> dict[str, tuple]:
    path = directory / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _Metadata(file).load()
        stored = {(index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items() if getattr(index, "offset", None) is not None}
        tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
        pieces = {key: (tuple(entry.size), [_piece(key, chunk, stored) for chunk in entry.chunks]) for key, entry in tensors.items()}
    except Exception as error:  # a damaged pickle raises nearly every exception there is
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path}: not the metadata of a distributed checkpoint ({type(error).__name__}: {reason}); nothing else is unpickled") from None

    load = functools.lru_cache(maxsize=1)(functools.partial(_load_piece, directory))  # a piece may hold many layers, which are asked for in turn
    return {key: (shape, functools.partial(_read_pieces, f"{directory}: {key}", shape, parts, load)) for key, (shape, parts) in pieces.items()}


def _piece(key: str, chunk: _Record, stored: dict) -> Piece:
    info = stored[key, tuple(chunk.offsets)]
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{key} is stored as {info.transform_descriptors}, only plain torch files are read")
    if Path(info.relative_path).name != info.relative_path:
        raise ValueError(f"{key} is said to lie in {info.relative_path!r}")
    return Piece(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, int(info.offset), int(info.length))


def _load_piece(directory: Path, piece: Piece) -> np.ndarray:
    path = directory / piece.file
    try:
        with open(path, "rb") as file:
            file.seek(piece.start)
            content = file.read(piece.length)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the checkpoint again") from None
    if len(content) < piece.length:
        raise UserError(f"{path}: is cut off, {piece.length} bytes expected at {piece.start}, {len(content)} found; copy the checkpoint again")
    array = to_numpy(unpickle(io.BytesIO(content), str(path)), str(path))
    if array.shape != piece.sizes:
        raise UserError(f"{path}: holds a piece of shape {list(array.shape)} where its .metadata says {list(piece.sizes)}")
    return array


def _read_pieces(where: str, shape: tuple[int, ...], pieces: list[Piece], load: Callable, layer: int | None) -> np.ndarray:
    if layer is not None:
        pieces = [piece for piece in pieces if piece.offsets[0] <= layer < piece.offsets[0] + piece.sizes[0]]
        shape = shape[1:]
    whole, filled = None, 0
    for piece in pieces:
        array, offsets = load(piece), piece.offsets
        if layer is not None:
            array, offsets = array[layer - offsets[0]], offsets[1:]
        if array.shape == shape:
            return array
        whole = np.zeros(shape, array.dtype) if whole is None else whole
        whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets, array.shape, strict=True))] = array
        filled += array.size
    if whole is None or filled != whole.size:
        raise UserError(f"{where}: its pieces hold {filled} of {math.prod(shape)} numbers; the checkpoint is not whole")
    return whole


# ---- zarr --------------------------------------------------------------------------------------------------------------------------------------------


def _zarr(directory: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(directory.glob("*/.zarray")):
        try:
            fields = json.loads(path.read_bytes())
            shape, chunks = tuple(map(int, fields["shape"])), tuple(map(int, fields["chunks"]))
            if fields["zarr_format"] != 2 or len(shape) != len(chunks) or min((1, *chunks)) < 1 or min((0, *shape)) < 0:
                raise ValueError("shape, chunks and zarr_format do not agree")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path}: not the header of a zarr array ({type(error).__name__}: {error}); copy the checkpoint again") from None
        separator = fields.get("dimension_separator", ".") if fields.get("fill_value") is None else None  # with a fill value, chunks may rightly be missing
        found[path.parent.name] = shape, functools.partial(_read_zarr, path.parent, shape, chunks, separator)
    return found


def _read_zarr(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], separator: str | None, layer: int | None) -> np.ndarray:
    import tensorstore

    grid = [range(-(-size // step)) for size, step in zip(shape, chunks, strict=True)]
    if layer is not None:
        grid[0] = [layer // chunks[0]]
    for index in itertools.product(*grid) if separator else ():
        if not (path / (separator.join(map(str, index)) or "0")).is_file():
            raise UserError(f"{path}: its chunk {separator.join(map(str, index))} is missing; copy the checkpoint again")
    try:
        array = tensorstore.open({"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}}, open=True, read=True).result()
        return np.asarray((array if layer is None else array[layer]).read().result())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0][:300]}); copy the checkpoint again") from None
