"""The converter from its command line: every visible artifact both ways, round trips of every family, what a run stands on, hostile and incomplete input."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import runs
import yaml
from helpers import GOLDEN, ROOT, golden
from models_of_ours import FAMILIES, NEMO_ONLY, assert_same_weights, ours, weights_of
from safetensors.numpy import load_file, save_file

import convert_torch
from neva_jax import cli

torch = pytest.importorskip("torch")

FILES = sorted(path.name for path in (GOLDEN / "nemo_ckpt").glob("*.nemo")) or ["llama_mha_mcore_tp1.nemo"]
SOURCES = {"llama_mha": "llama_mha", "llama_gqa": "llama_gqa", "neva_llava": "llava"}
CONVERTED = [name for name in FILES if re.fullmatch(rf"({'|'.join(SOURCES)})_(mcore|legacy)_tp\d+\.nemo", name)]


def convert(input, output, to, *flags) -> dict:
    """What the command prints with --json."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stdout", out)
        argv = ["convert_torch.py", f"--input={input}", f"--output={output}", f"--to={to}", "--json", *flags]
        cli.run(convert_torch.main, convert_torch.define_flags, argv, with_config=False)
    assert end.value.code == 0, out.getvalue()
    return json.loads(out.getvalue())


def refused(capfd, input, output, to, *flags) -> str:
    """The one line of the error; nothing is left of the output."""
    parent, before = Path(output).parent, sorted(Path(output).parent.iterdir())
    with pytest.raises(SystemExit) as end:
        argv = ["convert_torch.py", f"--input={input}", f"--output={output}", f"--to={to}", *flags]
        cli.run(convert_torch.main, convert_torch.define_flags, argv, with_config=False)
    assert end.value.code == 2 and sorted(parent.iterdir()) == before
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def source_of(name: str) -> Path:
    return golden("checkpoints") / next(SOURCES[prefix] for prefix in SOURCES if name.startswith(prefix))


def state_dicts(path) -> dict:
    with tarfile.open(path) as tar:
        return {m.name: torch.load(io.BytesIO(tar.extractfile(m).read()), weights_only=True) for m in tar.getmembers() if m.name.endswith(".ckpt")}


def model_config(path) -> dict:
    with tarfile.open(path) as tar:
        return yaml.safe_load(tar.extractfile("./model_config.yaml"))


# ---- golden ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVERTED)
def test_golden_nemo_to_hugging_face(name, tmp_path):
    source = source_of(name)
    report = convert(golden("nemo_ckpt") / name, tmp_path / "out", "hf", f"--base={source}")
    assert (report["input_format"], report["output_format"], report["max_logit_difference"], report["tokens_equal"]) == ("nemo", "hf", 0.0, True)
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.keys() == expected.keys() and report["num_tensors"] == len(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key][: len(array)], array, err_msg=key)  # rows for <image> and <pad> come behind
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (golden("tokenizer") / "tiny160.model").read_bytes()


@pytest.mark.parametrize("name", CONVERTED)
def test_golden_hugging_face_to_nemo(name, tmp_path):
    key_format, tensor = re.search(r"_(mcore|legacy)_tp(\d+)", name).groups()
    tokenizer = golden("tokenizer") / "tiny160.model"
    convert(source_of(name), tmp_path / name, "nemo", f"--key_format={key_format}", f"--tensor_parallel={tensor}", f"--tokenizer={tokenizer}")
    found, expected = state_dicts(tmp_path / name), state_dicts(golden("nemo_ckpt") / name)
    assert found.keys() == expected.keys()
    for member, tensors in expected.items():
        assert found[member].keys() == tensors.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(found[member][key].numpy(), tensor.numpy(), err_msg=f"{member} {key}", strict=True)
    ours, theirs = model_config(tmp_path / name), model_config(golden("nemo_ckpt") / name)
    for field in NEEDED:
        assert ours[field] == theirs[field], field
    assert ours["override_vocab_size"] is None, "the tokenizer says the vocabulary"
    with tarfile.open(tmp_path / name) as tar:
        assert tar.extractfile("./" + ours["tokenizer"]["model"].removeprefix("nemo:")).read() == tokenizer.read_bytes()


