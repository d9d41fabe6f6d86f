"""Distributed checkpoints in megatron-core's layout, written here by torch.distributed.checkpoint and as zarr writes them: whole tensors, layers stacked."""

import io
import json
import os
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
from test_keymap import equal
from test_nemo import EVEN, arrays_of, yaml_config
from test_nemo_file import pack

from neva_jax.convert import nemo, nemo_dist
from neva_jax.convert.nemo_dist import open_dist
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.errors import UserError

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")
checkpoint = pytest.importorskip("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CONFIG = EVEN["gqa"]
TENSOR = 2  # ranks that share a tensor
KEY = "model.decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stacked(ours, keys):
    """{key: array} of megatron-core: the layers of one name on axis 0, the vocabulary padded."""
    found, layers = {}, {}
    for name, array in keys.write(ours).items():
        if match := re.match(r"decoder\.layers\.\d+\.(.+)", name):
            layers.setdefault(f"model.decoder.layers.{match[1]}", []).append(array)
        else:
            found[f"model.{name}"] = np.pad(array, [(0, 64 - len(array)), (0, 0)]) if name in nemo.VOCABULARY else array
    return found | {key: np.stack(arrays) for key, arrays in layers.items()}


def shares(key, shape):
    """The blocks in which megatron-core saves a tensor: a layer each, and a tensor rank each; its gated matrix in halves, each shared."""
    is_layer = key.startswith("model.decoder.layers.")
    dim = nemo.split_dim(key.removeprefix("model."))
    counts = [shape[0] if is_layer else 1] + [1] * (len(shape) - 1)
    if dim is not None:
        counts[dim + is_layer] *= TENSOR * (2 if "linear_fc1" in key else 1)
    sizes = [size // count for size, count in zip(shape, counts, strict=True)]
    return [(tuple(i * s for i, s in zip(index, sizes, strict=True)), tuple(sizes)) for index in np.ndindex(*counts)]


def sharded(key, array):
    """A tensor as megatron-core hands it to torch: all of its shards, which in training lie on many ranks, on this one."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
    from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties

    tensor = torch.from_numpy(array)
    shards = [
        Shard(tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].contiguous(), ShardMetadata(list(offsets), list(sizes), "rank:0/cpu"))
        for offsets, sizes in shares(key, array.shape)
    ]
    metadata = ShardedTensorMetadata([shard.metadata for shard in shards], torch.Size(array.shape), TensorProperties(dtype=tensor.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def write_torch_dist(directory, arrays, make=sharded, **more):
    directory.mkdir(parents=True)
    content = {key: make(key, array) for key, array in arrays.items()} | more
    checkpoint.save(content, storage_writer=checkpoint.FileSystemWriter(directory, thread_count=2), no_dist=True)
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}))
    return directory


def write_by_zarr(directory, arrays):
    """By zarr 2 itself, compressed as it does by default."""
    zarr = pytest.importorskip("zarr")
    for key, array in arrays.items():
        chunks = shares(key, array.shape)[0][1]
        zarr.open(str(directory / key), mode="w", shape=array.shape, chunks=chunks, dtype=array.dtype.str)[...] = array
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    return directory


def write_zarr(directory, arrays, **fields):
    """As zarr 2 writes with no compressor, and as megatron-core calls it: a chunk for each shard, bfloat16 by its name."""
    for key, array in arrays.items():
        path, (_, chunks) = directory / key, shares(key, array.shape)[0]
        path.mkdir(parents=True)
        kind = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str
        header = {
            "chunks": chunks,
            "compressor": None,
            "dtype": kind,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": array.shape,
            "zarr_format": 2,
        }
        (path / ".zarray").write_text(json.dumps(header | fields))
        for offsets, sizes in shares(key, array.shape):
            block = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            (path / ".".join(str(o // s) for o, s in zip(offsets, sizes, strict=True))).write_bytes(np.ascontiguousarray(block).tobytes())
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    return directory


WRITERS = {"torch_dist": write_torch_dist, "zarr": write_zarr}


def test_what_zarr_itself_wrote(tmp_path):
    config = EVEN["gqa"]
    arrays = stacked(arrays_of(config), nemo.key_map(config))
    directory = write_by_zarr(tmp_path / "weights", {key: array.astype(np.float32) for key, array in arrays.items()})
    found = open_dist(directory)
    for key, array in arrays.items():
        layers = {name: tensor.read() for name, tensor in found.items() if re.sub(r"layers\.\d+\.", "layers.", name) == key}
        whole = found[key].read() if key in found else np.stack(list(layers.values()))
        np.testing.assert_array_equal(whole, array.astype(np.float32), err_msg=key, strict=True)


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


@pytest.mark.parametrize("name", ["gqa", "biases", "tied", "layernorm, plain mlp", "mlp_downsample"])
@pytest.mark.parametrize("packed", [False, True], ids=["directory", "tar"])
def test_a_model_comes_back_in_every_bit(write, name, packed, tmp_path):
    config = EVEN[name]
    keys, ours = nemo.key_map(config), arrays_of(config)
    model = tmp_path / "model"
    write(model / "model_weights", stacked(ours, keys))
    (model / "model_weights" / "common.pt").write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    (model / "model_config.yaml").write_text(json.dumps(yaml_config(config)))
    if packed:
        model = pack(tmp_path / "a.nemo", {f"./{file.relative_to(model)}": file.read_bytes() for file in model.rglob("*") if file.is_file()})
    (tmp_path / "scratch").mkdir()
    tensors = NemoFile(model).tensors(tmp_path / "scratch")
    shapes = {path: array.shape for path, array in ours.items()}
    keys.check(tensors, shapes, "here")
    equal({path: keys.read(tensors, path, shape, "here") for path, shape in shapes.items()}, ours)
    assert not (tmp_path / "canary").exists()


def array_of(shape=(4, 6, 8), dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def test_one_layer_is_read_at_a_time(write, tmp_path):
    array = array_of()
    directory = write(tmp_path / "weights", {KEY: array})
    tensors = open_dist(directory)
    assert list(tensors) == [f"model.decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(4)] and tensors[
        "model.decoder.layers.2.mlp.linear_fc2.weight"
    ].shape == (6, 8)
    if write is write_zarr:
        (directory / KEY / "0.0.0").unlink()
    else:
        metadata = checkpoint.FileSystemReader(directory).read_metadata()
        info = next(info for index, info in metadata.storage_data.items() if tuple(index.offset) == (0, 0, 0))
        with open(directory / info.relative_path, "r+b") as file:
            file.seek(info.offset)
            file.write(b"\0" * info.length)
    np.testing.assert_array_equal(tensors["model.decoder.layers.2.mlp.linear_fc2.weight"].read(), array[2])
    with pytest.raises(UserError, match=r"its chunk 0.0.0 is missing|not a torch file"):
        tensors["model.decoder.layers.0.mlp.linear_fc2.weight"].read()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dtypes(write, dtype, tmp_path):
    array = array_of((4, 6, 8), dtype)
    if write is write_torch_dist:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16 if dtype is ml_dtypes.bfloat16 else torch.float16)
        directory = write(tmp_path / "weights", {KEY: array}, make=lambda key, array: tensor)
    else:
        directory = write(tmp_path / "weights", {KEY: array})
    for i, tensor in enumerate(open_dist(directory).values()):
        np.testing.assert_array_equal(tensor.read(), array[i], strict=True)


def test_a_stack_in_one_piece_is_read_once(tmp_path, monkeypatch):
    """As torch.distributed.checkpoint itself would save it: no shards, all layers in one piece of a file."""
    array, loads = array_of(), []
    directory = write_torch_dist(tmp_path / "weights", {KEY: array}, make=lambda key, array: torch.from_numpy(array))
    monkeypatch.setattr(nemo_dist, "unpickle", lambda *args, unpickle=nemo_dist.unpickle: loads.append(1) or unpickle(*args))
    for i, tensor in enumerate(open_dist(directory).values()):
        np.testing.assert_array_equal(tensor.read(), array[i])
    assert len(loads) == 1


def test_what_is_not_of_the_model_is_left_out(write, tmp_path):
    directory = write(tmp_path / "weights", {KEY: array_of(), f"optimizer.state.exp_avg.{KEY}": array_of(), "model.output_layer.weight": array_of((4, 8))})
    if write is write_zarr:
        extra = directory / "model.decoder.layers.mlp.linear_fc1._extra_state"
        extra.mkdir()
        (extra / "shard_0_4.pt").write_bytes(b"never read")
    assert len(open_dist(directory)) == 5


def test_extra_states_of_torch_dist(tmp_path):
    extra = {f"model.decoder.layers.mlp.linear_fc1._extra_state/shard_{i}_4": io.BytesIO(b"never read") for i in range(4)}
    assert len(open_dist(write_torch_dist(tmp_path / "weights", {KEY: array_of()}, **extra))) == 4


def test_zarr_with_a_compressor_and_a_fill_value(tmp_path):
    """Arrays that other programs wrote again: compressed, and with chunks of nothing but the fill value left out."""
    import tensorstore

    array = array_of()
    array[1] = 0
    path = tmp_path / "weights" / KEY
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(path)}, "metadata": {"compressor": {"id": "blosc"}, "chunks": [1, 3, 8]}}
    tensorstore.open(spec, create=True, dtype="float32", shape=array.shape, fill_value=0).result()[...] = array
    (path / "1.0.0").unlink(missing_ok=True)
    (tmp_path / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    np.testing.assert_array_equal([tensor.read() for tensor in open_dist(tmp_path / "weights").values()], array)


def test_a_plain_directory_of_torch(tmp_path):
    """Without megatron-core's metadata.json."""
    directory = write_torch_dist(tmp_path / "weights", {KEY: array_of()})
    (directory / "metadata.json").unlink()
    assert len(open_dist(directory)) == 4


# ---- hostile and damaged -----------------------------------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


class EvilState(Evil):
    """Runs its code by way of a class that .metadata may name."""

    def __reduce__(self):
        return torch.hub.load_state_dict_from_url, (f"file://{self.canary}",)


def rewrite_metadata(directory, change):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("evil", [Evil, lambda canary: pickle.loads, lambda canary: os.system], ids=["call", "pickle.loads", "os.system"])
def test_metadata_that_would_run_code(evil, tmp_path):
    directory = write_torch_dist(tmp_path / "weights", {KEY: array_of()})
    rewrite_metadata(directory, lambda metadata: setattr(metadata, "planner_data", evil(tmp_path / "canary")))
    with pytest.raises(UserError, match="not the metadata of a distributed checkpoint .*it names (io.open|_io.open|_pickle.loads|posix.system)"):
        open_dist(directory)
    assert not (tmp_path / "canary").exists()


def test_torchs_own_functions_are_not_called_either(tmp_path, monkeypatch):
    directory, called = write_torch_dist(tmp_path / "weights", {KEY: array_of()}), []
    rewrite_metadata(directory, lambda metadata: setattr(metadata, "planner_data", EvilState(tmp_path / "canary")))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args: called.append(args))
    assert len(open_dist(directory)) == 4 and not called
    pickle.loads((directory / ".metadata").read_bytes())
    assert called, "plain unpickling would have called it"


def test_a_piece_that_would_run_code(tmp_path):
    directory = write_torch_dist(tmp_path / "weights", {KEY: array_of()})
    content = io.BytesIO()
    torch.save({"a": Evil(tmp_path / "canary")}, content)
    (directory / "evil").write_bytes(content.getvalue())

    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path, info.offset, info.length = "evil", 0, len(content.getvalue())

    rewrite_metadata(directory, change)
    with pytest.raises(UserError, match="evil: not a torch file of plain tensors"):
        next(iter(open_dist(directory).values())).read()
    assert not (tmp_path / "canary").exists()


def first(metadata):
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: setattr(first(m), "relative_path", "../outside"), "is said to lie in '../outside'"),
        (lambda m: setattr(first(m), "relative_path", "/etc/passwd"), "is said to lie in '/etc/passwd'"),
        (lambda m: setattr(first(m), "relative_path", "none.distcp"), "none.distcp: cannot be read"),
        (lambda m: setattr(first(m), "length", 10**6), "is cut off, 1000000 bytes expected at"),
        (lambda m: setattr(first(m), "offset", -5), "cannot be read"),
        (lambda m: setattr(first(m), "transform_descriptors", ["zstd"]), r"is stored as \['zstd'\], only plain torch files are read"),
        (lambda m: m.storage_data.pop(next(iter(m.storage_data))), "not the metadata of a distributed checkpoint"),
        (lambda m: setattr(m, "storage_data", None), "not the metadata of a distributed checkpoint"),
        (lambda m: m.state_dict_metadata[KEY].chunks.pop(), r"mlp.linear_fc2.weight: its pieces hold 24 of 48 numbers; the checkpoint is not whole"),
        (lambda m: setattr(m.state_dict_metadata[KEY].chunks[0], "sizes", torch.Size((1, 6, 3))), r"holds a piece of shape \[1, 6, 4\] where .* \[1, 6, 3\]"),
    ],
    ids=range(10),
)
def test_metadata_that_lies(change, says, tmp_path):
    directory = write_torch_dist(tmp_path / "weights", {KEY: array_of()})
    rewrite_metadata(directory, change)
    with pytest.raises(UserError, match=says) as error:
        for tensor in open_dist(directory).values():
            tensor.read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -1])
