"""A `.nemo` file or its unpacked directory: model_config.yaml, artifacts, and the weights of all tensor and pipeline ranks as one set of lazy tensors.

Members are read by their exact names; links, devices, duplicates and names that leave the archive are refused, and nothing is unpickled but tensors.
Weights of ranks are mapped where they lie in the tar; of a gzipped file, and of a distributed checkpoint, a copy is (checked for room). Given up: virtual
pipeline stages, megatron_legacy, NeMo 2's directories.
"""

import contextlib
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml

from neva_jax.convert.keymap import DUPLICATE, some
from neva_jax.convert.nemo import LAYER, VOCABULARY, WEIGHTS, canonical, is_gated, is_glu, shift_layer, split_dim
from neva_jax.convert.nemo_dist import DistTensor, open_dist
from neva_jax.convert.torch_file import MappedTensor, TorchTensor, load_torch
from neva_jax.errors import UserError

CONFIG, DIST = "model_config.yaml", "model_weights/"
RANK = re.compile(rf"(?:mp_rank_(?P<mp>\d+)|tp_rank_(?P<tp>\d+)_pp_rank_(?P<pp>\d+))/{re.escape(WEIGHTS)}")
MAX_CONFIG = 2**20  # bytes of YAML
MAX_ARTIFACT = 2**28
BLOCK = 2**24


