"""Trees of weights, a layer at a time: what Orbax reads of them, what is in memory meanwhile, how they are cut, and what an interruption or damage does."""

import resource
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from neva_jax.checkpoint import stream
from neva_jax.checkpoint.manager import load_tree, save_tree, saved_paths
from neva_jax.checkpoint.stream import open_lazily, save_lazily
from neva_jax.errors import UserError
from neva_jax.transforms.select import flatten, nest

KERNEL = "llm/layers/mlp/up_proj/kernel"


def tree(layers: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        KERNEL: random.standard_normal((layers, 32, 48)).astype(ml_dtypes.bfloat16),
        "llm/layers/input_layernorm/scale": random.standard_normal((layers, 32)).astype(np.float32),
        "llm/embed_tokens/embedding": random.standard_normal((64, 32)).astype(np.float32),
        "projector/linear_1/bias": random.standard_normal(32).astype(np.float16),
    }


class Lazy:
    """An array that tells what is read of it; a stack is never to be read whole."""

    def __init__(self, array, events: list, fail_at: int | None = None, error: BaseException | None = None):
        self.array, self.shape, self.events, self.fail_at, self.error = array, array.shape, events, fail_at, error

    def __getitem__(self, layer):
        if layer == self.fail_at:
            raise self.error
        self.events.append("read")
        return self.array[layer]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("a stack was read whole")


def same(found, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(np.asarray(found[path]), array) and found[path].dtype == array.dtype and found[path].shape == array.shape
        for path, array in expected.items()
    )


@pytest.fixture
def sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    specs = {3: jax.P(None, "fsdp", "tensor"), 2: jax.P(None, "tensor"), 1: jax.P()}
    return lambda array: jax.sharding.NamedSharding(mesh, specs[array.ndim])


def test_orbax_reads_it(tmp_path, sharding):
    """What both writers write is one thing to Orbax and to us, on any sharding, with another dtype too."""
    weights = tree()
    save_lazily(tmp_path / "lazy", weights)
    save_tree(tmp_path / "whole", {path: jax.device_put(array, sharding(array)) for path, array in weights.items()})
    targets = {path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding(array)) for path, array in weights.items()}
    for directory in (tmp_path / "lazy", tmp_path / "whole"):
        restored = flatten(ocp.StandardCheckpointer().restore(directory, nest(targets)))
        loaded = load_tree(directory, targets)
        assert same(restored, weights) and same(loaded, weights) and same(open_lazily(directory), weights)
        assert all(array[path].sharding == target.sharding for path, target in targets.items() for array in (restored, loaded))
        assert saved_paths(directory) == {path: array.shape for path, array in weights.items()}
    assert same(flatten(ocp.StandardCheckpointer().restore(tmp_path / "lazy")), weights)  # with no target: on the host
    wide = {KERNEL: jax.ShapeDtypeStruct((3, 32, 48), np.float32, sharding=targets[KERNEL].sharding)}
    assert same(load_tree(tmp_path / "lazy", wide), {KERNEL: weights[KERNEL].astype(np.float32)})


def test_one_layer_at_a_time(tmp_path, monkeypatch):
    """With room for one layer in flight, no more than two are ever read and not yet on disk."""
    weights, events = tree(layers=6), []
    monkeypatch.setattr(stream, "IN_FLIGHT", weights[KERNEL][0].nbytes)
    save_lazily(tmp_path / "x", {KERNEL: Lazy(weights[KERNEL], events)}, progress=lambda num_bytes: events.append(num_bytes))
    pending = np.cumsum([1 if event == "read" else -1 for event in events])
    assert pending.max() == 2 and pending[-1] == 0
    assert sum(event for event in events if event != "read") == weights[KERNEL].nbytes
    assert events.count("read") == 6  # each layer once
    assert same(open_lazily(tmp_path / "x"), {KERNEL: weights[KERNEL]})


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", jax.numpy.bfloat16])
def test_dtype(tmp_path, dtype):
    save_lazily(tmp_path / "x", tree(), dtype=dtype)
    assert same(open_lazily(tmp_path / "x"), {path: array.astype(jax.numpy.dtype(dtype)) for path, array in tree().items()})


def chunks(directory) -> dict[str, tuple[int, ...]]:
    return {path: array._store.chunk_layout.read_chunk.shape for path, array in open_lazily(directory).items()}


def test_chunks(tmp_path, monkeypatch, sharding):
    """One layer, at most CHUNK bytes, a divisor of the shard: as it stands in the files."""
    monkeypatch.setattr(stream, "CHUNK", 2048)
    weights = tree()
    save_lazily(tmp_path / "lazy", weights)
    save_tree(tmp_path / "one", {path: jax.numpy.asarray(array) for path, array in weights.items()})
    save_tree(tmp_path / "eight", {path: jax.device_put(array, sharding(array)) for path, array in weights.items()})
    for name in ("lazy", "one", "eight"):
        found = chunks(tmp_path / name)
        for path, array in weights.items():
            assert np.prod(found[path]) * array.itemsize <= 2048
            assert found[path][0] == 1 or "/layers/" not in path
            assert not np.mod(sharding(array).shard_shape(array.shape) if name == "eight" else array.shape, found[path]).any()
    lazy = chunks(tmp_path / "lazy")
    assert lazy["llm/embed_tokens/embedding"] == (16, 32) and lazy["llm/layers/input_layernorm/scale"] == (1, 32)


