"""Hugging Face directories as they are found: every layout of names, shards, broken files, abbreviated and old and new config.json."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import neva_config, randomise, read_weights
from safetensors.numpy import load_file, save_file

from neva_jax.convert import hf
from neva_jax.errors import UserError
from neva_jax.layers.rope import Rope
from neva_jax.models.multimodal import neva

TEXT = dict(vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
VISION = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny LLaVA saved by transformers: {what transformers calls it in memory: array}, and its directory."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT), image_token_index=59)
    model = randomise(transformers.LlavaForConditionalGeneration(config))
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, directory


def read(directory):
    config, tensors = neva_config(directory), hf.open_tensors(directory)
    keys = hf.key_map(config, tensors)
    keys.check(tensors, list(keys.rules), str(directory))
    return read_weights(lambda: neva(config, rngs=nnx.Rngs(0)), tensors, keys)[1]


def layout(saved, directory, rename, extra=None):
    """The saved LLaVA once more, with its tensors under other names."""
    shutil.copy(saved[1] / "config.json", directory)
    save_file({rename(name): np.ascontiguousarray(array) for name, array in saved[0].items()} | (extra or {}), directory / "model.safetensors")
    return directory


# ---- names -------------------------------------------------------------------------------------------------------------------------------------------


def replace(*pairs):
    def rename(name):
        for old, new in pairs:
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    return rename


LAYOUTS = {  # from transformers 5's names in memory: model.language_model, model.vision_tower, model.multi_modal_projector, lm_head
    "classic, of the hub": replace(
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."), ("model.vision_tower.", "vision_tower.vision_model."),
    ),
    "4.52 in memory": replace(("model.vision_tower.", "model.vision_tower.vision_model.")),
    "5 in memory": replace(),
    "5 fresh": replace(
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.", "multi_modal_projector."), ("model.vision_tower.", "vision_tower."),
    ),
    "original LLaVA": replace(
        ("model.language_model.", "model."), ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."), ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ),
    "a model without its head's prefix": replace(("model.language_model.", "language_model."), ("model.", "")),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_names_gives_the_same_arrays(saved, tmp_path, name):
    reference, directory = read(saved[1]), layout(saved, tmp_path, LAYOUTS[name])
    arrays = read(directory)
    assert arrays.keys() == reference.keys()
    jax.tree.map(np.testing.assert_array_equal, arrays, reference)
    first = saved[0]["model.language_model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(arrays["llm/layers/mlp/up_proj/kernel"][1], first.T)
    np.testing.assert_array_equal(arrays["projector/2/bias"], saved[0]["model.multi_modal_projector.linear_2.bias"])


def test_layouts_are_what_they_are_called(saved):
    """The fixtures above, checked against the names of real files."""
    names = {layout: {rename(name) for name in saved[0]} for layout, rename in LAYOUTS.items()}
    assert {"language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.vision_model.pre_layrnorm.bias"} <= names["classic, of the hub"]
    assert {"model.language_model.norm.weight", "model.vision_tower.vision_model.embeddings.class_embedding", "lm_head.weight"} <= names["4.52 in memory"]
    assert {"model.vision_tower.encoder.layers.0.layer_norm1.bias", "model.multi_modal_projector.linear_1.bias"} <= names["5 in memory"]
    assert {"model.embed_tokens.weight", "model.mm_projector.0.weight", "lm_head.weight"} <= names["original LLaVA"]
    assert names["5 fresh"] == set(load_file(saved[1] / "model.safetensors"))


def test_buffers_of_old_files_are_ignored(saved, tmp_path):
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 5), np.int64),
    }
    layout(saved, tmp_path, LAYOUTS["classic, of the hub"], extra)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path), read(saved[1]))


@pytest.mark.parametrize(
    "theirs, known",
    [
        ("model.mm_projector.weight", "projector.weight"),
        ("model.mm_projector.4.bias", "projector.4.bias"),
        ("vision_model.encoder.layers.0.mlp.fc1.bias", "vision_encoder.encoder.layers.0.mlp.fc1.bias"),
        ("embeddings.class_embedding", "vision_encoder.embeddings.class_embedding"),
        ("layers.0.mlp.up_proj.weight", "llm.layers.0.mlp.up_proj.weight"),
        ("model.image_newline", "projector.image_newline"),
        ("image_newline", "projector.image_newline"),
        ("text_model.encoder.layers.0.mlp.fc1.bias", None),
        ("logit_scale", None),
        ("logit_bias", None),
        ("vision_model.head.probe", None),
        ("model.vision_tower.head.attention.in_proj_bias", None),
        ("vision_tower.vision_model.head.mlp.fc2.weight", None),
        ("model.head.weight", "model.head.weight"),
        ("vision_model.head.weight", "vision_model.head.weight"),
        ("visual_projection.weight", None),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "llm.layers.0.self_attn.q_proj.lora_A.weight"),
        ("transformer.wte.weight", "transformer.wte.weight"),
    ],
)
def test_canonical(theirs, known):
    assert hf.canonical(theirs) == known


def test_one_weight_under_two_names(saved, tmp_path):
    layout(saved, tmp_path, LAYOUTS["5 in memory"], {"language_model.lm_head.weight": np.zeros((60, 24), np.float32)})
    with pytest.raises(UserError, match=r"lm_head.weight and (language_model\.)?lm_head.weight are two spellings of one weight"):
        hf.open_tensors(tmp_path)


def test_names_of_projectors():
    """LLaVA's linear has no name of its own: model.mm_projector.weight."""
    names = {"projector.weight", "projector.bias"}
    assert {rule.theirs for rule in hf.projector_rules("linear", names)} == names
    assert [rule.theirs for rule in hf.projector_rules("mlp2x_gelu", {"projector.0.weight", "projector.2.weight"})] == [
        f"projector.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")
    ]


