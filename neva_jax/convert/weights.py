"""Lazy readers of weight files: `{name: tensor}` from safetensors or torch's `.bin`, one file or many. Files are mapped: nothing is read before it is asked
for, and of what is sliced only the slice. Nothing but tensors is unpickled (see torch_file).
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from neva_jax.convert.torch_file import load_torch
from neva_jax.errors import UserError

SAMPLES, BLOCK = 64, 4096  # blocks and their bytes, of each file, that `headers_digest` looks at
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
KINDS = (  # (index, files): the first that is there counts
    ("model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ("mm_projector.bin.index.json", "mm_projector.bin"),  # what LLaVA's first stage leaves
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file. start: byte at which it lies."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    def read(self) -> np.ndarray:
        """A view of the mapped file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, np.uint8, "r", self.start, (int(np.prod(self.shape)) * self.dtype.itemsize,)).view(self.dtype).reshape(self.shape)


def open_tensors(path: str | Path) -> dict:
    """All tensors of a safetensors or torch file, or of a Hugging Face directory: model.safetensors or the shards that its index names, else torch's."""
    path = Path(path)
    if path.is_file():
        return open_safetensors(path) if path.suffix == ".safetensors" else load_torch(path)
    tensors, files = {}, _files(path)
    for file in files:
        found = open_safetensors(file) if file.suffix == ".safetensors" else load_torch(file)
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{file}: tensor {min(twice)} is also in another of {', '.join(f.name for f in files[:4])}; remove the stale file")
        tensors |= found
    return tensors


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a Hugging Face model directory (nothing is downloaded)")
    for name, pattern in KINDS:
        index = directory / name
        files = _shards(index) if index.exists() else sorted(directory.glob(pattern))
        if missing := [file for file in files if not file.exists()]:
            raise UserError(f"{index}: names the shard {missing[0].name}, which is not in the directory; copy it there")
        if files:
            return files
    there = sorted(p.name for p in directory.iterdir())[:8]
    raise UserError(f"{directory}: no *.safetensors and no pytorch_model*.bin here; found {there}; save the model as safetensors")


def _shards(index: Path) -> list[Path]:
    try:
        names = {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights ({type(error).__name__}: {error}); copy it again") from None
    return [index.parent / name for name in sorted(names)]


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The safetensors library judges the file; its header says where tensors lie."""
    try:
        with safe_open(file, framework="np"), open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from None
    header.pop("__metadata__", None)
    if odd := [name for name, entry in header.items() if entry["dtype"] not in DTYPES]:
        raise UserError(f"{file}: {odd[0]} is of type {header[odd[0]]['dtype']}, expected {', '.join(DTYPES)}; quantized weights are not read")
    return {
        name: Tensor(file, name, tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }


EXPONENTS = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}  # all bits of it: no finite number


def all_finite(array: np.ndarray) -> bool:
    """np.isfinite(array).all(), a block of numbers at a time, and many times faster for what numpy has no arithmetic of."""
    kind, exponent = EXPONENTS[array.dtype.name]
    bits = np.atleast_1d(array).view(kind)
    step = max(1, 2**18 * len(bits) // max(1, bits.size))
    return not any(((bits[i : i + step] & kind(exponent)) == exponent).any() for i in range(0, len(bits), step))


# ---- telling weights apart ---------------------------------------------------------------------------------------------------------------------------


def weight_files(path: str | Path) -> list[Path]:
    """The files of weights at a path: itself, those of a Hugging Face directory, or all of an unpacked .nemo."""
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / "model_config.yaml").exists():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])


def headers_digest(path: str | Path) -> str:
    """sha256 over names, sizes, headers and a sample of the weight files: tells two sets of weights apart without reading them whole.

    The sample, SAMPLES evenly spaced blocks a file, is for a model that was trained on and saved over itself: its headers stay as they were.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        with open(file, "rb") as f:
            end = os.fstat(f.fileno()).st_size
            header = min(int.from_bytes(f.read(8), "little"), 100_000_000) if file.suffix == ".safetensors" else BLOCK
            digest.update(f"{file.name} {end} ".encode() + f.read(header))
            for at in np.linspace(0, max(end - BLOCK, 0), SAMPLES, dtype=np.int64):
                f.seek(at)
                digest.update(f.read(BLOCK))
    return digest.hexdigest()


def full_digest(path: str | Path) -> str:
    """sha256 over names and all bytes of the weight files."""

    def of_file(file: Path) -> str:
        with open(file, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    files = weight_files(path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lines = [f"{file.name} {digest}" for file, digest in zip(files, pool.map(of_file, files), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
