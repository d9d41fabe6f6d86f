"""The exporter without transformers: shards and their index, configs, new rows, dtypes, what is refused, and what is left behind when it fails."""

import dataclasses
import json
import shutil
import tracemalloc
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from neva_jax.convert import hf
from neva_jax.convert.hf_write import TokenIds, describe, write_huggingface
from neva_jax.convert.weights import open_tensors
from neva_jax.errors import UserError
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig

VISION = ClipVisionConfig(hidden_size=16, ffn_hidden_size=20, num_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
LLAMA = LlamaConfig(
    vocab_size=61, padded_vocab_size=128, num_layers=2, hidden_size=24, ffn_hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=6, rope=Rope(6)
)
CONFIG = NevaConfig(LLAMA, VISION, "mlp2x_gelu")
IDS = TokenIds(image=61, pad=62, bos=1, ends=(2,))


def random_arrays(config=CONFIG, dtype=np.float32):
    """{path: array} of a config, by the shapes that its weights have."""
    from flax import nnx

    from neva_jax.models.multimodal import neva
    from neva_jax.transforms.select import describe as weights_of

    whole = NevaConfig(config.llm or LLAMA, config.vision or VISION, CONFIG.projector)
    _, weights = weights_of(lambda: neva(whole, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    arrays = {path: rng.normal(size=weight.shape).astype(dtype) for path, weight in weights.items()}
    return {path: array for path, array in arrays.items() if path in hf.key_map(config).rules}


ARRAYS = random_arrays()


def tensors_of(directory):
    return {name: tensor.read() for name, tensor in open_tensors(directory).items()}


# ---- weights -----------------------------------------------------------------------------------------------------------------------------------------


def test_names_are_llava_hfs_and_every_number_is_there(tmp_path):
    report = write_huggingface(tmp_path / "out", CONFIG, ARRAYS, IDS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {
        "language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "language_model.model.norm.weight",
        "language_model.model.layers.1.self_attn.k_proj.weight", "multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.pre_layrnorm.weight", "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
    } <= tensors.keys()  # fmt: skip
    np.testing.assert_array_equal(tensors["language_model.model.layers.1.self_attn.k_proj.weight"], ARRAYS["llm/layers/self_attn/k_proj/kernel"][1].T)
    np.testing.assert_array_equal(tensors["language_model.lm_head.weight"][:61], ARRAYS["llm/lm_head/kernel"][:, :61].T)
    assert (report.num_tensors, report.num_bytes) == (len(tensors), sum(array.nbytes for array in tensors.values()))
    assert report.files == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") % 8 == 0, "tensors are aligned"


@pytest.mark.parametrize("limit", [1, 5_000, 20_000])
def test_shards(tmp_path, limit):
    write_huggingface(tmp_path / "one", CONFIG, ARRAYS, IDS)
    write_huggingface(tmp_path / "many", CONFIG, ARRAYS, IDS, max_shard_bytes=limit)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(np.array_equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in one.values()) and sorted(set(index["weight_map"].values())) == files
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for file in files:
        held = load_file(tmp_path / "many" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= limit


def test_rows_for_new_tokens_can_not_win(tmp_path):
    """The mean of logits is below their largest, also where all logits are negative."""
    report = write_huggingface(tmp_path / "out", CONFIG, ARRAYS, IDS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert report.new_rows == 3 and "3 rows of the vocabulary are new" in describe(report)
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        assert len(tensors[name]) == 64
        np.testing.assert_allclose(tensors[name][61:], np.broadcast_to(tensors[name][:61].mean(0), (3, 24)), atol=1e-6)
    head = tensors["language_model.lm_head.weight"]
    hidden = np.concatenate([np.random.default_rng(1).normal(size=(1000, 24)), -100 * head[:61].mean(0, keepdims=True)])
    logits = hidden @ head.T
    assert (logits.argmax(1) < 61).all() and (logits[:, 61:].max(1) < logits[:, :61].max(1) - 1e-3).all()


def test_tokens_that_have_rows_keep_them(tmp_path):
    report = write_huggingface(tmp_path / "out", CONFIG, ARRAYS, TokenIds(image=60, pad=0))
    assert report.new_rows == 0 and len(load_file(tmp_path / "out" / "model.safetensors")["language_model.lm_head.weight"]) == 61


@pytest.mark.parametrize("dtype, type", [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)])
def test_dtype(tmp_path, dtype, type):
    write_huggingface(tmp_path / "out", CONFIG, ARRAYS, IDS, dtype=dtype)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(type)}
    np.testing.assert_array_equal(tensors["multi_modal_projector.linear_1.weight"], ARRAYS["projector/0/kernel"].T.astype(type))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == dtype


def test_without_a_dtype_each_tensor_keeps_its_own_and_the_config_says_the_widest(tmp_path):
    arrays = {path: array.astype(ml_dtypes.bfloat16) if path.startswith("llm/") else array for path, array in ARRAYS.items()}
    write_huggingface(tmp_path / "out", CONFIG, arrays, IDS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["language_model.lm_head.weight"].dtype == ml_dtypes.bfloat16 and tensors["multi_modal_projector.linear_1.bias"].dtype == np.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_memory_is_a_tensor_not_a_shard(tmp_path):
    """Eight layers of one shard, made as they are asked for, as a reader of files does."""
    config = NevaConfig(dataclasses.replace(LLAMA, num_layers=8, ffn_hidden_size=50_000), None, "mlp2x_gelu")
    arrays = random_arrays(NevaConfig(LLAMA, None, "mlp2x_gelu"))

    class Lazy:
        def __init__(self, shape):
            self.shape, self.dtype = shape, np.dtype(np.float32)

        def __getitem__(self, layer):
            return np.full(self.shape[1:], layer, np.float32)

    for path, array in arrays.items():
        if "/layers/" in path:
            arrays[path] = Lazy((8, *(50_000 if size == 32 else size for size in array.shape[1:])))
    tracemalloc.start()
    report = write_huggingface(tmp_path / "out", config, arrays, TokenIds())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 24 * 50_000 * 4
    assert report.num_bytes > 24 * largest and peak < 4 * largest, f"{peak} bytes for tensors of {largest}"
    assert (load_file(tmp_path / "out" / "model.safetensors")["model.layers.5.mlp.up_proj.weight"] == 5).all()


# ---- configs -----------------------------------------------------------------------------------------------------------------------------------------


def config_of(tmp_path, config=CONFIG, arrays=None, ids=IDS, **options):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    write_huggingface(tmp_path / "out", config, random_arrays(config) if arrays is None else arrays, ids, **options)
    return json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"tied": True}, {"bias": True}, {"rope": Rope(6, 5e5, interpolation=4.0)}, {"rope": Rope(6, 5e5, llama3=(8.0, 1.0, 4.0, 8192))},
        {"head_dim": 10, "rope": Rope(10)}, {"activation": "fast-geglu"}, {"num_query_groups": 4, "layernorm_epsilon": 1e-6},
    ],
)  # fmt: skip
def test_what_is_written_reads_back_as_the_model(tmp_path, changes):
    llm = dataclasses.replace(LLAMA, **changes)
    config_of(tmp_path, NevaConfig(llm, VISION, "mlp2x_gelu"), ids=TokenIds(image=60, pad=0))
    found = hf.read_config(tmp_path / "out")
    assert LlamaConfig(**hf.text_fields(found["text"]), padded_vocab_size=128) == llm
    assert ClipVisionConfig(**hf.vision_fields(found["vision"])) == VISION


def test_llavas_config(tmp_path):
    tower = dataclasses.replace(VISION, select_layer=-1, keep_class_token=True)
    config = config_of(tmp_path, NevaConfig(LLAMA, tower, "mlp2x_gelu"), ids=TokenIds(61, 62, 1, (2, 13)), max_positions=77)
    assert (config["image_token_index"], config["image_seq_length"], config["pad_token_id"]) == (61, 5, 62)
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")
    text = config["text_config"]
    assert (text["vocab_size"], text["max_position_embeddings"], text["rope_theta"], text["rope_scaling"]) == (64, 77, 10000.0, None)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 13], "pad_token_id": 62, "do_sample": False}


