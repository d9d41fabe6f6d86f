"""NeMo's tables and files both ways, bit by bit, for every shape of model and every grid of ranks; and, by hand, where single numbers go."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from helpers import Array
from test_keymap import CONFIGS, equal, model, random_arrays, weights_of

from neva_jax.convert import nemo
from neva_jax.convert.nemo_file import NemoFile
from neva_jax.convert.nemo_write import write_nemo
from neva_jax.errors import UserError

torch = pytest.importorskip("torch")

ADAPTER = "model.embedding.word_embeddings.adapter_layer.mm_projector_adapter.mm_projector"
EVEN = {name: dataclasses.replace(config, llm=dataclasses.replace(config.llm, num_layers=4)) for name, config in CONFIGS.items()}


def yaml_config(config):
    """The fields of a model_config.yaml that say how a file is cut."""
    llm = config.llm
    return {
        "num_layers": llm.num_layers, "hidden_size": llm.hidden_size, "ffn_hidden_size": llm.ffn_hidden_size, "num_attention_heads": llm.num_attention_heads,
        "num_query_groups": llm.num_query_groups, "activation": llm.activation, "make_vocab_size_divisible_by": 8,
        "share_embeddings_and_output_weights": llm.tied,
    }  # fmt: skip


def arrays_of(config, parts=("llm", "projector", "vision_encoder")):
    """Random weights of ours; the rows of padding, which no file holds, are zeros."""
    ours = random_arrays({path: w.shape for path, w in weights_of(config).items() if path.startswith(parts)})
    for path in {"llm/embed_tokens/embedding", "llm/lm_head/kernel"} & set(ours):
        ours[path][np.s_[50:] if "embed" in path else np.s_[:, 50:]] = 0
    return ours


def write(output, config, ours, **options):
    keys = nemo.key_map(config)
    write_nemo(output, keys.parts(ours), keys.outline(ours), options.pop("yaml", yaml_config(config)), {}, **options)
    return output


def read(path, config, scratch, parts=("llm", "projector", "vision_encoder")):
    scratch.mkdir()
    keys, tensors = nemo.key_map(config), NemoFile(path).tensors(scratch)
    shapes = {path: w.shape for path, w in weights_of(config).items() if path.startswith(parts)}
    keys.check(tensors, shapes, str(path))
    return {path: keys.read(tensors, path, shape, str(path)) for path, shape in shapes.items()}


def state(folder, member="model_weights.ckpt"):
    return torch.load(folder / member, weights_only=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_has_every_weight_of_the_model_and_nothing_else(name):
    assert set(nemo.key_map(CONFIGS[name]).rules) == set(weights_of(CONFIGS[name]))


GRIDS = [(t, p) for t in (1, 2, 4) for p in (1, 2)]


@pytest.mark.parametrize("key_format", nemo.KEY_FORMATS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", EVEN)
def test_round_trips_are_equal_in_every_bit(name, grid, key_format, tmp_path):
    """Ours -> NeMo -> ours; as a directory where the pipeline is cut, as a tar where it is not."""
    config, (tensor, pipeline) = EVEN[name], grid
    if config.llm.num_query_groups % tensor:
        tensor = 1
    ours, output = arrays_of(config), tmp_path / ("out" if pipeline > 1 else "out.nemo")
    write(output, config, ours, tensor_parallel=tensor, pipeline_parallel=pipeline, key_format=key_format)
    assert output.is_dir() == (pipeline > 1)
    equal(read(output, config, tmp_path / "scratch"), ours)
    assert len(NemoFile(output).ranks()) == tensor * pipeline
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([output.name, "scratch"]), "nothing else is left beside the output"


@pytest.mark.parametrize("parts", [("projector",), ("llm",), ("llm", "projector")], ids=str)
def test_parts_of_a_model(parts, tmp_path):
    """A stage-1 file has the projector alone; a fine-tuned one has no tower."""
    config = EVEN["gqa"]
    ours = arrays_of(config, parts)
    write(tmp_path / "out", config, ours, tensor_parallel=2, pipeline_parallel=2)
    equal(read(tmp_path / "out", config, tmp_path / "scratch", parts), ours)


def test_names_are_nemos(tmp_path):
    config = EVEN["mha"]
    for key_format, embedding, layer in (
        ("mcore", "model.", "model.decoder.layers.3."),
        ("legacy", "model.language_model.", "model.language_model.encoder.layers.3."),
    ):
        names = set(state(write(tmp_path / key_format, config, arrays_of(config), key_format=key_format)))
        assert {
            f"{embedding}embedding.word_embeddings.weight", f"{embedding}output_layer.weight", ADAPTER.replace("model.", embedding) + ".2.bias",
            f"{embedding}embedding.word_embeddings.vision_encoder.vision_model.encoder.layers.1.self_attn.q_proj.weight",
        } <= names  # fmt: skip
        last = [name.removeprefix(layer) for name in names if name.startswith(layer)]
        assert sorted(last) == sorted({
            "mcore": ["self_attention.linear_qkv.weight", "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_proj.weight",
                      "mlp.linear_fc1.weight", "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc2.weight"],
            "legacy": ["self_attention.query_key_value.weight", "input_layernorm.weight", "self_attention.dense.weight", "mlp.dense_h_to_4h.weight",
                       "post_attention_layernorm.weight", "mlp.dense_4h_to_h.weight"],
        }[key_format])  # fmt: skip
    assert "model.language_model.encoder.final_layernorm.weight" in names and NemoFile(tmp_path / "legacy").config["mcore_gpt"] is False


def test_where_numbers_go(tmp_path):
    """Beside the round trip, which a wrong but invertible layout would pass. Two groups of two query heads, head_dim 6, two tensor ranks, two stages."""
    config = EVEN["gqa"]
    ours = arrays_of(config)
    folder = write(tmp_path / "out", config, ours, tensor_parallel=2, pipeline_parallel=2)
    ranks = {(p, t): state(folder, f"tp_rank_{t:02d}_pp_rank_{p:03d}/model_weights.ckpt") for p in (0, 1) for t in (0, 1)}
    layer = "model.decoder.layers.1."  # of stage 1: the model's layer 3
    qkv = ranks[1, 1][f"{layer}self_attention.linear_qkv.weight"]  # the rank's one group: query heads 2 and 3, key head 1, value head 1
    assert qkv.shape == (24, 24)
    attention = {name: ours[f"llm/layers/self_attn/{name}_proj/kernel"][3] for name in "qkvo"}
    assert (
        qkv[0, 5] == attention["q"][5, 12] and qkv[6, 5] == attention["q"][5, 18] and qkv[13, 5] == attention["k"][5, 7] and qkv[23, 5] == attention["v"][5, 11]
    )
    assert ranks[1, 1][f"{layer}self_attention.linear_proj.weight"][7, 2] == attention["o"][14, 7]
    fc1 = ranks[1, 1][f"{layer}mlp.linear_fc1.weight"]  # ffn 40: the rank's 20 rows of the gate, then its 20 of up
    assert fc1.shape == (40, 24)
    assert fc1[1, 9] == ours["llm/layers/mlp/gate_proj/kernel"][3, 9, 21] and fc1[39, 9] == ours["llm/layers/mlp/up_proj/kernel"][3, 9, 39]
    assert ranks[1, 1][f"{layer}mlp.linear_fc2.weight"][4, 3] == ours["llm/layers/mlp/down_proj/kernel"][3, 23, 4]
    table = ranks[0, 1]["model.embedding.word_embeddings.weight"]  # 50 rows, padded to a multiple of 8 x 2
    assert table.shape == (32, 24) and not table[18:].any() and table[17, 3] == ours["llm/embed_tokens/embedding"][49, 3]
    assert ranks[0, 0]["model.decoder.layers.0.mlp.linear_fc1.layer_norm_weight"][2] == ours["llm/layers/post_attention_layernorm/scale"][0, 2]
    first, last = set(ranks[0, 0]), set(ranks[1, 0])
    assert f"{ADAPTER}.0.weight" in first and "model.output_layer.weight" not in first and "model.decoder.final_layernorm.weight" not in first
    assert {"model.output_layer.weight", "model.decoder.final_layernorm.weight"} <= last and not any(name.startswith("model.embedding") for name in last)


@pytest.mark.parametrize("key_format, copy", [("mcore", "model.output_layer.weight"), ("legacy", "model.word_embeddings.weight")])
def test_a_tied_output_has_the_table_on_the_last_stage(key_format, copy, tmp_path):
    config = EVEN["tied"]
    ours = arrays_of(config)
    last = state(write(tmp_path / "out", config, ours, pipeline_parallel=2, key_format=key_format), "tp_rank_00_pp_rank_001/model_weights.ckpt")
    np.testing.assert_array_equal(last[copy][:50], ours["llm/embed_tokens/embedding"][:50])
    assert copy not in state(write(tmp_path / "one", config, ours, key_format=key_format))


def test_a_dtype_of_its_own(tmp_path):
    config = EVEN["gqa"]
    ours = arrays_of(config)
    found = read(write(tmp_path / "a.nemo", config, ours, dtype="bfloat16"), config, tmp_path / "scratch")
    equal(found, {path: array.astype(ml_dtypes.bfloat16) for path, array in ours.items()})
    torch_rounds = torch.from_numpy(ours["llm/norm/scale"]).bfloat16().float().numpy()
    np.testing.assert_array_equal(found["llm/norm/scale"].astype(np.float32), torch_rounds)


# ---- names -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs, known",
    [
        ("model.module.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("model._orig_mod.output_layer.weight", "output_layer.weight"),
        ("model.decoder.layers.11.input_layernorm.bias", "decoder.layers.11.self_attention.linear_qkv.layer_norm_bias"),
        ("model.decoder.layers.11.pre_mlp_layernorm.weight", "decoder.layers.11.mlp.linear_fc1.layer_norm_weight"),
        ("model.language_model.encoder.layers.10.post_attention_layernorm.bias", "decoder.layers.10.mlp.linear_fc1.layer_norm_bias"),
        ("model.language_model.encoder.layers.10.mlp.dense_4h_to_h.weight", "decoder.layers.10.mlp.linear_fc2.weight"),
        ("model.embedding.word_embeddings.adapter_layer.mm_linear_adapter.linear.bias", f"{ADAPTER[6:]}.bias"),
        ("model.language_model.embedding.word_embeddings.adapter_layer.mm_linear_adapter.linear.2.bias", f"{ADAPTER[6:]}.2.bias"),
        ("model.decoder.layers.0.mlp.linear_fc1._extra_state", None),
        ("model.rotary_pos_emb.inv_freq", None),
        ("model.language_model.rotary_pos_emb.inv_freq", None),
        ("model.embedding.word_embeddings.vision_encoder.vision_model.embeddings.position_ids", None),
        ("model.word_embeddings.weight", None),
        ("model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight",
         "decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"),
    ],
)  # fmt: skip
def test_canonical(theirs, known):
    assert nemo.canonical(theirs) == known


# ---- what the table says of misfits ------------------------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    config = EVEN["gqa"]
    keys, ours = nemo.key_map(config), arrays_of(config, ("llm",))
    arrays = keys.write(ours)
    del arrays["decoder.layers.2.mlp.linear_fc2.weight"]
    arrays |= {
        "decoder.layers.1.self_attention.linear_qkv.weight": np.zeros((50, 24), np.float32),
        "output_layer.weight": np.zeros((50, 23), np.float32),
        "decoder.layers.7.mlp.linear_fc2.weight": np.zeros(()),
        "decoder.layers.0.mlp.linear_fc2.weight": np.zeros((), np.float32),
        "decoder.layers.0.mlp.linear_fc1.weight": np.zeros((), np.float32),
        "embedding.word_embeddings.weight": np.zeros((), np.float32),
    }
    names = {nemo.spelt(name, "mcore"): torch.from_numpy(array) for name, array in arrays.items()}
    names["model.language_model.encoder.final_layernorm.weight"] = torch.zeros(24)
    (tmp_path / "out").mkdir()
    torch.save(names, tmp_path / "out" / "model_weights.ckpt")
    (tmp_path / "out" / "model_config.yaml").write_text("activation: fast-swiglu")
    with pytest.raises(UserError) as error:
        keys.check(NemoFile(tmp_path / "out").tensors(tmp_path), {path: array.shape for path, array in ours.items()}, "here")
    for part in (
        "1 tensors are missing (decoder.layers.2.mlp.linear_fc2.weight)",
        "1 are not part of such a model (decoder.layers.7.mlp.linear_fc2.weight)",
        "1 are there twice (model.decoder.final_layernorm.weight (again, as model.language_model.encoder.final_layernorm.weight))",
        "5 have another shape (embedding.word_embeddings.weight [], the config makes it [50, 24], ",
        "decoder.layers.1.self_attention.linear_qkv.weight [50, 24], the config makes it [48, 24]",
        "decoder.layers.0.mlp.linear_fc1.weight [], the config makes it [80, 24]",
        "decoder.layers.0.mlp.linear_fc2.weight [], the config makes it [24, 40]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_shapes_are_checked_without_reading():
    config = model(num_query_groups=2)

    class Closed(Array):
        def read(self):
            raise AssertionError("read")

    keys, weights = nemo.key_map(config), weights_of(config)
    shapes = {path: w.shape for path, w in weights.items()}
    outline = keys.outline({path: np.broadcast_to(np.float16(0), w.shape) for path, w in weights.items()})
    assert {dtype for _, dtype in outline.values()} == {np.dtype(np.float16)}
    tensors = {name: Closed(np.broadcast_to(np.float16(0), shape)) for name, (shape, _) in outline.items()}
    keys.check(tensors, shapes, "here")
    assert {name: array.shape for name, array in keys.write(arrays_of(config)).items()} == {name: shape for name, (shape, _) in outline.items()}
    padded = tensors | {"output_layer.weight": Closed(np.zeros((128, 24)))}  # their own padding is no misfit
    keys.check(padded, shapes, "here")