NEEDED = re.findall(r"\w+", """
    target nemo_version precision mcore_gpt transformer_engine tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
    encoder_seq_length max_position_embeddings num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels normalization
    layernorm_epsilon activation bias position_embedding_type rotary_percentage rotary_base share_embeddings_and_output_weights make_vocab_size_divisible_by
    init_method_std megatron_amp_O2 hidden_dropout attention_dropout ffn_dropout apply_query_key_layer_scaling openai_gelu transformer_block_type headscale
    normalize_attention_scores attention_type
""")


@pytest.mark.parametrize("name", CONVERTED)
def test_golden_nemo_to_ours_and_to_other_ranks(name, tmp_path):
    convert(golden("nemo_ckpt") / name, tmp_path / "ours", "orbax")
    convert(tmp_path / "ours", tmp_path / "other.nemo", "nemo", "--tensor_parallel=2", "--pipeline_parallel=2", "--key_format=legacy")
    convert(tmp_path / "other.nemo", tmp_path / "again", "orbax")
    assert_same_weights(weights_of(tmp_path / "again"), weights_of(tmp_path / "ours"), 160)


def test_a_golden_directory_of_every_kind_comes_back(tmp_path):
    for name in ("llama_mha", "llama_gqa", "clip_vision", "llava"):
        source = golden("checkpoints") / name
        convert(source, tmp_path / name, "orbax")
        report = convert(tmp_path / name, tmp_path / f"{name}-hf", "hf", *([f"--tokenizer={golden('tokenizer') / 'tiny160.model'}"] * (name == "llava")))
        found, expected = load_file(tmp_path / f"{name}-hf" / "model.safetensors"), load_file(source / "model.safetensors")
        assert found.keys() == expected.keys() or name == "clip_vision"
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key if key in found else f"vision_model.{key}"][: len(array)], array, err_msg=key)
        assert report["tokens_equal"] is (None if name == "clip_vision" else True)


@pytest.mark.parametrize("name", ["llama_mha_mcore_tp1.nemo", "neva_llava_mcore_tp1.nemo"])
def test_a_nemo_of_other_ranks_is_whole(name, tmp_path):
    """Tokenizer, vocabulary and what is known of the tower travel, straight and through our own format; no path of this machine does."""
    convert(golden("nemo_ckpt") / name, tmp_path / "ours", "orbax")
    for source in (golden("nemo_ckpt") / name, tmp_path / "ours"):
        out = tmp_path / f"{source.name}-again.nemo"
        convert(source, out, "nemo", "--tensor_parallel=2")
        config = model_config(out)
        assert config["tokenizer"]["library"] == "sentencepiece" and "/tmp" not in json.dumps(config["tokenizer"])
        with tarfile.open(out) as tar:
            member = config["tokenizer"]["model"].removeprefix("nemo:")
            assert tar.extractfile(f"./{member}").read() == (golden("tokenizer") / "tiny160.model").read_bytes()
    if name.startswith("neva"):
        assert config["data"]["image_token_len"] == 16
        report = convert(out, tmp_path / "hf", "hf", f"--base={golden('checkpoints') / 'llava'}")
        assert report["tokens_equal"]