# ---- files -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(saved, tmp_path):
    shutil.copy(saved[1] / "config.json", tmp_path)
    items = list(load_file(saved[1] / "model.safetensors").items())
    index = {"metadata": {}, "weight_map": {}}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        save_file(dict(items[i::3]), tmp_path / name)
        index["weight_map"] |= dict.fromkeys([key for key, _ in items[i::3]], name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def refuses(directory, *words):
    with pytest.raises(UserError) as error:
        read(directory)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_shards_and_their_index(saved, sharded):
    jax.tree.map(np.testing.assert_array_equal, read(sharded), read(saved[1]))
    save_file({"model.stale.weight": np.zeros(2, np.float32)}, sharded / "consolidated.safetensors")
    jax.tree.map(np.testing.assert_array_equal, read(sharded), read(saved[1]))  # what the index does not name is not read


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuses(sharded, "names the shard model-00002-of-00003.safetensors", "copy it there")


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refuses(sharded, "model.safetensors.index.json: not an index of weights", "copy it again")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(saved, tmp_path, keep):
    shutil.copy(saved[1] / "config.json", tmp_path)
    whole = (saved[1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    refuses(tmp_path, "model.safetensors: not a whole safetensors file", "copy it again")


def test_no_weights(saved, tmp_path):
    shutil.copy(saved[1] / "config.json", tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(b"another format")
    refuses(tmp_path, "no *.safetensors and no pytorch_model*.bin here", "flax_model.msgpack", "save the model as safetensors")


def test_torchs_files_are_read_where_there_are_no_others(saved, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(saved[1] / "model.safetensors").items()}
    names = sorted(tensors)
    shutil.copy(saved[1] / "config.json", tmp_path)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: tensors[name] for name in part}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path), read(saved[1]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"c__builtin__\neval\n.")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    refuses(tmp_path, "pytorch_model.bin: not a torch file of plain tensors")


def test_no_such_directory(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        hf.open_tensors(tmp_path / "nowhere")


def test_no_config(saved, tmp_path):
    shutil.copy(saved[1] / "model.safetensors", tmp_path)
    refuses(tmp_path, "no config.json here", "expected a Hugging Face model directory")


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "", "\xff"])
def test_a_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refuses(tmp_path, "config.json: ", "JSON")


def test_nothing_is_read_before_it_is_asked_for(saved, tmp_path):
    directory = layout(saved, tmp_path, LAYOUTS["5 in memory"])
    tensors = hf.open_tensors(directory)
    assert tensors["llm.layers.0.self_attn.k_proj.weight"].shape == (12, 24)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        tensors["llm.norm.weight"].read()


# ---- config.json -------------------------------------------------------------------------------------------------------------------------------------


def their_text_fields(config):
    """What transformers itself makes of a text config, in our words."""
    return dict(
        vocab_size=config.vocab_size, num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, num_query_groups=config.num_key_value_heads, head_dim=config.head_dim,
        layernorm_epsilon=config.rms_norm_eps, tied=config.tie_word_embeddings,
        rope=Rope(config.head_dim, config.rope_parameters["rope_theta"]),
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind, given",
    [
        ("llama", {}),
        ("llama", dict(hidden_size=2048, num_attention_heads=16)),
        ("llama", dict(rms_norm_eps=1e-5, vocab_size=32064, num_key_value_heads=None, head_dim=None)),
        ("llama", dict(head_dim=96, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=5e5)),
        ("mistral", {}),
        ("mistral", dict(rope_theta=1e6, sliding_window=None, vocab_size=32064)),  # llava-v1.6-mistral's, abbreviated
    ],
)
def test_keys_left_out_are_transformers_defaults(kind, given):
    transformers = pytest.importorskip("transformers")
    theirs = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind].from_dict(dict(given))
    ours = hf.text_fields({"model_type": kind, **given})
    assert {name: ours[name] for name in their_text_fields(theirs)} == their_text_fields(theirs)