@pytest.mark.parametrize(
    "path, shape, dtype, expected",
    [
        ("llm/embed_tokens/embedding", (32128, 4096), "float32", (4016, 4096)),
        ("llm/layers/mlp/gate_proj/kernel", (32, 4096, 11008), "bfloat16", (1, 4096, 5504)),
        ("opt_state/0/mu/llm/layers/self_attn/q_proj/kernel", (32, 4096, 4096), "float32", (1, 4096, 4096)),
    ],
)
def test_chunks_of_real_sizes(path, shape, dtype, expected):
    """What Orbax makes of our arguments for sizes too large to write here: 64 MiB are kept to."""
    array = jax.ShapeDtypeStruct(shape, dtype)
    info = ocp.type_handlers.ParamInfo(name="x", parent_dir=Path("/nowhere"), ts_context=ts.Context())
    spec = ocp.type_handlers.get_json_tspec_write(info, True, shape, shape, array.dtype, process_index=0, arg=stream.chunking({path: array})[path])
    assert spec["metadata"]["chunks"] == expected and np.prod(expected) * array.dtype.itemsize <= 64 * 2**20


@pytest.mark.parametrize("error", [UserError("a layer cannot be read"), KeyboardInterrupt()])
def test_interrupted(tmp_path, error):
    """Nothing under the final name, nor aside; what was there before stays; the error is the one that was raised."""
    events: list = []
    broken = {**tree(), KERNEL: Lazy(tree()[KERNEL], events, fail_at=2, error=error)}
    for before in ([], ["x"]):
        with pytest.raises(type(error)) as caught:
            save_lazily(tmp_path / "x", broken)
        assert caught.value is error and sorted(path.name for path in tmp_path.iterdir()) == before
        save_lazily(tmp_path / "x", tree())
    assert same(open_lazily(tmp_path / "x"), tree())


def test_replaces_what_it_reads(tmp_path):
    (tmp_path / "x.partial/tree").mkdir(parents=True)  # left by a write that was killed
    save_lazily(tmp_path / "x", tree())
    save_lazily(tmp_path / "x", open_lazily(tmp_path / "x"), dtype=np.float64)
    assert same(open_lazily(tmp_path / "x"), {path: array.astype(np.float64) for path, array in tree().items()})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .*NotADirectory"):
        save_lazily(tmp_path / "file/x", tree())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(UserError, match="cannot be written .*; check the free space"):
            save_lazily(tmp_path / "x", {"a/b": np.random.default_rng(0).standard_normal(2**19)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one process writes it, and 4 are running"):
        save_lazily(tmp_path / "x", tree())


@pytest.mark.parametrize(
    "index", [0, -1, 2, (), (slice(None), 1), (slice(1, None), slice(-3, -1), 2), (slice(0, 9, 2),), slice(2, 1), (slice(-99, 99), slice(3, 40, 5), slice(7))]
)
def test_index(tmp_path, index):
    save_lazily(tmp_path / "x", tree())
    found, expected = open_lazily(tmp_path / "x")[KERNEL][index], tree()[KERNEL][index]
    assert isinstance(found, np.ndarray) and found.dtype == ml_dtypes.bfloat16 and found.shape == expected.shape and np.array_equal(found, expected)


@pytest.mark.parametrize("index", [3, -4, (0, 0, 0, 0), slice(None, None, -1)])
def test_index_outside(tmp_path, index):
    save_lazily(tmp_path / "x", tree())
    with pytest.raises(IndexError):
        open_lazily(tmp_path / "x")[KERNEL][index]


def test_reads_only_what_is_asked_for(tmp_path):
    def bytes_read() -> int:
        return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]

    layer = 256 * 256 * 4
    save_lazily(tmp_path / "x", {"llm/layers/a/kernel": np.random.default_rng(0).standard_normal((8, 256, 256)).astype(np.float32)})
    start = bytes_read()
    array = open_lazily(tmp_path / "x")["llm/layers/a/kernel"]
    assert array.shape == (8, 256, 256) and array.dtype == np.float32
    assert bytes_read() - start < 0.1 * layer
    array[5]
    assert 0.8 * layer < bytes_read() - start < 1.2 * layer


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "altered"])
def test_damage(tmp_path, damage, capfd):
    """Every file in turn: either nothing that is read depends on it, or one clear error."""
    save_lazily(tmp_path / "x", tree())
    refused = []
    for file in sorted(path.relative_to(tmp_path / "x") for path in (tmp_path / "x").rglob("*") if path.is_file()):
        shutil.copytree(tmp_path / "x", tmp_path / "copy")
        damaged = tmp_path / "copy" / file
        content = damaged.read_bytes()
        damaged.write_bytes({"cut": content[: len(content) // 2], "altered": bytes(byte ^ 85 for byte in content)}.get(damage, b""))
        if damage == "missing":
            damaged.unlink()
        try:
            assert same(open_lazily(tmp_path / "copy"), tree())
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'copy'}: cannot be read (") and "expected a whole tree" in str(error)
            refused.append(file.parts[0])
        shutil.rmtree(tmp_path / "copy")
    assert {"_METADATA", "manifest.ocdbt", "d", "ocdbt.process_0"} == set(refused)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(UserError, match="there is no such directory"):
        open_lazily(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"tree_metadata": [], "use_ocdbt": true, "use_zarr3": false}', '{"tree_metadata": {"x": null}, "use_ocdbt": true}']
)
def test_metadata_of_something_else(tmp_path, content):
    (tmp_path / "_METADATA").write_text(content)
    with pytest.raises(UserError, match="cannot be read"):
        open_lazily(tmp_path)
