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

SAMPLE = 16  # numbers of a kernel that an adapter remembers, half of them of its last layer
CLOSE = 0.005  # of a number: the rounding of two 16-bit formats


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

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[(slice(None),) * 3].astype(dtype or self.dtype)


class MergedKernels:
    """A source (see hub.py) of kernels of other sources with the adapters' products added.

    origin: {path of a weight: its source}, of kernels and adapters. adapters: {path of a kernel: (path of its A, path of its B)}. shapes: of all weights.
    rounded: paths of kernels that stood in float8 in training, to take as they stood there; dtype: of that computation.
    """

    published = None

    def __init__(self, origin: dict, adapters: dict[str, tuple[str, str]], scale: float, shapes: dict, rounded: tuple[str, ...] = (), dtype: str = "float32"):
        self.origin, self.adapters, self.scale, self.all_shapes, self.rounded, self.dtype = origin, adapters, scale, shapes, rounded, dtype
        self.shapes = {path: shapes[path] for path in (*adapters, *rounded)}

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        wanted = {path for kernel in shapes for path in (kernel, *self.adapters.get(kernel, ()))}
        for source in {id(self.origin[path]): self.origin[path] for path in wanted}.values():
            source.check({path: self.all_shapes[path] for path in wanted if self.origin[path] is source})

    def lazy(self, path: str, shape: tuple[int, ...]) -> Merged | Rounded:
        kernel, *factors = (self.origin[p].lazy(p, self.all_shapes[p]) for p in (path, *self.adapters.get(path, ())))
        kernel = Rounded(kernel, self.dtype) if path in self.rounded else kernel
        return Merged(kernel, *factors, self.scale) if factors else kernel

    def load(self, targets: dict) -> dict:
        return {path: place(self.lazy(path, target.shape), target) for path, target in targets.items()}


# ---- knowing a base again --------------------------------------------------------------------------------------------------------------------------------


def fingerprint(kernels: dict) -> dict[str, dict]:
    """{path: {"shape", "sample"}} of lazy kernels: a few numbers from all over the first layer and the last, which another model hardly has, and which can be
    compared within the rounding of a 16-bit format."""
    found = {}
    for path, kernel in sorted(kernels.items()):
        layers = [np.asarray(kernel[layer]).astype(np.float32).reshape(-1) for layer in (0, kernel.shape[0] - 1)]
        numbers = np.concatenate([layer[np.linspace(0, layer.size - 1, SAMPLE // 2, dtype=np.int64)] for layer in layers])
        found[path] = {"shape": list(kernel.shape), "sample": [round(float(number), 8) for number in numbers]}
    return found


def base_record(kernels: dict, float8_of: str | None) -> dict:
    """What an adapter remembers of its base. kernels: of `fingerprint`; float8_of: None, or the dtype from which frozen kernels were rounded to float8 beside
    which it was trained."""
    return {"kernels": fingerprint(kernels), "float8_of": float8_of}


def read_record(found, where: str) -> dict | None:
    """A record from a file, which anybody may have written. None: there is none."""
    if found is None:
        return None
    try:
        for path, entry in found["kernels"].items():
            sample, shape = entry["sample"], entry["shape"]
            if not (isinstance(path, str) and isinstance(sample, list) and isinstance(shape, list) and len(sample) == SAMPLE):
                raise ValueError("a sample of another kind")
            if not all(isinstance(n, int | float) and abs(n) < 1e30 for n in [*sample, *shape]):
                raise ValueError("a sample of another kind")
        if found["float8_of"] not in (None, "float32", "bfloat16"):
            raise ValueError(f"float8_of {found['float8_of']!r}")
        return {"kernels": dict(found["kernels"]), "float8_of": found["float8_of"]}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: what it says of its base cannot be read ({type(error).__name__}: {error}); copy it again") from None


def check_record(record: dict | None, kernels: dict, adapter: str, base: str) -> None:
    """kernels: the lazy ones of the base that is here. Raises UserError where the adapter remembers another; one that remembers nothing is taken."""
    for path, theirs in sorted((record or {"kernels": {}})["kernels"].items()):
        if path not in kernels:
            continue
        ours = fingerprint({path: kernels[path]})[path]
        if ours["shape"] != theirs["shape"]:
            raise UserError(f"{adapter}: was trained for another base: its {path} has the shape {theirs['shape']}, that of {base} {ours['shape']}")
        if not np.allclose(ours["sample"], theirs["sample"], rtol=CLOSE, atol=1e-6):
            raise UserError(
                f"{adapter}: was trained for another base: the checksum of {path} was {checksum(theirs)}, that of {base} is {checksum(ours)} (shape "
                f"{ours['shape']}; it begins with {ours['sample'][0]:.4g} instead of {theirs['sample'][0]:.4g}); give the weights it was trained beside"
            )


def checksum(entry: dict) -> str:
    return hashlib.sha256(json.dumps(entry["sample"]).encode()).hexdigest()[:12]