def test_the_original_llava(tmp_path, capfd):
    """Its tower lies elsewhere, under another name, or inside under a longer one; its config.json says little of it."""
    source = golden("checkpoints") / "llava"
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    renamed = {}
    for key, array in tensors.items():
        key = key.replace("language_model.model.", "model.").replace("language_model.lm_head", "lm_head")
        key = key.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        renamed[key.replace("vision_tower.vision_model", "model.vision_tower.vision_tower.vision_model")] = array
    top = config["text_config"] | {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit", "mm_hidden_size": 48}
    clip, out = tmp_path / "clip", tmp_path / "llava"
    for folder, said, part in ((clip, config["vision_config"], lambda name: "vision" in name), (out, top, lambda name: "vision" not in name)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(said))
        save_file({name.split("vision_tower.vision_tower.")[-1]: a for name, a in renamed.items() if part(name)}, folder / "model.safetensors")
    tokenizer = f"--tokenizer={golden('tokenizer') / 'tiny160.model'}"
    assert "it lies in 'openai/clip-vit', which is not here; give --base" in refused(capfd, out, tmp_path / "hf", "hf", tokenizer)
    convert(out, tmp_path / "hf", "hf", tokenizer, f"--base={clip}")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for key, array in tensors.items():
        np.testing.assert_array_equal(found[key][: len(array)], array, err_msg=key)
    convert(out, tmp_path / "neva.nemo", "nemo", tokenizer)
    expected = state_dicts(golden("nemo_ckpt") / "neva_llava_mcore_tp1.nemo")["./model_weights.ckpt"]
    found = state_dicts(tmp_path / "neva.nemo")["./model_weights.ckpt"]
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_tower_inside_a_nemo_says_its_own_sizes(tmp_path):
    """A file of NeMo's with a trained tower, which its config describes in part."""
    made = ours(tmp_path / "ours", **TOWER_OF_64)
    convert(made, tmp_path / "whole.nemo", "nemo", "--parts=llm,vision_encoder,projector")
    with tarfile.open(tmp_path / "whole.nemo") as tar, tarfile.open(tmp_path / "theirs.nemo", "w") as out:
        for member in tar.getmembers():
            content = tar.extractfile(member).read() if member.isfile() else b""
            if member.name.endswith("model_config.yaml"):
                config = yaml.safe_load(content)
                del config["neva_jax"]
                content = yaml.safe_dump(config).encode()
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    convert(tmp_path / "theirs.nemo", tmp_path / "again", "orbax")
    assert_same_weights(weights_of(tmp_path / "again"), weights_of(made), 320)


TOWER_OF_64 = {f"model.mm_cfg.vision_encoder.{name}": value for name, value in (("hidden_size", 64), ("num_attention_heads", 1), ("num_layers", 2))}


# ---- round trips -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_to_hugging_face_and_back(family, tmp_path):
    made = ours(tmp_path / "ours", **FAMILIES[family])
    report = convert(made, tmp_path / "hf", "hf")
    assert report["max_logit_difference"] == 0 and report["tokens_equal"]
    convert(tmp_path / "hf", tmp_path / "again", "orbax")
    before, after = (json.loads((path / "config.json").read_text())["model"] for path in (made, tmp_path / "again"))
    assert_same_weights(weights_of(tmp_path / "again"), weights_of(made), before["override_vocab_size"] or 320)
    for field in ("num_query_groups", "rotary_base", "scale_positional_embedding", "seq_len_interpolation_factor", "activation", "bias", "encoder_seq_length"):
        assert (after[field] or after["num_attention_heads"]) == (before[field] or before["num_attention_heads"]), field
    assert after["data"]["conv_template"] == before["data"]["conv_template"]
    assert after["mm_cfg"]["vision_encoder"]["vision_select_feature"] == before["mm_cfg"]["vision_encoder"]["vision_select_feature"]


@pytest.mark.parametrize("key_format", ["mcore", "legacy"])
@pytest.mark.parametrize("family", FAMILIES | NEMO_ONLY)
def test_ours_to_nemo_and_back(family, key_format, tmp_path):
    fields = FAMILIES.get(family) or NEMO_ONLY.get(family, {})
    made = ours(tmp_path / "ours", **fields)
    ranks = ["--tensor_parallel=2"] if family != "multi-query, other head width" else []
    convert(made, tmp_path / "m.nemo", "nemo", f"--key_format={key_format}", "--parts=llm,vision_encoder,projector", *ranks)
    convert(tmp_path / "m.nemo", tmp_path / "again", "orbax")
    before, after = (json.loads((path / "config.json").read_text())["model"] for path in (made, tmp_path / "again"))
    assert_same_weights(weights_of(tmp_path / "again"), weights_of(made), before["override_vocab_size"] or 320)
    assert after["override_vocab_size"] == before["override_vocab_size"]
    for field in fields:
        name = field.removeprefix("model.").split(".")
        found = after
        for key in name:
            found = found[key]
        assert found == fields[field], field


def test_an_export_of_ours_says_when_numbers_were_rounded(tmp_path):
    report = convert(ours(tmp_path / "ours"), tmp_path / "hf", "hf", "--dtype=bfloat16")
    assert 1e-4 < report["max_logit_difference"] < 1
    assert load_file(tmp_path / "hf" / "model.safetensors")["language_model.lm_head.weight"].dtype.name == "bfloat16"


def test_parts(tmp_path):
    made = ours(tmp_path / "ours", **FAMILIES["grouped"])
    convert(made, tmp_path / "llm", "hf", "--parts=llm")
    assert json.loads((tmp_path / "llm" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    convert(made, tmp_path / "tower", "hf", "--parts=vision_encoder")
    assert json.loads((tmp_path / "tower" / "config.json").read_text())["architectures"] == ["CLIPVisionModel"]
    convert(made, tmp_path / "stage1.nemo", "nemo", "--parts=projector")
    report = convert(tmp_path / "stage1.nemo", tmp_path / "whole", "orbax", f"--base={tmp_path / 'llm'}", f"--base={tmp_path / 'tower'}")
    assert report["parts"] == ["llm", "vision_encoder", "projector"]
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(made), 320)


def test_a_projector_alone(tmp_path):
    """LLaVA's mm_projector.bin, and what VILA calls its layers."""
    made = ours(tmp_path / "ours")
    weights = {path: array for path, array in weights_of(made).items() if path.startswith("projector/")}
    ends = (("weight", "kernel"), ("bias", "bias"))
    named = {f"{name}.{end}": torch.tensor(weights[f"projector/{name}/{kind}"].T).contiguous() for name in "02" for end, kind in ends}
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in named.items()}, tmp_path / "mm_projector.bin")
    save_file({f"layers.{name}": tensor.numpy() for name, tensor in named.items()}, tmp_path / "vila.safetensors")
    other = ours(tmp_path / "other", parts=("llm", "vision_encoder"), seed=1)
    for file in ("mm_projector.bin", "vila.safetensors"):
        out = tmp_path / f"{file}-out"
        report = convert(tmp_path / file, out, "orbax", f"--base={other}")
        assert report["input_format"] == "tensors"
        found = weights_of(out)
        for path, array in weights.items():
            np.testing.assert_array_equal(found[path], array, err_msg=path)
        np.testing.assert_array_equal(found["llm/norm/scale"], weights_of(other)["llm/norm/scale"])


