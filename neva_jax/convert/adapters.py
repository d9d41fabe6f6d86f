"""LoRA adapters beside the weights they were trained for: how they are merged, and how an adapter knows its base again.

Arrays are lazy (`.shape`, `.dtype`, `[layer]`, `[slices]`): of a model larger than memory a layer at a time is read.
"""

import hashlib
import json

import jax.numpy as jnp
import numpy as np

from neva_jax.errors import UserError
from neva_jax.parallel.sharding import place
from neva_jax.transforms.fp8 import quantise

SAMPLE = 16  # numbers of a kernel that an adapter remembers


class Merged:
    """kernel + A @ B * scale, computed in float32 and given so; `dtype` is the kernel's, in which it should be stored."""

    def __init__(self, kernel, lora_A, lora_B, scale: float):
        self.kernel, self.lora_A, self.lora_B, self.scale = kernel, lora_A, lora_B, scale
        self.shape, self.dtype = tuple(kernel.shape), kernel.dtype

    def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
        """index: a layer, or a slice of each dimension."""
        layer, rows, columns = index if isinstance(index, tuple) else (index, slice(None), slice(None))
        every, is_block = slice(None), isinstance(index, tuple)
        lora_A, lora_B = (self.lora_A[layer, rows, every], self.lora_B[layer, every, columns]) if is_block else (self.lora_A[layer], self.lora_B[layer])
        product = np.matmul(np.asarray(lora_A, np.float32), np.asarray(lora_B, np.float32)) * np.float32(self.scale)
        return np.asarray(self.kernel[index]).astype(np.float32) + product

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[(slice(None),) * 3].astype(dtype or self.dtype)


class Rounded:
    """A kernel as training with `fp8_frozen_weights` saw it: through the dtype of the computation into float8, a layer at a time."""

    def __init__(self, kernel, dtype: str):
        self.kernel, self.compute = kernel, dtype
        self.shape, self.dtype = tuple(kernel.shape), kernel.dtype

    def _layer(self, layer: int) -> np.ndarray:
        stored = quantise(jnp.asarray(np.asarray(self.kernel[layer])).astype(self.compute))
        return np.asarray(stored.values.astype(jnp.float32) * stored.scale)

    def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
        if not isinstance(index, tuple):
            return self._layer(index)
        return np.stack([self._layer(layer)[index[1:]] for layer in range(*index[0].indices(self.shape[0]))])


class MergedKernels:
    """A source (see hub.py) of merged kernels: those of other sources with the adapters' products added.

    origin: {path of a weight: its source}, of kernels and adapters. adapters: {path of a kernel: (path of its A, path of its B)}. shapes: of all weights.
    rounded: None, or the dtype of the computation beside which kernels were stored in float8, to merge into these.
    """

    published = None

    def __init__(self, origin: dict, adapters: dict[str, tuple[str, str]], scale: float, shapes: dict, rounded: str | None = None):
        self.origin, self.adapters, self.scale, self.all_shapes, self.rounded = origin, adapters, scale, shapes, rounded
        self.shapes = {path: shapes[path] for path in adapters}

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        wanted = {path for kernel in shapes for path in (kernel, *self.adapters[kernel])}
        for source in {id(self.origin[path]): self.origin[path] for path in wanted}.values():
            source.check({path: self.all_shapes[path] for path in wanted if self.origin[path] is source})

    def lazy(self, path: str, shape: tuple[int, ...]) -> Merged:
        kernel, lora_A, lora_B = (self.origin[p].lazy(p, self.all_shapes[p]) for p in (path, *self.adapters[path]))
        return Merged(Rounded(kernel, self.rounded) if self.rounded else kernel, lora_A, lora_B, self.scale)

    def load(self, targets: dict) -> dict:
        return {path: place(self.lazy(path, target.shape), target) for path, target in targets.items()}


# ---- knowing a base again --------------------------------------------------------------------------------------------------------------------------------


def fingerprint(kernels: dict) -> dict[str, dict]:
    """{path: {"shape", "sample"}} of lazy kernels: the first numbers of the first layer and of the last, enough to tell two models apart, and so few that
    they can be compared within the rounding of a 16-bit format."""
    found = {}
    for path, kernel in sorted(kernels.items()):
        rows = [np.asarray(kernel[layer]).astype(np.float32)[0, : SAMPLE // 2] for layer in (0, kernel.shape[0] - 1)]
        found[path] = {"shape": list(kernel.shape), "sample": [round(float(number), 8) for number in np.concatenate(rows)]}
    return found


def check_fingerprint(recorded: dict[str, dict] | None, kernels: dict, adapter: str, base: str) -> None:
    """recorded: what `fingerprint` gave where the adapter was written; None: it says nothing. Raises UserError where the base is another."""
    for path, theirs in sorted((recorded or {}).items()):
        if path not in kernels:
            continue
        ours = fingerprint({path: kernels[path]})[path]
        if ours["shape"] != theirs["shape"]:
            raise UserError(f"{adapter}: was trained for another base: its {path} has the shape {theirs['shape']}, that of {base} {ours['shape']}")
        if not np.allclose(ours["sample"], theirs["sample"], rtol=0.01, atol=1e-5):
            raise UserError(
                f"{adapter}: was trained for another base: the checksum of {path} was {checksum(theirs)}, that of {base} is {checksum(ours)} (shape "
                f"{ours['shape']}; it begins with {ours['sample'][0]:.4g} instead of {theirs['sample'][0]:.4g}); give the weights it was trained beside"
            )


def checksum(entry: dict) -> str:
    return hashlib.sha256(json.dumps(entry["sample"]).encode()).hexdigest()[:12]