def test_rope_is_said_in_the_words_of_transformers_4_and_5(tmp_path):
    llm = dataclasses.replace(LLAMA, rope=Rope(6, 5e5, llama3=(8.0, 1.0, 4.0, 8192)))
    text = config_of(tmp_path, NevaConfig(llm, None, "mlp2x_gelu"))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert text["rope_scaling"] == scaling and text["rope_theta"] == 5e5 and text["rope_parameters"] == scaling | {"rope_theta": 5e5}
    assert text["architectures"] == ["LlamaForCausalLM"] and text["model_type"] == "llama"


def test_mistral(tmp_path):
    text = config_of(tmp_path, NevaConfig(LLAMA, None, "mlp2x_gelu"), kind="mistral")
    assert text["model_type"] == "mistral" and text["sliding_window"] is None and "attention_bias" not in text


def test_a_tied_head_is_not_written(tmp_path):
    config_of(tmp_path, NevaConfig(dataclasses.replace(LLAMA, tied=True), None, "mlp2x_gelu"))
    assert not [name for name in tensors_of(tmp_path / "out") if "lm_head" in name]


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------------------


def refuses(tmp_path, *words, config=CONFIG, arrays=ARRAYS, ids=IDS, **options):
    with pytest.raises(UserError) as error:
        write_huggingface(tmp_path / "out", config, arrays, ids, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not list(tmp_path.iterdir()), "something was left behind"


@pytest.mark.parametrize("kind", ["linear", "identity", "mlp3x_gelu", "mlp_downsample"])
def test_projectors_that_transformers_does_not_have(tmp_path, kind):
    config = NevaConfig(LLAMA, dataclasses.replace(VISION, hidden_size=24) if kind == "identity" else VISION, kind)
    refuses(tmp_path, f"mm_mlp_adapter_type {kind}", "mlp2x_gelu", ".nemo", config=config)
    write_huggingface(tmp_path / "llm", NevaConfig(LLAMA, None, kind), random_arrays(NevaConfig(LLAMA, None, kind)), TokenIds())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"normalization": "layernorm1p", "rope": Rope(6, percentage=0.5), "activation": "squared-relu"}, "normalization layernorm1p"),
        ({"normalization": "layernorm1p", "rope": Rope(6, percentage=0.5), "activation": "squared-relu"}, "rotary_percentage 0.5"),
        ({"activation": "squared-relu"}, "activation squared-relu"),
        ({"openai_gelu": True}, "openai_gelu"),
        ({"qkv_bias": True}, "qkv_bias without bias"),
        ({"attention_scale": 1.0}, "attention scale of 1.0"),
        ({"rope": Rope(6, interpolation=2.0, llama3=(8.0, 1.0, 4.0, 8192))}, "seq_len_interpolation_factor beside"),
    ],
)
def test_language_models_that_transformers_does_not_compute(tmp_path, changes, words):
    config = NevaConfig(dataclasses.replace(LLAMA, **changes), VISION, "mlp2x_gelu")
    refuses(tmp_path, "no Llama that transformers could compute", words, ".nemo", config=config, arrays=random_arrays(config))