# ---- runs --------------------------------------------------------------------------------------------------------------------------------------------


PROJECTOR_ALONE = {"model__optim__sched__warmup_steps": 0, "model__mm_cfg__llm__freeze": True, "model__mm_cfg__vision_encoder__freeze": True}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """-> a run that trained a projector alone, on a language model and a tower of Hugging Face's; and what it stands on."""
    directory = tmp_path_factory.mktemp("stage1")
    base = ours(directory / "base")
    convert(base, directory / "llm", "hf", "--parts=llm")
    convert(base, directory / "tower", "hf", "--parts=vision_encoder")
    runs.run(directory / "run", trainer__max_steps=2, **PROJECTOR_ALONE, model__mm_cfg__llm__from_pretrained=str(directory / "llm"),
             model__mm_cfg__vision_encoder__from_pretrained=str(directory / "tower"),
             exp_manager__checkpoint_callback_params__every_n_train_steps=1, exp_manager__checkpoint_callback_params__save_top_k=-1)  # fmt: skip
    return directory


def test_a_run_finds_what_it_stands_on(stage1, tmp_path):
    report = convert(stage1 / "run", tmp_path / "hf", "hf", "--verify")
    assert report["max_logit_difference"] == 0 and report["parts"] == ["llm", "vision_encoder", "projector"]
    found, base = load_file(tmp_path / "hf" / "model.safetensors"), load_file(stage1 / "llm" / "model.safetensors")
    np.testing.assert_array_equal(found["language_model.model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    trained = runs.saved(stage1 / "run", "trainable", 2)["projector/0/kernel"]
    np.testing.assert_array_equal(found["multi_modal_projector.linear_1.weight"], trained.T)
    convert(stage1 / "run" / "checkpoints" / "1", tmp_path / "first", "hf")
    first = load_file(tmp_path / "first" / "model.safetensors")["multi_modal_projector.linear_1.weight"]
    assert not np.array_equal(first, found["multi_modal_projector.linear_1.weight"])


def test_a_run_whose_base_was_moved(stage1, tmp_path, capfd):
    for name in ("llm", "run", "tower"):
        shutil.copytree(stage1 / name, tmp_path / name)
    recorded = json.loads((tmp_path / "run" / "base.json").read_text())
    for entry in recorded["published"]:
        entry["directory"] = str(tmp_path / "gone" / Path(entry["directory"]).name)
    (tmp_path / "run" / "base.json").write_text(json.dumps(recorded))
    bases = [f"--base={tmp_path / name}" for name in ("llm", "tower")]
    convert(tmp_path / "run", tmp_path / "a", "orbax", "--verify", *bases)
    assert "name where they are by --base" in refused(capfd, tmp_path / "run", tmp_path / "b", "orbax")
    assert "is not what they were" in refused(capfd, tmp_path / "run", tmp_path / "b", "orbax", bases[1])


def test_a_run_whose_base_has_changed(stage1, tmp_path, capfd):
    for name in ("llm", "run", "tower"):
        shutil.copytree(stage1 / name, tmp_path / name)
    recorded = json.loads((tmp_path / "run" / "base.json").read_text())
    for entry in recorded["published"]:
        entry["directory"] = str(tmp_path / Path(entry["directory"]).name)
    (tmp_path / "run" / "base.json").write_text(json.dumps(recorded))
    convert(tmp_path / "run", tmp_path / "a", "orbax", "--verify")
    file = tmp_path / "llm" / "model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1000] ^= 1  # between the blocks of the quick hash, if the file is large; small ones it sees whole
    file.write_bytes(bytes(whole))
    assert "gone or have changed" in refused(capfd, tmp_path / "run", tmp_path / "b", "orbax")
    recorded["published"] = [entry | {"digest": _digest(entry["directory"])} for entry in recorded["published"]]
    (tmp_path / "run" / "base.json").write_text(json.dumps(recorded))
    convert(tmp_path / "run", tmp_path / "c", "orbax")
    assert "no longer those that it was trained on" in refused(capfd, tmp_path / "run", tmp_path / "d", "orbax", "--verify")


def _digest(directory):
    from neva_jax.convert.weights import headers_digest

    return headers_digest(directory)


def test_training_starts_from_every_format(stage1, tmp_path):
    """The config's fields take a .nemo, a projector's file and a converted directory as they are, and the run that comes of them is converted again."""
    base = ours(tmp_path / "base", seed=5)
    convert(base, tmp_path / "all.nemo", "nemo", "--tensor_parallel=2", "--parts=llm,vision_encoder,projector")
    convert(base, tmp_path / "llm.nemo", "nemo", "--parts=llm")
    convert(base, tmp_path / "tower", "hf", "--parts=vision_encoder")
    convert(base, tmp_path / "hf", "hf")
    projector = {key.replace("multi_modal_projector.linear_1", "mm_projector.0").replace("multi_modal_projector.linear_2", "mm_projector.2"): torch.tensor(a)
                 for key, a in load_file(tmp_path / "hf" / "model.safetensors").items() if "projector" in key}  # fmt: skip
    torch.save(projector, tmp_path / "mm_projector.bin")
    starts = {
        "nemo": {"restore_from_path": str(tmp_path / "all.nemo")},
        "ours": {"model__restore_from_path": str(base)},
        "parts": {"model__mm_cfg__llm__from_pretrained": str(tmp_path / "llm.nemo"), "model__mm_cfg__vision_encoder__from_pretrained": str(tmp_path / "tower"),
                  "model__mm_cfg__pretrain_mm_mlp_adapter": str(tmp_path / "mm_projector.bin")},
        "exported": {"restore_from_path": str(tmp_path / "hf")},
    }  # fmt: skip
    weights = {}
    for name, fields in starts.items():
        runs.run(tmp_path / name, trainer__max_steps=1, **PROJECTOR_ALONE, **fields)
        convert(tmp_path / name, tmp_path / f"{name}-again", "orbax", "--verify")
        weights[name] = weights_of(tmp_path / f"{name}-again")
        frozen = [path for path in weights[name] if not path.startswith("projector/")]
        assert_same_weights({p: weights[name][p] for p in frozen}, {p: weights_of(base)[p] for p in frozen}, 320)
    for name in starts:  # they started alike, so one step took them to the same place
        np.testing.assert_array_equal(weights[name]["projector/0/kernel"], weights["nemo"]["projector/0/kernel"])
    assert json.loads((tmp_path / "nemo" / "base.json").read_text())["published"][0]["directory"] == str(tmp_path / "all.nemo")


# ---- bad input ---------------------------------------------------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["nemo", "bin", "directory", "metadata"])
def test_a_pickle_that_runs_code_runs_nothing(kind, tmp_path, capfd):
    canary, folder = tmp_path / "canary", tmp_path / "in"
    folder.mkdir()
    hostile = pickle.dumps({"model.embed_tokens.weight": Canary(canary)})
    (folder / "weights").write_bytes(hostile)
    source = golden("nemo_ckpt") / "llama_mha_mcore_tp1.nemo"
    if kind == "nemo":
        path = folder / "m.nemo"
        with tarfile.open(source) as tar, tarfile.open(path, "w") as out:
            out.addfile(tar.getmember("./model_config.yaml"), tar.extractfile("./model_config.yaml"))
            out.add(folder / "weights", "./model_weights.ckpt")
    elif kind == "metadata":
        path = folder / "unpacked"
        (path / "model_weights").mkdir(parents=True)
        with tarfile.open(source) as tar:
            (path / "model_config.yaml").write_bytes(tar.extractfile("./model_config.yaml").read())
        (path / "model_weights" / ".metadata").write_bytes(hostile)
        (path / "model_weights" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    else:
        path = folder / ("pytorch_model.bin" if kind == "directory" else "mm_projector.bin")
        path.write_bytes(hostile)
        if kind == "directory":
            shutil.copy(golden("checkpoints") / "llama_mha" / "config.json", folder)
            path = folder
    tokenizer = golden("tokenizer") / "tiny160.model"
    assert re.search("pickle|torch file|unpickled|metadata", refused(capfd, path, tmp_path / "out", "orbax", f"--tokenizer={tokenizer}"))
    assert not canary.exists()


def broken(directory, tmp_path, break_it) -> Path:
    copy = tmp_path / "broken"
    shutil.copytree(golden("checkpoints") / directory, copy)
    break_it(copy)
    return copy


def _config(**changes):
    def change(copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | changes))

    return change


def _tensors(change):
    def rewrite(copy):
        tensors = load_file(copy / "model.safetensors")
        change(tensors)
        save_file(tensors, copy / "model.safetensors")

    return rewrite


def _cut(copy):
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-100])


