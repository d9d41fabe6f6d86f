"""The `.nemo` files that NeMo's own converters wrote from the stored Hugging Face checkpoints, both ways, bit for bit."""

import io
import re
import tarfile

import numpy as np
import pytest
from flax import nnx
from helpers import GOLDEN, golden, neva_config

from neva_jax.convert import hf, nemo
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.convert.nemo_write import write_nemo
from neva_jax.models.multimodal import neva
from neva_jax.transforms.select import describe

torch = pytest.importorskip("torch")

SOURCES = {"llama_mha": "llama_mha", "llama_gqa": "llama_gqa", "neva_llava": "llava"}
FILES = sorted(path.name for path in (GOLDEN / "nemo_ckpt").glob("*.nemo")) or ["llama_mha_mcore_tp1.nemo"]
CONVERTED = [name for name in FILES if re.fullmatch(rf"({'|'.join(SOURCES)})_(mcore|legacy)_tp\d+\.nemo", name)]


def source(name):
    """(our config, the table of Hugging Face, its tensors, the shapes of what the .nemo holds) of the checkpoint that a golden file was made of."""
    directory = golden("checkpoints") / next(SOURCES[prefix] for prefix in SOURCES if name.startswith(prefix))
    config, tensors = neva_config(directory), hf.open_tensors(directory)
    parts = ("llm", "projector") if name.startswith("neva") else ("llm",)
    weights = {path: w.shape for path, w in describe(lambda: neva(config, rngs=nnx.Rngs(0)))[1].items() if path.startswith(parts)}
    return config, hf.key_map(config, tensors), {key: t for key, t in tensors.items() if key.startswith(parts)}, weights


def state_dicts(path):
    """{member: state dict} of a tar, as torch itself reads it."""
    with tarfile.open(path) as tar:
        return {m.name: torch.load(io.BytesIO(tar.extractfile(m).read()), weights_only=True) for m in tar.getmembers() if m.name.endswith(".ckpt")}


def assert_same_files(found, expected):
    assert found.keys() == expected.keys()
    for member, tensors in expected.items():
        assert found[member].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(found[member][name].numpy(), tensor.numpy(), err_msg=f"{member} {name}", strict=True)


@pytest.mark.parametrize("name", CONVERTED)
def test_import_gives_the_hugging_face_tensors(name, tmp_path):
    config, hf_keys, hf_tensors, shapes = source(name)
    tensors, keys = NemoFile(golden("nemo_ckpt") / name).tensors(tmp_path), nemo.key_map(config)
    keys.check(tensors, shapes, name)
    written = hf_keys.write({path: keys.read(tensors, path, shape, name) for path, shape in shapes.items()})
    assert written.keys() == hf_tensors.keys()
    for key, array in written.items():
        np.testing.assert_array_equal(array, hf_tensors[key].read(), err_msg=key, strict=True)


@pytest.mark.parametrize("name", CONVERTED)
def test_export_gives_the_original_file(name, tmp_path):
    config, hf_keys, hf_tensors, shapes = source(name)
    original, keys = NemoFile(golden("nemo_ckpt") / name), nemo.key_map(config)
    ours = {path: hf_keys.lazy(hf_tensors, path, shape, name) for path, shape in shapes.items()}
    key_format, tensor = re.search(r"_(mcore|legacy)_tp(\d+)", name).groups()
    artifacts = {value[5:]: original.artifact(value) for value in original.config["tokenizer"].values() if str(value).startswith("nemo:")}
    write_nemo(
        tmp_path / name, keys.parts(ours), keys.outline(ours), original.config, artifacts, tensor_parallel=int(tensor), key_format=key_format
    )  # fmt: skip
    assert_same_files(state_dicts(tmp_path / name), state_dicts(original.path))
    with tarfile.open(tmp_path / name) as ours, tarfile.open(original.path) as theirs:
        assert sorted(ours.getnames()) == sorted(theirs.getnames())
    assert NemoFile(tmp_path / name).config == original.config


@pytest.mark.parametrize("key_format", ["mcore", "legacy"])
def test_a_file_of_one_rank_becomes_the_original_one_of_two(key_format, tmp_path):
    (tmp_path / "scratch").mkdir()
    one, two = (golden(f"nemo_ckpt/llama_mha_{key_format}_tp{size}.nemo") for size in (1, 2))
    tensors = NemoFile(one).tensors(tmp_path / "scratch")
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    outline = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    write_nemo(tmp_path / "two.nemo", iter(arrays.items()), outline, NemoFile(one).config, {}, tensor_parallel=2, key_format=key_format)
    assert_same_files(state_dicts(tmp_path / "two.nemo"), state_dicts(two))