@dataclass(frozen=True)
class Merged:
    """One tensor of all tensor ranks. dim: what they share, None: whole on every rank. glu: each rank holds its gate rows, then its up rows."""

    parts: tuple[MappedTensor | TorchTensor, ...]
    dim: int | None
    glu: bool = False

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size * len(self.parts) if axis == self.dim else size for axis, size in enumerate(self.parts[0].shape))

    def read(self) -> np.ndarray:
        if self.dim is None or len(self.parts) == 1:
            return self.parts[0].read()
        arrays = [part.read() for part in self.parts]
        if not self.glu:
            return np.concatenate(arrays, self.dim)
        return np.concatenate([a[: len(a) // 2] for a in arrays] + [a[len(a) // 2 :] for a in arrays])


class NemoFile:
    """path: a tar or a directory. Attributes: config, the parsed model_config.yaml; members, their sizes by name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.is_dir():
            self._tar, self._found = None, _open_directory(self.path)
            self.members = {name: file.stat().st_size for name, file in self._found.items()}
        else:
            self._tar, self._found = _open_tar(self.path)
            self.members = {name: member.size for name, member in self._found.items()}
        if CONFIG not in self.members:
            if any(name.startswith(("context/", "weights/")) for name in self.members):
                raise UserError(f"{self.path}: a checkpoint of NeMo 2 (context/, weights/), which is not read here; export it to Hugging Face with NeMo")
            raise UserError(f"{self.path}: no {CONFIG} in it; expected a .nemo file or its unpacked directory, found {some(sorted(self.members), 6)}")
        self.config = self._read_config()

    def _read_config(self) -> dict:
        try:
            config = yaml.safe_load(self.read(CONFIG, MAX_CONFIG).decode())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: {CONFIG} cannot be read ({' '.join(str(error).split())[:200]}); only plain YAML is, no tags") from None
        if not isinstance(config, dict):
            raise UserError(f"{self.path}: {CONFIG} holds {type(config).__name__}, expected the fields of a model")
        return config

    def read(self, name: str, limit: int = MAX_ARTIFACT) -> bytes:
        """The bytes of one member."""
        if name not in self.members:
            raise UserError(f"{self.path}: no {name} in it; found {some(sorted(self.members), 6)}")
        if self.members[name] > limit:
            raise UserError(f"{self.path}: {name} has {self.members[name]} bytes, expected at most {limit}")
        with self._open(name) as file:
            return file.read()

    def artifact(self, value: str | None) -> bytes | None:
        """What a field such as tokenizer.model names: "nemo:{hex}_tokenizer.model" is a member; None for any other value."""
        return self.read(value.removeprefix("nemo:")) if isinstance(value, str) and value.startswith("nemo:") else None

    @contextlib.contextmanager
    def _open(self, name: str):
        if self._tar is None:
            with open(self._found[name], "rb") as file:
                yield file
        else:
            with _damage(self.path, name), self._tar.extractfile(self._found[name]) as file:
                yield file

    # ---- weights

    def ranks(self) -> dict[tuple[int, int], str]:
        """{(pipeline stage, tensor rank): member}; checked to be a whole grid, and the one that the config speaks of."""
        if WEIGHTS in self.members:
            return {(0, 0): WEIGHTS}
        found = {}
        for name in self.members:
            if match := RANK.fullmatch(name):
                found[int(match["pp"] or 0), int(match["tp"] or match["mp"] or 0)] = name
        if not found:
            raise UserError(f"{self.path}: no {WEIGHTS} in it, alone or under mp_rank_00, tp_rank_00_pp_rank_000, ...; found {some(sorted(self.members), 8)}")
        announced = [self.config.get(f"{kind}_model_parallel_size") for kind in ("pipeline", "tensor")]
        grid = [max(max(rank[axis] for rank in found) + 1, size if isinstance(size, int) else 1) for axis, size in enumerate(announced)]
        if missing := [(stage, rank) for stage in range(grid[0]) for rank in range(grid[1]) if (stage, rank) not in found]:
            stage, rank = missing[0]
            raise UserError(f"{self.path}: the weights of tensor rank {rank}, pipeline rank {stage} are missing of {grid[1]} x {grid[0]}; copy the file again")
        return found

    @property
    def is_mapped(self) -> bool:
        """Whether tensors are read where they lie, which a gzipped file and a distributed checkpoint inside a tar do not allow."""
        return self._tar is None or (isinstance(self._tar.fileobj, io.BufferedReader) and not any(map(self._is_dist, self.members)))

    def tensors(self, scratch: Path, verify: bool = True) -> dict[str, Merged | DistTensor]:
        """{canonical name: tensor}, of all ranks. scratch: an empty directory for what cannot be mapped; it must outlive the tensors. verify: compare the
        checksums of the ranks' files, which reads them once."""
        if self.config.get("megatron_legacy"):
            raise UserError(f"{self.path}: megatron_legacy True orders its queries, keys and values in another way, which this version does not read")
        found: dict[str, Merged | DistTensor] = {}
        for name, tensor in self._dist_tensors(scratch) if any(map(self._is_dist, self.members)) else self._rank_tensors(scratch, verify):
            if name in found:
                name = f"{found[name].name}{DUPLICATE}{tensor.name})"
            found[name] = tensor
        return found

    @staticmethod
    def _is_dist(member: str) -> bool:
        return member.startswith(DIST)

    def _dist_tensors(self, scratch: Path) -> Iterator[tuple[str, DistTensor]]:
        names = list(filter(self._is_dist, self.members))
        root = self.path if self._tar is None else self._extract(names, scratch)
        for theirs, tensor in open_dist(root / DIST).items():
            if known := canonical(theirs):
                yield known, tensor

    def _load(self, member: str, root: Path, verify: bool) -> dict:
        where = f"{self.path}: {member}"
        if self._tar is None or not self.is_mapped:
            return load_torch(root / member, where, verify=verify)
        return load_torch(self.path, where, begin=self._found[member].offset_data, size=self.members[member], verify=verify)

    def _rank_tensors(self, scratch: Path, verify: bool) -> Iterator[tuple[str, Merged]]:
        ranks, gated = self.ranks(), is_gated(self.config)
        root = self.path if self.is_mapped else self._extract(list(ranks.values()), scratch)
        depth = 1 + max(stage for stage, _ in ranks)
        tied = self.config.get("share_embeddings_and_output_weights", True)
        copied = VOCABULARY[1] if tied and depth > 1 else None  # the last stage's copy of the table
        layers = 0
        for stage in range(depth):
            files = [self._load(member, root, verify) for (at, _), member in sorted(ranks.items()) if at == stage]
            names = {theirs: known for theirs in files[0] if (known := canonical(theirs)) and known != copied}
            self._check_ranks(files)
            numbers = [int(match[2]) for known in names.values() if (match := LAYER.match(known))]
            per_stage, rest = divmod(self.config.get("num_layers") or 0, depth)
            first = layers if rest or not per_stage else stage * per_stage
            shift = first if min(numbers, default=first) < first else 0  # a stage counts its own layers, or all
            for theirs, known in names.items():
                yield shift_layer(known, shift), Merged(tuple(file[theirs] for file in files), split_dim(known), is_glu(known, gated))
            layers = max((number + shift + 1 for number in numbers), default=layers)

    def _check_ranks(self, files: list[dict[str, TorchTensor]]) -> None:
        for file in files[1:]:
            if names := file.keys() ^ files[0].keys():
                raise UserError(f"{self.path}: its tensor ranks hold different tensors ({some(sorted(names))}); they are not of one model")
            for name, tensor in file.items():
                if tensor.shape != (shape := files[0][name].shape):
                    raise UserError(f"{self.path}: {name} is {list(shape)} on one tensor rank and {list(tensor.shape)} on another; they are not of one model")

    def _extract(self, names: list[str], scratch: Path) -> Path:
        total, free = sum(map(self.members.__getitem__, names)), shutil.disk_usage(scratch).free
        if free < total * 1.05:
            raise UserError(f"{self.path}: its weights need {total / 2**30:.1f} GiB of scratch space in {scratch}, which has {free / 2**30:.1f}; set TMPDIR")
        for name in names:
            target = scratch / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._open(name) as source, open(target, "xb") as file:
                shutil.copyfileobj(source, file, BLOCK)
            if target.stat().st_size != self.members[name]:
                raise UserError(f"{self.path}: {name} is cut off; copy the file again")
        return scratch


@contextlib.contextmanager
def _damage(path: Path, what: str):
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
        raise UserError(f"{path}: {what} is cut off or damaged ({error}); copy the file again") from None


def _open_directory(path: Path) -> dict[str, Path]:
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_symlink():
            raise UserError(f"{file}: a link, expected plain files; copy what it points to in its place")
        if file.is_file():
            found[file.relative_to(path).as_posix()] = file
    return found


def _open_tar(path: Path) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    """The tar and its plain files by name without a leading "./"."""
    tar = _list_tar(path)
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar.getmembers():
        name, shown = PurePosixPath(member.name), f"{path}: the member {member.name[:200]!r}"
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
            raise UserError(f"{shown} points outside of the file; it is damaged or hostile")
        if not (member.isreg() or member.isdir()):
            raise UserError(f"{shown} is a link or a device; a .nemo file holds files and folders")
        if member.isdir():
            continue
        if str(name) in found:
            raise UserError(f"{shown} is there twice; it is damaged or hostile")
        found[str(name)] = member
    return tar, found


def _list_tar(path: Path) -> tarfile.TarFile:
    """The tar, its list of members read to the end: a damaged header would otherwise hide all that follow."""
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"  # old files are gzipped
        tar = tarfile.open(path, "r:gz" if packed else "r:")  # noqa: SIM115 (lives as long as the NemoFile)
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a .nemo file ({error}); expected a tar with {CONFIG}, or its unpacked directory") from None
    with _damage(path, "the archive"):
        end = 0
        for member in tar:
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name[:200]!r} has a negative size")
            end = member.offset_data + (0 if member.isdir() else -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        tar.fileobj.seek(end)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it does not end where its last member ends")
        while tar.fileobj.read(BLOCK):  # gzip's checksum comes last
            pass
    return tar
