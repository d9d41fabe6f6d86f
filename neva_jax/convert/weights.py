"""Lazy readers of weight files: `{name: Tensor}` from safetensors, one file or many. Nothing is unpickled and nothing is read before it is asked for."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from neva_jax.errors import UserError

SAMPLES, BLOCK = 64, 4096  # blocks and their bytes, of each file, that `headers_digest` looks at


@dataclasses.dataclass(frozen=True)
class Tensor:
    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        with safe_open(self.file, framework="np") as f:
            return f.get_tensor(self.name)


def open_safetensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory: model.safetensors, or the shards that model.safetensors.index.json names."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a Hugging Face model directory (nothing is downloaded)")
    index = directory / "model.safetensors.index.json"
    files = _shards(index) if index.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: no *.safetensors here; found {sorted(p.name for p in directory.iterdir())[:8]}; save the model as safetensors")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.exists():
            raise UserError(f"{index}: names the shard {file.name}, which is not in the directory; copy it there")
        try:
            with safe_open(file, framework="np") as f:
                for name in f.keys():  # noqa: SIM118 (not a dict)
                    if name in tensors:
                        raise UserError(f"{file}: tensor {name} is also in {tensors[name].file.name}; remove the stale file")
                    tensors[name] = Tensor(file, name, tuple(f.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from None
    return tensors


def _shards(index: Path) -> list[Path]:
    try:
        names = {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index ({type(error).__name__}: {error}); copy it again") from None
    return [index.parent / name for name in sorted(names)]


def headers_digest(directory: str | Path) -> str:
    """sha256 over names, sizes, headers and a sample of the weight files: tells two sets of weights apart without reading them whole.

    The sample, SAMPLES evenly spaced blocks a file, is for a model that was trained on and saved over itself: its headers stay as they were.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(directory).glob("*.safetensors")):
        with open(file, "rb") as f:
            end = os.fstat(f.fileno()).st_size
            digest.update(f"{file.name} {end} ".encode() + f.read(min(int.from_bytes(f.read(8), "little"), 100_000_000)))
            for at in np.linspace(0, max(end - BLOCK, 0), SAMPLES, dtype=np.int64):
                f.seek(at)
                digest.update(f.read(BLOCK))
    return digest.hexdigest()