def test_a_mistral_with_biases(tmp_path):
    config = NevaConfig(dataclasses.replace(LLAMA, bias=True), None, "mlp2x_gelu")
    refuses(tmp_path, "bias in a mistral", config=config, arrays=random_arrays(config), kind="mistral")


def test_weights_that_are_not_the_models(tmp_path):
    arrays = {path: array for path, array in ARRAYS.items() if path != "projector/2/bias"} | {"llm/layers/self_attn/q_proj/lora_a": np.zeros(3)}
    refuses(tmp_path, "missing projector/2/bias", "llm/layers/self_attn/q_proj/lora_a", "merge adapters", arrays=arrays)


@pytest.mark.parametrize("value, options, words", [(np.nan, {}, "from before it went wrong"), (1e6, {"dtype": "float16"}, "choose bfloat16")])
def test_numbers_that_are_none(tmp_path, value, options, words):
    arrays = dict(ARRAYS) | {"projector/2/bias": np.full(24, value, np.float32)}
    refuses(tmp_path, "projector.linear_2.bias holds values that are not finite", words, arrays=arrays, **options)


def test_other_mistakes(tmp_path):
    refuses(tmp_path, "dtype 'fp8' is not one of", dtype="fp8")
    refuses(tmp_path, "float64", arrays=ARRAYS | {"projector/2/bias": np.zeros(24)})
    refuses(tmp_path, "<image>", ids=TokenIds())


def test_too_little_disk_is_said_before_the_first_byte(tmp_path, monkeypatch):
    class Untouched:
        def __init__(self, array):
            self.shape, self.dtype = array.shape, array.dtype

        def __getitem__(self, layer):
            raise AssertionError("read before the disk was looked at")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    refuses(tmp_path, "GiB of disk", "make room", arrays={path: Untouched(array) for path, array in ARRAYS.items()})


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="out exists; remove it"):
        write_huggingface(tmp_path / "out", CONFIG, ARRAYS, IDS)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_is_interrupted_leaves_nothing(tmp_path):
    class Stops:
        shape, dtype = ARRAYS["llm/layers/mlp/up_proj/kernel"].shape, np.dtype(np.float32)

        def __getitem__(self, layer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_huggingface(tmp_path / "out", CONFIG, ARRAYS | {"llm/layers/mlp/up_proj/kernel": Stops()}, IDS)
    assert not list(tmp_path.iterdir())


def test_files_and_notes_of_others(tmp_path):
    report = write_huggingface(tmp_path / "out", CONFIG, ARRAYS, IDS, files={"tokenizer.model": b"pieces"}, notes=("turn pictures first",))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    lines = describe(report).splitlines()
    assert lines[-1] == "note: turn pictures first" and any("tokenizer.model" in line and "6" in line for line in lines)