def test_metadata_cut_off(cut, tmp_path):
    directory = write_torch_dist(tmp_path / "weights", {KEY: array_of()})
    (directory / ".metadata").write_bytes((directory / ".metadata").read_bytes()[:cut])
    with pytest.raises(UserError, match="not the metadata of a distributed checkpoint"):
        open_dist(directory)


@pytest.mark.parametrize(
    "header, says",
    [
        ({"shape": [4, 6]}, "not the header of a zarr array .*shape, chunks and zarr_format do not agree"),
        ({"chunks": [1, 0, 8]}, "not the header of a zarr array"),
        ({"zarr_format": 3}, "not the header of a zarr array"),
        ({"shape": "abc"}, "not the header of a zarr array"),
        ({"dtype": "<M8"}, "cannot be read"),
        ({"dtype": "<f8"}, "cannot be read"),
        ({"shape": [5, 6, 8]}, "its chunk 4.0.0 is missing"),
        ({"compressor": {"id": "blosc"}}, "cannot be read"),
    ],
    ids=str,
)
def test_zarr_headers_that_lie(header, says, tmp_path):
    directory = write_zarr(tmp_path / "weights", {KEY: array_of()}, **header)
    with pytest.raises(UserError, match=says) as error:
        for tensor in open_dist(directory).values():
            tensor.read()
    assert "\n" not in str(error.value)


def test_a_zarr_chunk_cut_off(tmp_path):
    directory = write_zarr(tmp_path / "weights", {KEY: array_of()})
    path = directory / KEY / "1.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        open_dist(directory)["model.decoder.layers.1.mlp.linear_fc2.weight"].read()


@pytest.mark.parametrize(
    "text, says", [('{"sharded_backend": "hdf5"}', "of kind 'hdf5'; this version reads torch_dist and zarr"), ("{", "does not say"), ("[]", "does not say")]
)
def test_other_backends(text, says, tmp_path):
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(UserError, match=says):
        open_dist(tmp_path)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="of kind None"):
        open_dist(tmp_path)