BROKEN = {  # directory, how, what the message says
    "truncated": ("llama_mha", _cut, "not a whole safetensors file"),
    "a missing shard": (
        "llama_mha",
        lambda copy: (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        "names the shard model-00001-of-00002.safetensors, which is not in the directory",
    ),
    "another shape": ("llama_mha", _config(intermediate_size=96), r"6 have another shape .*mlp.up_proj.weight \[128, 64\], the config makes it \[96, 64\]"),
    "a missing tensor": ("llama_mha", _tensors(lambda t: t.pop("model.norm.weight")), r"1 tensors are missing \(llm.norm.weight\)"),
    "a tensor too many": (
        "llama_mha", _tensors(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": t["model.norm.weight"]})),
        r"1 are not part of such a model \(llm.layers.0.self_attn.q_norm.weight\)",
    ),
    "two spellings": (
        "llama_mha", _tensors(lambda t: t.update({"language_model.model.norm.weight": t["model.norm.weight"]})), "two spellings of one weight",
    ),
    "another kind of model": ("llama_mha", _config(model_type="qwen2"), "language model of type 'qwen2'"),
    "code of its own": ("llama_mha", _config(model_type="custom", auto_map={"AutoModel": "modeling.Custom"}), "language model of type 'custom'"),
    "a projector without biases": ("llava", _config(multimodal_projector_bias=False), "multimodal_projector_bias False"),
    "features of two layers": ("llava", _config(vision_feature_layer=[-2, -1]), "vision_feature_layer"),
    "rows that no token has": ("llama_mha", _config(vocab_size=150), r"has the shape \[160, 64\], its config.json says vocab_size 150"),
    "a layer that is not there": ("llava", _config(vision_feature_layer=7), "vision_select_layer 7 does not exist in a tower of 3 layers"),
    "a strategy of its own": ("llava", _config(vision_feature_select_strategy="some"), "vision_feature_select_strategy some"),
    "a number in words": ("llama_mha", _config(vocab_size="many"), "config.json: a field is not of its usual kind|model.override_vocab_size is 'many'"),
    "no number": ("llama_mha", _config(hidden_size=None), "config.json: a field is not of its usual kind"),
    "no heads": ("llama_mha", _config(num_attention_heads=0), "config.json: a field is not of its usual kind"),
    "a rope of lists": ("llama_mha", _config(rope_scaling=[1]), "config.json: a field is not of its usual kind"),
    "too many layers": ("llama_mha", _config(num_hidden_layers=2 * 10**9), "model.num_layers is 2000000000, expected a number of layers, at most 1000"),
    "no JSON": ("llama_mha", lambda copy: (copy / "config.json").write_text("{"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories(case, tmp_path, capfd):
    directory, break_it, message = BROKEN[case]
    path = broken(directory, tmp_path, break_it)
    assert re.search(message, refused(capfd, path, tmp_path / "out", "nemo"))


FLAGS = {  # input, to, flags, what the message says
    "heads": ("llama_gqa", "nemo", ["--tensor_parallel=3"], "tensor_parallel 3 does not divide the 4 attention heads"),
    "groups": ("llama_gqa", "nemo", ["--tensor_parallel=4"], "does not divide the 2 key and value heads"),
    "layers": ("llama_gqa", "nemo", ["--pipeline_parallel=3"], "pipeline_parallel 3 does not divide the 2 layers"),
    "none": ("llama_gqa", "nemo", ["--tensor_parallel=0"], "tensor_parallel=0"),
    "ranks of a directory": ("llama_gqa", "hf", ["--tensor_parallel=2"], "--tensor_parallel goes with --to nemo"),
    "dtype": ("llama_gqa", "hf", ["--dtype=int8"], "--dtype 'int8' is not one of float32, float16, bfloat16"),
    "parts": ("llama_gqa", "hf", ["--parts=llm,head"], "--parts names head"),
    "a part that is not there": ("llama_gqa", "orbax", ["--parts=llm,projector"], "no weights of projector in it; give --base PATH"),
    "verify": ("llama_gqa", "orbax", ["--verify"], "--verify compares what a run of ours stands on"),
    "no such base": ("llama_gqa", "orbax", ["--base=nowhere"], "--base: there is no nowhere"),
    "another base": ("llava", "orbax", ["--base={checkpoints}/llama_gqa"], "ok"),
    "no such template": ("llava", "orbax", ["--conv_template=v9"], "model.data.conv_template is 'v9'"),
    "no such tokenizer": ("llava", "orbax", ["--tokenizer=nowhere.model"], "no file nowhere.model"),
    "to what": ("llava", "gguf", [], "--to"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_do_not_fit(case, tmp_path, capfd):
    name, to, flags, message = FLAGS[case]
    flags = [flag.format(checkpoints=golden("checkpoints")) for flag in flags]
    if message == "ok":  # what is not needed is not read
        convert(golden("checkpoints") / name, tmp_path / "out", to, *flags)
    else:
        assert message in refused(capfd, golden("checkpoints") / name, tmp_path / "out", to, *flags)


def test_an_output_that_exists(tmp_path, capfd):
    (tmp_path / "out").mkdir()
    assert "exists; remove it, or choose another name" in refused(capfd, golden("checkpoints") / "llava", tmp_path / "out", "orbax")


@pytest.mark.parametrize("to", ["orbax", "hf", "nemo"])
def test_a_disk_without_room(to, tmp_path, capfd, monkeypatch):
    """Asked before the first byte."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert re.search(r"needs \d\.\d\d GiB of disk", refused(capfd, golden("checkpoints") / "llama_mha", tmp_path / "out", to))


@pytest.mark.parametrize("to", ["orbax", "hf", "nemo"])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_numbers_that_are_none(value, to, tmp_path, capfd):
    path = broken("llama_mha", tmp_path, _tensors(lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), value)))
    assert "no finite numbers" in refused(capfd, path, tmp_path / "out", to, *(["--dtype=float16"] if value == 1e30 else []))


def test_what_ends_an_answer_is_kept(tmp_path):
    """Llama-3-Instruct's generation_config.json names more ends than its tokenizer."""
    path = broken("llama_mha", tmp_path, _config(eos_token_id=[2, 5]))
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    shutil.copy(golden("tokenizer") / "tiny160.model", path / "tokenizer.model")
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages[0].content }}"}')
    convert(path, tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 7]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


@pytest.mark.parametrize("to", ["orbax", "hf", "nemo"])
def test_interrupted(to, tmp_path, capfd, monkeypatch):
    from neva_jax.convert.weights import Tensor

    read, count = Tensor.read, [0]

    def interrupted(self):
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(Tensor, "read", interrupted)
    with pytest.raises(SystemExit) as end:
        argv = ["convert_torch.py", f"--input={golden('checkpoints') / 'llama_mha'}", f"--output={tmp_path / 'out'}", f"--to={to}"]
        cli.run(convert_torch.main, convert_torch.define_flags, argv, with_config=False)
    assert end.value.code == 130 and list(tmp_path.iterdir()) == [] and "interrupted: nothing was left of" in capfd.readouterr().err


def test_terminated(tmp_path):
    """A process that is told to end cleans up too. Slow, since it is a process of its own that has to start."""
    code = (
        "import os, signal, sys; sys.path.insert(0, '.'); import convert_torch; from neva_jax import cli; from neva_jax.convert.weights import Tensor\n"
        "read = Tensor.read\n"
        "Tensor.read = lambda self: os.kill(os.getpid(), signal.SIGTERM) or read(self)\n"
        "cli.run(convert_torch.main, convert_torch.define_flags, with_config=False)"
    )
    flags = [f"--input={golden('checkpoints') / 'llama_mha'}", f"--output={tmp_path / 'out'}", "--to=hf"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (done.returncode, list(tmp_path.iterdir())) == (130, []) and "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_help_shows_a_command_for_each_path():
    done = subprocess.run([sys.executable, "convert_torch.py", "--help"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0 and all(f"--to {to}" in done.stdout for to in ("hf", "nemo", "orbax"))