@pytest.mark.parametrize(
    "given", [{}, dict(hidden_size=1024, num_attention_heads=16, hidden_act="gelu", layer_norm_eps=1e-6), dict(image_size=336, patch_size=14)]
)
def test_vision_keys_left_out_are_transformers_defaults(given):
    transformers = pytest.importorskip("transformers")
    c = transformers.CLIPVisionConfig(**given)
    assert hf.vision_fields(given) == dict(
        hidden_size=c.hidden_size, ffn_hidden_size=c.intermediate_size, num_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        image_size=c.image_size, patch_size=c.patch_size, hidden_act=c.hidden_act, layernorm_epsilon=c.layer_norm_eps,
    )  # fmt: skip


def config_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return hf.read_config(tmp_path)


def test_a_llava_without_a_vision_config_has_llavas_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = config_of(tmp_path, {"model_type": "llava", "text_config": {"model_type": "llama"}})
    theirs = transformers.LlavaConfig().vision_config
    ours = hf.vision_fields(config["vision"])
    assert (ours["hidden_size"], ours["num_layers"], ours["num_attention_heads"], ours["image_size"], ours["patch_size"], ours["ffn_hidden_size"]) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.image_size, theirs.patch_size, theirs.intermediate_size,
    )  # fmt: skip


def test_whose_config_it_is(tmp_path):
    clip = {"model_type": "clip_vision_model", "hidden_size": 8}
    assert config_of(tmp_path, clip) == {"top": clip, "text": None, "vision": clip}
    whole = {"model_type": "clip", "text_config": {"hidden_size": 1}, "vision_config": {"hidden_size": 2}}
    assert config_of(tmp_path, whole) == {"top": whole, "text": None, "vision": {"model_type": "clip_vision_model", "hidden_size": 2}}
    llama = {"model_type": "llama", "hidden_size": 8}
    assert config_of(tmp_path, llama) == {"top": llama, "text": llama, "vision": None}
    original = {"model_type": "llava_llama", "hidden_size": 8, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    assert config_of(tmp_path, original) == {"top": original, "text": original, "vision": None}
    assert hf.text_fields(original)["hidden_size"] == 8


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "text, rope",
    [
        ({}, Rope(8)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(8, 5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(8, 5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(8, 1e4, interpolation=2.0)),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, Rope(8, 1e4, interpolation=2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(8, 5e5, llama3=(8.0, 1.0, 4.0, 8192))),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}, Rope(8, 5e5, llama3=(8.0, 1.0, 4.0, 8192))),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(8, 5e5)),  # both, as we write
    ],
)
def test_rope_of_transformers_4_and_5(text, rope):
    assert hf.text_fields({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, **text})["rope"] == rope


@pytest.mark.parametrize(
    "text, words",
    [
        ({"model_type": "qwen2"}, "language model of type 'qwen2'; this version reads llama and mistral"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh'; this version computes silu"),
        ({"attention_bias": True}, "attention_bias True with mlp_bias None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'; this version computes default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "without high_freq_factor and original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' without factor"),
    ],
)
def test_language_models_that_cannot_be_computed(text, words):
    with pytest.raises(UserError) as error:
        hf.text_fields(text)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("vision, words", [({"model_type": "dinov2"}, "type 'dinov2'"), ({"hidden_act": "relu"}, "hidden_act 'relu'")])
def test_towers_that_cannot_be_computed(vision, words):
    with pytest.raises(UserError, match=words):
        hf.vision_fields(vision)
