"""The opener of weights: what of a directory is taken, which source counts first, in which dtype things arrive, and what is said when something is amiss."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import golden, neva_config
from safetensors.numpy import load_file, save_file

from neva_jax.convert import hf
from neva_jax.convert.source import huggingface
from neva_jax.convert.weights import BLOCK, SAMPLES, headers_digest
from neva_jax.errors import UserError
from neva_jax.hub import load_weights, open_weights
from neva_jax.models.multimodal import neva
from neva_jax.transforms.select import describe


@pytest.fixture(scope="module")
def llava():
    """-> directory, config, {path: what it should become}"""
    directory = golden("checkpoints/llava")
    config = neva_config(directory)
    return directory, config, targets(config)


def targets(config, dtype=jnp.float32, prefix=""):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = describe(lambda: neva(config, rngs=nnx.Rngs(0)))[1]
    return {path: jax.ShapeDtypeStruct(w.shape, dtype, sharding=sharding) for path, w in weights.items() if path.startswith(prefix)}


def part_of(directory, out, names, rename=lambda name: name, config=None, extra=None) -> Path:
    """A directory with some tensors of another. names: what a name must start with."""
    out.mkdir(exist_ok=True)
    tensors = {rename(name): array for name, array in load_file(directory / "model.safetensors").items() if name.startswith(names)}
    save_file(tensors | (extra or {}), out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config) if config else (directory / "config.json").read_text())
    return out


def part_config(directory, part):
    return json.loads((directory / "config.json").read_text())[f"{part}_config"]


def equal(arrays, reference, prefix):
    assert set(arrays) == {path for path in reference if path.startswith(prefix)}
    for path, array in arrays.items():
        np.testing.assert_array_equal(array, reference[path], err_msg=path)


@pytest.fixture(scope="module")
def reference(llava):
    directory, config, wanted = llava
    arrays, origin = load_weights(wanted, [huggingface(directory, config)])
    assert set(arrays) == set(origin) == set(wanted)
    tensors = load_file(directory / "model.safetensors")
    np.testing.assert_array_equal(arrays["llm/lm_head/kernel"], tensors["language_model.lm_head.weight"].T)
    return arrays


def test_a_tower_alone(llava, reference, tmp_path):
    directory, config, wanted = llava
    for out, prefix in ((tmp_path / "a", "vision_model."), (tmp_path / "b", "")):
        part_of(directory, out, "vision_tower.", lambda name, prefix=prefix: prefix + name.split("vision_model.")[1], part_config(directory, "vision"))
        [source] = open_weights(out, config, "field", ("vision_encoder",))
        equal(load_weights(wanted, [source])[0], reference, "vision_encoder/")
        assert hf.read_config(out)["text"] is None


def test_a_tower_inside_a_whole_clip(llava, reference, tmp_path):
    directory, config, wanted = llava
    extra = {
        "text_model.encoder.layers.0.mlp.fc1.weight": np.ones((2, 2), np.float32), "text_model.embeddings.position_ids": np.ones((1, 77), np.int64),
        "logit_scale": np.ones((), np.float32), "visual_projection.weight": np.ones((2, 2), np.float32),
        "text_projection.weight": np.ones((2, 2), np.float32),
    }  # fmt: skip
    clip = {"model_type": "clip", "text_config": {}, "vision_config": part_config(directory, "vision")}
    part_of(directory, tmp_path, "vision_tower.", lambda name: name.removeprefix("vision_tower."), clip, extra)
    arrays, _ = load_weights(wanted, open_weights(tmp_path, config, "field", ("vision_encoder",)))
    equal(arrays, reference, "vision_encoder/")
    assert hf.vision_fields(hf.read_config(tmp_path)["vision"])["hidden_size"] == config.vision.hidden_size


def test_a_language_model_alone(llava, reference, tmp_path):
    directory, config, wanted = llava
    part_of(directory, tmp_path, "language_model.", lambda name: name.removeprefix("language_model."), part_config(directory, "text"))
    arrays, _ = load_weights(wanted, open_weights(tmp_path, config, "field", ("llm",)))
    equal(arrays, reference, "llm/")


def test_one_part_of_a_whole_llava(llava, reference):
    directory, config, wanted = llava
    for parts in (("llm",), ("projector",)):
        [source] = open_weights(directory, config, "field", parts)
        assert source.published["parts"] == list(parts) and source.published["directory"] == str(directory.absolute())
        equal(load_weights(wanted, [source])[0], reference, parts[0] + "/")


def test_a_directory_without_the_part_that_is_asked_for(llava, tmp_path):
    directory, config, _ = llava
    part_of(directory, tmp_path, "language_model.", config=part_config(directory, "text"))
    with pytest.raises(UserError, match=r"^my.field: .* holds no weights of vision_encoder; found llm\.embed_tokens\.weight, "):
        open_weights(tmp_path, config, "my.field", ("vision_encoder",))


def test_the_first_source_that_has_a_path_counts(llava, reference, tmp_path):
    directory, config, wanted = llava
    part_of(directory, tmp_path, ("multi_modal_projector.", "language_model."))
    shifted = {name: array + 1 for name, array in load_file(tmp_path / "model.safetensors").items()}
    save_file(shifted, tmp_path / "model.safetensors")
    first, second = huggingface(tmp_path, config, ("projector",)), huggingface(directory, config)
    arrays, origin = load_weights(wanted, [first, second])
    assert set(arrays) == set(wanted)
    for path in wanted:
        assert origin[path] is (first if path.startswith("projector/") else second)
        np.testing.assert_array_equal(arrays[path], reference[path] + 1 if path.startswith("projector/") else reference[path])
    assert set(load_weights(wanted, [second, first])[1].values()) == {second}


def test_what_no_source_has_is_left_out(llava):
    directory, config, wanted = llava
    arrays, origin = load_weights(wanted | {"lora/a": wanted["llm/norm/scale"]}, [huggingface(directory, config)])
    assert "lora/a" not in arrays and "lora/a" not in origin and set(arrays) == set(wanted)


def test_bf16_files_and_the_dtype_asked_for(llava, reference, tmp_path):
    directory, config, wanted = llava
    shutil.copy(directory / "config.json", tmp_path)
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(directory / "model.safetensors").items()}, tmp_path / "model.safetensors")
    source = huggingface(tmp_path, config)
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = source.load(targets(config, dtype))
        for path, array in arrays.items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(reference[path]).astype(ml_dtypes.bfloat16).astype(np.float32))


def test_weights_arrive_sharded(llava, reference):
    directory, config, wanted = llava
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    path = "llm/layers/mlp/up_proj/kernel"
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "x"))
    array = huggingface(directory, config).load({path: jax.ShapeDtypeStruct(wanted[path].shape, jnp.float32, sharding=sharding)})[path]
    assert array.sharding == sharding and array.addressable_shards[1].data.shape == (2, 32, 32)
    np.testing.assert_array_equal(array, reference[path])


@pytest.mark.parametrize("name", ["language_model.model.layers.0.self_attn.q_proj.lora_A.weight", "base_model.model.other.weight", "model.image_newline"])
def test_weights_that_nobody_knows_are_not_dropped_in_silence(llava, tmp_path, name):
    directory, config, wanted = llava
    part_of(directory, tmp_path, "", extra={name: np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=rf"1 are not part of such a model \(({hf.canonical(name)})\)"):
        huggingface(tmp_path, config).load(wanted)


def test_a_part_that_is_not_wanted_may_be_another_model(llava, reference, tmp_path):
    """A LLaVA-NeXT gives its language model to one who asks for that alone."""
    directory, config, _ = llava
    part_of(directory, tmp_path, ("language_model.", "multi_modal_projector.linear_1"), extra={"image_newline": np.zeros(3, np.float32)})
    equal(huggingface(tmp_path, config, ("llm",)).load(targets(config, prefix="llm/")), reference, "llm/")
    equal(huggingface(tmp_path, config).load(targets(config, prefix="llm/")), reference, "llm/")


def test_missing_weights_of_a_part(llava, tmp_path):
    directory, config, wanted = llava
    part_of(directory, tmp_path, ("language_model.model.layers.1", "language_model.model.norm"))
    with pytest.raises(UserError, match="tensors are missing .*llm.embed_tokens.weight"):
        load_weights(wanted, open_weights(tmp_path, config, "field", ("llm",)))


def test_a_tied_model_whose_file_repeats_the_table(llava, reference, tmp_path):
    directory, _, _ = llava
    text = part_config(directory, "text") | {"tie_word_embeddings": True}
    part_of(directory, tmp_path, "language_model.", config=text)
    config = neva_config(tmp_path)
    assert config.llm.tied
    arrays = huggingface(tmp_path, config).load(targets(config, prefix="llm/"))
    assert "llm/lm_head/kernel" not in arrays
    np.testing.assert_array_equal(arrays["llm/embed_tokens/embedding"], reference["llm/embed_tokens/embedding"])


def test_what_is_no_model_directory(llava, tmp_path):
    _, config, _ = llava
    with pytest.raises(UserError, match=r"^my.field: there is no .*nowhere; expected a local path \(nothing is downloaded\)"):
        open_weights(tmp_path / "nowhere", config, "my.field")
    with pytest.raises(UserError, match="^my.field: .* is none of these: a run .*; a Hugging Face model directory"):
        open_weights(tmp_path, config, "my.field")


# ---- digest ------------------------------------------------------------------------------------------------------------------------------------------


def test_the_digest_follows_what_is_in_the_files(llava, tmp_path):
    directory, _, _ = llava
    tensors = load_file(directory / "model.safetensors")
    digests = [headers_digest(directory)]

    def digest(name="model.safetensors", **changes):
        for file in tmp_path.glob("*"):
            file.unlink()
        save_file(tensors | changes, tmp_path / name)
        return headers_digest(tmp_path)

    digests.append(digest())
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert headers_digest(tmp_path) == digests[1], "when a file was copied does not matter"
    bias = tensors["multi_modal_projector.linear_1.bias"]
    digests.append(digest(**{"multi_modal_projector.linear_1.bias": bias[:-1]}))
    digests.append(digest(**{"multi_modal_projector.linear_1.bias": bias + 1}))  # headers and sizes as before
    digests.append(digest(**{"extra": bias}))
    digests.append(digest(name="other.safetensors"))
    assert len(set(digests[1:])) == len(digests[1:])


def test_a_large_file_that_was_trained_on_has_another_digest(tmp_path):
    """No file is read whole; an update that touches every weight is seen all the same."""
    weights = np.random.default_rng(0).normal(size=(3, SAMPLES * BLOCK)).astype(np.float32)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    before = headers_digest(tmp_path)
    save_file({"w": weights * np.float32(1 + 1e-6)}, tmp_path / "model.safetensors")
    assert headers_digest(tmp_path) != before
    save_file({"w": weights}, tmp_path / "model.safetensors")
    assert headers_digest(tmp_path) == before
