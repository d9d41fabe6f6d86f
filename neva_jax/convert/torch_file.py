"""Torch's own files (`.bin`, `.pt`, `.ckpt`, or inside another file) as lazy tensors: mapped, not read, and unpickled by torch's weights-only unpickler alone.

Checksums are compared first, which reads a file once: torch itself looks at none. What Lightning keeps beside its weights (OmegaConf's objects) is replaced by
objects that do nothing; everything else that is no tensor and no plain container is refused.
"""

import contextlib
import io
import os
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from neva_jax.errors import UserError

MINIMUM = (2, 10)  # before it the weights-only unpickler had holes
DTYPES = {name: getattr(np, name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")}
DTYPES |= {"bool": np.bool_, "bfloat16": ml_dtypes.bfloat16}
BLOCK = 2**22  # bytes of a checksummed read
BYSTANDERS = re.compile(
    r"(omegaconf|nemo|megatron|pytorch_lightning|lightning|lightning_fabric|transformer_engine)\.[\w.]+|argparse\.Namespace|collections\.defaultdict"
    r"|pathlib\.\w+|typing\.Any|builtins\.(dict|list|tuple|str|int|float|bool)"
)


@dataclass(frozen=True)
class TorchTensor:
    """A tensor in memory: of a file of torch before 1.6, which cannot be mapped."""

    where: str
    name: str
    tensor: object

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> np.ndarray:
        return to_numpy(self.tensor, f"{self.where}: {self.name}")


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that lies at byte `start` of a file. strides: in numbers."""

    path: Path
    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    start: int

    def read(self) -> np.ndarray:
        """A view of the mapped file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        count = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        numbers = np.memmap(self.path, np.uint8, "r", self.start, (count * self.dtype.itemsize,)).view(self.dtype)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(numbers, self.shape, strides, writeable=False)


class Window(io.RawIOBase):
    """`size` bytes of a file from `begin`, as a file."""

    def __init__(self, file, begin: int, size: int):
        self.file, self.begin, self.size, self.at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, {0: 0, 1: self.at, 2: self.size}[whence] + offset)
        return self.at

    def readinto(self, buffer) -> int:
        self.file.seek(self.begin + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, min(len(buffer), self.size - self.at))])
        self.at += count
        return count


class Bystander:
    """Stands for an object of a library that is not asked: takes anything, does nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def load_torch(path: str | Path, where: str = "", *, begin: int = 0, size: int | None = None, verify: bool = True) -> dict[str, MappedTensor | TorchTensor]:
    """{name: tensor} of a state dict; of a checkpoint of PyTorch Lightning, of its state_dict. Entries that are no tensors are left out.

    where: what errors call it, if it is part of another file: `size` bytes from `begin`. verify: compare checksums, which reads all of it once.
    """
    path, where = Path(path), where or str(path)
    torch = require_torch(where)
    with _errors(where), open(path, "rb") as opened:
        file = io.BufferedReader(Window(opened, begin, os.fstat(opened.fileno()).st_size - begin if size is None else size))
        mapped = file.peek(4)[:4] == b"PK\3\4"  # files of torch before 1.6 are not, and cannot be mapped
        found = _load_mapped(torch, file, where, verify) if mapped else _load(torch, file)
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise UserError(f"{where}: holds {type(found).__name__}, expected a dictionary of tensors")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if found and not tensors:
        raise UserError(f"{where}: no tensors in it, found {', '.join(map(str, list(found)[:6]))}; expected a state dict, or one under state_dict")
    if mapped:
        return {name: _mapped(path, where, name, tensor, begin) for name, tensor in tensors.items()}
    return {name: TorchTensor(where, name, tensor) for name, tensor in tensors.items()}


def _load_mapped(torch, file, where: str, verify: bool):
    """What is there, with tensors that know where their numbers lie and read none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if verify:
        _check_records(file, where)
    file.seek(0)
    bystanders = _bystanders(torch, file)
    file.seek(0)
    with FakeTensorMode():
        return _load(torch, file, bystanders)


def _mapped(path: Path, where: str, name: str, tensor, begin: int) -> MappedTensor:
    try:
        own = np.dtype(DTYPES[str(tensor.dtype).removeprefix("torch.")])
        start = begin + tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * own.itemsize
        return MappedTensor(path, name, tuple(tensor.shape), tuple(tensor.stride()), own, start)
    except (KeyError, RuntimeError, NotImplementedError, AttributeError) as error:  # sparse, quantized, 8-bit floats
        raise UserError(f"{where}: {name} cannot be read ({_first(error)}); expected a plain tensor of float32, float16 or bfloat16") from None


def _load(torch, file, bystanders=()):
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([io.BytesIO, *bystanders]):  # BytesIO: _extra_state entries
        return torch.load(file, map_location="cpu", weights_only=True)


def unpickle(source: io.BytesIO, where: str):
    """What torch.save wrote, if it is nothing but tensors and plain containers."""
    torch = require_torch(where)
    with _errors(where), source as file:
        bystanders = []
        if file.read(4) == b"PK\3\4":
            _check_records(file, where)
            file.seek(0)
            bystanders = _bystanders(torch, file)
        file.seek(0)
        return _load(torch, file, bystanders)


@contextlib.contextmanager
def _errors(where: str):
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where}: cannot be opened ({error.strerror or error})") from None
    except Exception as error:  # torch answers damaged and hostile files with nearly every exception there is
        raise UserError(f"{where}: not a torch file of plain tensors ({_reason(error)}); nothing else is unpickled: save a state dict or safetensors") from None


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _reason(error: Exception) -> str:
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it names {named[1]}"
    return (str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__).splitlines()[0][:200]


def _bystanders(torch, file) -> list[tuple[type, str]]:
    return [(Bystander, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(file) if BYSTANDERS.fullmatch(name)]


def _check_records(file, where: str) -> None:
    try:
        archive = zipfile.ZipFile(file)
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{where}: its record {record.filename} is compressed, which torch.save never does; save it anew with torch.save")
            if record.CRC:  # 0: torch.serialization.set_crc32_options(False)
                with archive.open(record) as content:
                    while content.read(BLOCK):
                        pass
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise UserError(f"{where}: is cut off or damaged ({error}); copy the file again") from None


def reserve_torch(path: Path, plan: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, int]:
    """A state dict's file with room for the numbers and none of them -> {name: the byte where its numbers belong}. plan: {name: (shape, dtype)}.

    The file is sparse, and its room is zeros.
    """
    torch = require_torch(path)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = OrderedDict((name, torch.empty(shape, dtype=getattr(torch, dtype.name))) for name, (shape, dtype) in plan.items())
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        records = {record.filename.rpartition("/data/")[2]: record.header_offset for record in archive.infolist() if "/data/" in record.filename}
        starts = {}
        for number, name in enumerate(plan):  # torch numbers storages as they come
            file.seek(records[str(number)] + 26)
            lengths = struct.unpack("<HH", file.read(4))  # of the record's name and of its padding, which end the header
            starts[name] = records[str(number)] + 30 + sum(lengths)
    return starts


def to_numpy(tensor, where: str) -> np.ndarray:
    import torch

    try:
        tensor = tensor.detach()
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, 8-bit floats
        raise UserError(f"{where} cannot be read ({_first(error)}); expected a plain tensor of float32, float16 or bfloat16") from None


def require_torch(path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: torch's files need torch; pip install torch==2.13.0 (the CPU wheel will do), or bring safetensors") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM:
        raise UserError(f"{path}: torch's files need torch {'.'.join(map(str, MINIMUM))} or later, found {torch.__version__}; older ones unpickle unsafely")
    return torch
