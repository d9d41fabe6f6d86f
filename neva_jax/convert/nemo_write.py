"""Writes a `.nemo`, as a tar or as its unpacked directory, for any number of tensor and pipeline ranks.

The file is laid out first, with room for its numbers, which then come in any order, one tensor at a time, and go where they belong; the output appears
under its name only when it is whole. Given up: checksums (torch looks at none), virtual pipeline stages, and distributed checkpoints (NeMo 2.0 itself loads
the plain ones written here).
"""

import math
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import yaml

from neva_jax.convert.nemo import KEY_FORMATS, VOCABULARY, is_gated, is_glu, rank_member, split_dim, stages_of
from neva_jax.convert.torch_file import require_torch, reserve_torch
from neva_jax.errors import UserError

CONFIG = "model_config.yaml"
PER_TENSOR = 4096  # bytes of a zip's and a tar's headers, generously
BLOCK = 2**24
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Layout:
    """How a model's tensors lie in a .nemo. config: its model_config.yaml; names are canonical."""

    tensor: int
    pipeline: int
    key_format: str
    num_layers: int
    gated: bool
    tied: bool
    vocab_multiple: int

    def padded(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole tensor's shape in the file: only the vocabulary grows."""
        multiple = self.vocab_multiple * self.tensor
        return (-(-shape[0] // multiple) * multiple, *shape[1:]) if name in VOCABULARY else tuple(shape)

    def rank_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        padded, dim = self.padded(name, shape), split_dim(name)
        if dim is None:
            return padded
        if padded[dim] % (self.tensor * (1 + is_glu(name, self.gated))):
            raise UserError(f"tensor_parallel {self.tensor} does not divide {name} {list(shape)} along dimension {dim}; choose a divisor")
        return tuple(size // self.tensor if axis == dim else size for axis, size in enumerate(padded))

    def shards(self, name: str, array: np.ndarray) -> Iterator[np.ndarray]:
        """One tensor as each tensor rank holds it; rows of padding are left out."""
        dim, size = split_dim(name), self.tensor
        if dim is None:
            yield from [array] * size
        elif is_glu(name, self.gated):
            gate, up = (np.split(half, size) for half in np.split(array, 2))
            yield from (np.concatenate(pair) for pair in zip(gate, up, strict=True))
        else:
            step = self.rank_shape(name, array.shape)[dim]
            yield from (array[(slice(None),) * dim + (slice(rank * step, (rank + 1) * step),)] for rank in range(size))

    def stages(self, name: str) -> list[tuple[int, str]]:
        return stages_of(name, self.num_layers, self.pipeline, self.tied, self.key_format)


def write_nemo(
    output: str | Path, tensors: Iterator[tuple[str, np.ndarray]], outline: dict, config: dict, artifacts: dict[str, bytes], *,
    tensor_parallel: int = 1, pipeline_parallel: int = 1, key_format: str = "mcore", dtype: str | None = None,
) -> None:  # fmt: skip
    """output: a .nemo file, or a directory if it is not called so; it must not exist.

    tensors: (canonical name, array), each of `outline` once, in any order; outline: {canonical name: (shape, dtype)}, as KeyMap.outline gives it.
    config: model_config.yaml, plain values; its sizes and activation say how ranks share weights, and the parallel sizes and key format are set in it.
    artifacts: {member name: bytes}, as the config's "nemo:{member name}" fields name them. dtype: of all tensors in the file; None keeps each one's own.
    """
    output = Path(output)
    layout = plan_layout(config, outline, tensor_parallel, pipeline_parallel, key_format)
    ranks = plan_ranks(layout, outline, dtype)
    require_torch(output)
    if os.path.lexists(output):
        raise UserError(f"{output} exists; remove it, or choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_room(output, ranks, artifacts)
    config = dict(config) | {
        "tensor_model_parallel_size": tensor_parallel, "pipeline_model_parallel_size": pipeline_parallel, "virtual_pipeline_model_parallel_size": None,
        "mcore_gpt": key_format == "mcore", "transformer_engine": key_format == "mcore",
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            _fill(_lay_out(Path(work), output.suffix == ".nemo", layout, ranks, config, artifacts), layout, tensors, outline)
            os.rename(Path(work) / "made", output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); nothing was left of it") from None


def plan_layout(config: dict, outline: dict, tensor: int, pipeline: int, key_format: str) -> Layout:
    heads = config["num_attention_heads"]
    groups, depth = config.get("num_query_groups") or heads, config["num_layers"]
    if key_format not in KEY_FORMATS:
        raise UserError(f"key_format {key_format!r} is not one of {', '.join(KEY_FORMATS)}")
    if tensor < 1 or pipeline < 1:
        raise UserError(f"tensor_parallel {tensor} and pipeline_parallel {pipeline} are numbers of ranks; choose 1 or more")
    if heads % tensor:
        raise UserError(f"tensor_parallel {tensor} does not divide the {heads} attention heads (num_attention_heads); choose a divisor")
    if groups % tensor:
        raise UserError(
            f"tensor_parallel {tensor} does not divide the {groups} key and value heads (num_query_groups); NeMo gives each tensor rank whole ones: "
            "choose a divisor"
        )
    if config["ffn_hidden_size"] % tensor:
        raise UserError(f"tensor_parallel {tensor} does not divide ffn_hidden_size {config['ffn_hidden_size']}; choose a divisor")
    if depth % pipeline:
        raise UserError(f"pipeline_parallel {pipeline} does not divide the {depth} layers (num_layers); choose a divisor")
    tied = VOCABULARY[0] in outline and VOCABULARY[1] not in outline
    return Layout(tensor, pipeline, key_format, depth, is_gated(config), tied, config.get("make_vocab_size_divisible_by") or 128)


def plan_ranks(layout: Layout, outline: dict, dtype: str | None) -> dict[tuple[int, int], dict]:
    """{(stage, tensor rank): {name in its file: (shape, dtype)}}"""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    ranks: dict = {(stage, rank): {} for stage in range(layout.pipeline) for rank in range(layout.tensor)}
    for name, (shape, own) in outline.items():
        entry = layout.rank_shape(name, shape), np.dtype(DTYPES[dtype] if dtype else own)
        for stage, theirs in layout.stages(name):
            for rank in range(layout.tensor):
                ranks[stage, rank][theirs] = entry
    return ranks


def _check_room(output: Path, ranks: dict, artifacts: dict[str, bytes]) -> None:
    sizes = [math.prod(shape) * dtype.itemsize + PER_TENSOR for plan in ranks.values() for shape, dtype in plan.values()]
    need = sum(sizes) + sum(map(len, artifacts.values())) + 2**20
    if (free := shutil.disk_usage(output.parent).free) < need:
        raise UserError(f"{output}: needs {need / 2**30:.2f} GiB of disk, {output.parent} has {free / 2**30:.2f}; make room, or choose another disk")


def _lay_out(work: Path, as_tar: bool, layout: Layout, ranks: dict, config: dict, artifacts: dict[str, bytes]) -> dict:
    """Makes the whole output, `work`/made, but for the numbers -> {rank: {name in its file: where its numbers belong}}, arrays that are mapped to the disk.

    Its blocks are taken at once: a mapped file that outgrows its disk kills the process.
    """
    target, memory = (_Tar if as_tar else _Folder)(work / "made"), {}
    with target:
        target.add(CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
        for name, content in artifacts.items():
            target.add(name, content)
        for (stage, rank), plan in ranks.items():
            starts = reserve_torch(work / "weights", plan)
            file, begin = target.move(rank_member(stage, rank, layout.pipeline, layout.tensor), work / "weights")
            memory[stage, rank] = file, begin, {name: (start, *plan[name]) for name, start in starts.items()}
    return {rank: _map(*entry) for rank, entry in memory.items()}


def _map(file: Path, begin: int, plan: dict) -> dict[str, np.ndarray]:
    with open(file, "r+b") as opened:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    memory, arrays = np.memmap(file, np.uint8, "r+"), {}
    for name, (start, shape, dtype) in plan.items():
        start += begin
        arrays[name] = memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    return arrays


def _fill(memory: dict, layout: Layout, tensors: Iterator[tuple[str, np.ndarray]], outline: dict) -> None:
    expected = dict(outline)
    for name, array in tensors:
        shape, dtype = expected.pop(name)
        if (array.shape, array.dtype) != (tuple(shape), np.dtype(dtype)):
            raise ValueError(f"{name} came as {array.dtype}{list(array.shape)}, announced as {dtype}{list(shape)}")
        for rank, shard in enumerate(layout.shards(name, array)):
            for stage, theirs in layout.stages(name):
                memory[stage, rank][theirs][tuple(map(slice, shard.shape))] = shard
    if expected:
        raise ValueError(f"{len(expected)} tensors never came: {', '.join(sorted(expected)[:4])}")


class _Folder:
    def __init__(self, path: Path):
        self.path = path
        path.mkdir()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def add(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)

    def move(self, name: str, file: Path) -> tuple[Path, int]:
        """-> the file in which it lies now, and the byte where it begins."""
        (self.path / name).parent.mkdir(exist_ok=True)
        os.rename(file, self.path / name)
        return self.path / name, 0


class _Tar:
    """Members are called as the originals call them: "./", then the name; folders are members too. The tarfile library would write out what is reserved."""

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._begin(".", 0, tarfile.DIRTYPE)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.seek(0, os.SEEK_END)
        end = self.file.tell() + 2 * tarfile.BLOCKSIZE
        self.file.truncate(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
        self.file.close()

    def _begin(self, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> int:
        """Writes a member's header and reserves its blocks -> where it begins."""
        info = tarfile.TarInfo(name)
        info.size, info.type, info.mode = size, kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
        self.file.seek(0, os.SEEK_END)
        self.file.write(info.tobuf())
        begin = self.file.tell()
        self.file.truncate(begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        return begin

    def add(self, name: str, content: bytes) -> None:
        self.file.seek(self._begin(f"./{name}", len(content)))
        self.file.write(content)

    def move(self, name: str, file: Path) -> tuple[Path, int]:
        """-> the file in which it lies now, and the byte where it begins. Of a sparse file only what is there is copied."""
        if match := re.match(r"(.+)/", name):
            self._begin(f"./{match[1]}", 0, tarfile.DIRTYPE)
        size = file.stat().st_size
        begin, at = self._begin(f"./{name}", size), 0
        with open(file, "rb") as content:
            while at < size and (start := _next_data(content, at)) is not None:
                at = os.lseek(content.fileno(), start, os.SEEK_HOLE)
                content.seek(start)
                self.file.seek(begin + start)
                for offset in range(start, at, BLOCK):
                    self.file.write(content.read(min(BLOCK, at - offset)))
        file.unlink()
        return self.path, begin


def _next_data(file, at: int) -> int | None:
    try:
        return os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError:  # nothing but a hole up to the end
        return None
