"""Lazy readers of weight files: `{name: Tensor}` from safetensors, one file or many. Nothing is unpickled and nothing is read before it is asked for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from neva_jax.errors import UserError


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
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / Path(name).name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
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


def headers_digest(directory: str | Path) -> str:
    """sha256 over names, sizes and headers of the weight files: tells two sets of weights apart without reading them."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(Path(directory).glob("*.safetensors")):
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(min(size, 100_000_000)))
    return digest.hexdigest()
