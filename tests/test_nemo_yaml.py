"""NeMo's YAML files as configs: equal to the Python config, value by value from the file, references that go on following, and one clear error for the rest."""

import json
import logging
import re

import pytest
import yaml
from helpers import ROOT, golden
from PIL import Image

from configs import base, finetune, nemo_yaml, pretrain
from neva_jax import cli, inspect_data
from neva_jax import config as library
from neva_jax.errors import UserError

CLUSTER = {
    "WORLD_SIZE": "2", "ENABLE_CKPT": "True", "MAX_STEPS": "2170", "RESULTS_DIR": "/results", "TP": "4", "PP": "1", "MBS": "32", "GBS": "512",
    "PRETRAINED_LLM_PATH": "/llm", "PRETRAINED_VISION_ENCODER_PATH": "openai/clip-vit-large-patch14-336", "DATASET_DIR": "/data",
}  # fmt: skip
SCITIX = "scitix_neva_llama2_7b_chat_bf16_hydra"
FILES = [f"{name}_{version}" for name in ("neva_config", "neva_finetune", "neva_peft", "llava_config") for version in ("v1.23.0", "v2.0.0")]
FILES += ["neva_config_23.08", SCITIX]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in CLUSTER.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def load(tmp_path):
    """A function: text of a YAML file -> its config."""

    def load(text: str | bytes):
        path = tmp_path / "neva.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return nemo_yaml.get_config(str(path))

    return load


def of_file(name: str):
    return nemo_yaml.get_config(str(golden(f"yaml/{name}.yaml")))


# ---- NeMo's files ------------------------------------------------------------------------------------------------------------------------------------


OVERRIDES = {
    "trainer.precision": "32", "model.encoder_seq_length": "2048", "model.micro_batch_size": "8", "model.global_batch_size": "64",
    "model.tensor_model_parallel_size": "2", "model.mm_cfg.llm.model_type": "v1", "model.resume_from_checkpoint": "a.ckpt", "model.optim.lr": "1e-4",
    "model.data.data_path": "a.json", "name": "run", "model.mm_cfg.vision_encoder.crop_size": "(336, 336)", "model.energon.data": "{'a': 1}",
}  # fmt: skip


def test_the_default_file_is_the_default_config():
    ours, theirs = base.get_config(), of_file("neva_config_v2.0.0")  # energon.data: the example in NeMo's file is null here
    assert library.leaves(theirs) == library.leaves(ours) and library.changed(theirs) == {}
    for path, value in OVERRIDES.items():
        for config in (ours, theirs):
            library.assign(config, path, value)
        assert library.leaves(theirs) == library.leaves(ours), path
    assert theirs.model.max_position_embeddings == 2048 and theirs.exp_manager.checkpoint_callback_params.model_parallel_size == 2
    assert [type(value) for value in library.leaves(theirs).values()] == [type(value) for value in library.leaves(ours).values()]


def written(name: str) -> dict[str, object]:
    """{path: value} as the file has it, resolved in another way than the loader's: texts are substituted from the innermost ${...} outwards."""
    flat = library.leaves(yaml.safe_load(golden(f"yaml/{name}.yaml").read_text()))

    def resolve(path, value):
        while isinstance(value, str) and (found := re.search(r"\$\{([^${}]*)\}", value)):
            inside = found[1]
            if inside.startswith("multiply:"):
                a, b = inside.removeprefix("multiply:").split(",")
                new = int(a) * int(b)
            elif inside in CLUSTER:
                new = CLUSTER[inside]
            else:
                target = f"{path.rpartition('.')[0]}{inside}" if inside.startswith(".") else inside
                new = resolve(target, flat[target])
            value = new if value == found[0] else value.replace(found[0], str(new))
        return value

    return {path: resolve(path, value) for path, value in flat.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_value_of_a_file_arrives(name):
    config, values = of_file(name), written(name)
    found = library.leaves(config)
    for path in [path for path in values if path.startswith("run.") or path == "model.energon.data"]:
        values.pop(path)  # the launcher's section; an example that nothing reads
    for path, value in values.items():
        assert found[path] == library.coerce(path, value) and type(found[path]) is type(library.coerce(path, value)), path
    absent = library.leaves(base.get_config())
    followers = {"model.data.micro_batch_size": "model.micro_batch_size", "model.data.global_batch_size": "model.global_batch_size"}
    for path in found.keys() - values.keys():
        assert found[path] == (found[followers[path]] if path in followers else absent[path]), path
    assert len(values) > 150


def test_the_finetuning_file_has_the_numbers_of_the_recipe():
    file, recipe = library.leaves(of_file("neva_finetune_v2.0.0")), library.leaves(finetune.get_config("nvgpt_2b"))
    different = {path: (file[path], recipe[path]) for path in file if file[path] != recipe[path]}
    assert different == {  # NeMo's file names another library of tokenizers; what is written at the end of a training is inert
        "model.tokenizer.library": ("megatron", "sentencepiece"),
        "model.tokenizer.type": ("GPT2BPETokenizer", None),
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": (False, True),
    }


def test_the_cluster_file_reads_the_environment(monkeypatch):
    config = of_file(SCITIX)
    assert config.exp_manager.explicit_log_dir == "/results/neva_llama2_7b_chat/results"
    assert (config.trainer.num_nodes, config.model.global_batch_size, config.trainer.enable_checkpointing) == (2, 512, True)
    assert config.model.tokenizer.model == "/llm/tokenizer_neva.model" and config.model.data.data_path == "/data/blip_laion_cc_sbu_558k.json"
    library.check(config)
    for name in CLUSTER:
        monkeypatch.delenv(name)
    with pytest.raises(UserError) as error:
        of_file(SCITIX)
    assert all(f"{name} (" in str(error.value) for name in CLUSTER) and "MBS (model.micro_batch_size)" in str(error.value)
    monkeypatch.setenv("MBS", "many")
    for name in CLUSTER.keys() - {"MBS"}:
        monkeypatch.setenv(name, CLUSTER[name])
    with pytest.raises(UserError, match="model.micro_batch_size is 'many', expected a whole number"):
        of_file(SCITIX)


@pytest.mark.parametrize("version", ["v1.23.0", "v2.0.0"])
def test_a_file_for_inference_is_not_a_training(version):
    with pytest.raises(UserError, match=rf"neva_inference_{version}.yaml is NeMo's file for asking a trained model .*such as neva_config.yaml"):
        of_file(f"neva_inference_{version}")


def test_the_commands_read_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save("images/a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "0", "image": "a.png", "conversations": turns}]))
    (tmp_path / "neva_config.yaml").write_text(golden("yaml/neva_config_v2.0.0.yaml").read_text())
    set_here = {"data.data_path": "chat.json", "data.image_folder": "images", "tokenizer.model": golden("tokenizer/llama2_neva.model")}
    arguments = [f"--config.model.{path}={value}" for path, value in set_here.items()]
    with pytest.raises(SystemExit) as stop:
        cli.run(
            inspect_data.main,
            inspect_data.define_flags,
            ["inspect_data", "--config", f"{ROOT}/configs/nemo_yaml.py:neva_config.yaml", *arguments, "--show=2", "--json"],
        )
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and "warning" not in err
    (record,) = json.loads(out)["records"]
    assert (record["error"], record["num_media"]) == (None, 1) and record["text"].endswith("What? [/INST] Nothing. </s>")


# ---- what is said ------------------------------------------------------------------------------------------------------------------------------------


def said(caplog, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


def test_what_becomes_of_the_fields_is_said(load, caplog, capsys):
    caplog.set_level(logging.INFO)
    text = "run: {name: a, time_limit: 1}\ntrainer: {devices: 2, logger: true, accumulate_grad_batches: 1}\n"
    config = load(text + "model: {fp8_interval: 2, peft: {peft_scheme: ia3}, optim: {name: lamb, lr: 2e-3}}")
    assert said(caplog) == [
        "neva.yaml: 2 honoured, 1 inert, 3 refused, 1 at the only value that can be done (neva_jax/fields.py lists all)",
        "  honoured and not the default: trainer.devices 2",
        "  inert: run.name, run.time_limit: the cluster's launcher reads it",
        "  refused as they stand: model.fp8_interval, model.optim.name, model.peft.peft_scheme",
    ]
    with pytest.raises(UserError) as error:
        library.check(config)
    message = str(error.value)
    assert message.startswith("3 fields cannot be done: (1) model.fp8_interval is 2, but scales ")
    assert "; set it to 1; (2) model.optim.name is 'lamb', expected one of fused_adam" in message
    assert "; (3) model.peft.peft_scheme is 'ia3', expected one of None, lora; ptuning, ia3, " in message
    for path, value in (("model.fp8_interval", 1), ("model.peft.peft_scheme", "lora"), ("model.optim.name", "adam")):
        library.assign(config, path, value)
    caplog.clear()
    library.check(config)
    assert said(caplog) == ["trainer.logger is True, which does nothing here: belongs to PyTorch Lightning; loggers and checkpoints are under exp_manager"]
    assert not capsys.readouterr().out


def test_what_hydra_reads_is_left_out(load, caplog):
    config = load("defaults: [_self_, other]\nhydra: {run: {dir: '${now:%Y}'}}\nname: a")
    assert config.name == "a" and sorted(said(caplog, logging.WARNING)) == [
        "neva.yaml: defaults ['_self_', 'other'] is Hydra's and is left out; what it would compose must be in the file",
        "neva.yaml: hydra {'run': {'dir': '${now:%Y}'}} is Hydra's and is left out; what it would compose must be in the file",
    ]


ROTARY, HALF, CROP = "model.rotary_percentage is 0.5, beside", "half NVGPT", "whose name says 336 pixels"
PIECES = {"model.tokenizer.library": "sentencepiece", "model.tokenizer.model": "a.model"}
TOWER = {"model.mm_cfg.vision_encoder.from_pretrained": "openai/clip-vit-large-patch14-336"}


@pytest.mark.parametrize(
    ("name", "changes", "traps"),
    [
        ("neva_config_v2.0.0", PIECES, []),
        ("neva_config_23.08", {"trainer.devices": 2}, [ROTARY]),
        ("neva_config_23.08", {"trainer.devices": 2, "model.rotary_percentage": 1}, []),
        ("neva_finetune_v2.0.0", {}, []),
        ("neva_finetune_v2.0.0", PIECES, [ROTARY, HALF]),
        ("neva_finetune_v1.23.0", {"model.mm_cfg.llm.model_type": "llama_2"}, [ROTARY, HALF]),
        ("neva_finetune_v1.23.0", {"model.data.conv_template": "v1", "model.rotary_percentage": 1}, [HALF]),
        ("neva_finetune_v1.23.0", {"model.normalization": "rmsnorm"}, [ROTARY, HALF]),
        ("neva_config_v1.23.0", {"model.normalization": "layernorm1p"}, [HALF]),
        ("neva_config_v1.23.0", TOWER, [CROP]),
        ("neva_config_v1.23.0", {**TOWER, "model.data.crop_size": "(336, 336)"}, [CROP]),  # set late: only the file's is taken for the tower's
        ("llava_config_v2.0.0", {}, []),
    ],
)
def test_traps(name, changes, traps, caplog):
    config = of_file(name)
    for path, value in changes.items():
        library.assign(config, path, value)
    library.check(config)
    found = [message for message in said(caplog, logging.WARNING) if "does nothing here" not in message]
    assert len(found) == len(traps) and all(trap in message for trap, message in zip(traps, found, strict=True)), found


def test_python_configs_are_warned_of_traps_too(caplog):
    config = pretrain.get_config("nvgpt_2b")
    library.check(config)
    assert not caplog.records
    config.model.data.conv_template = "llama_2"
    library.check(config)
    assert [ROTARY in said(caplog)[0], HALF in said(caplog)[1]] == [True, True]


def test_a_follower_is_not_named_beside_its_source(load):
    with pytest.raises(UserError, match=r"^trainer\.precision is 16, expected one of bf16"):
        library.check(load("trainer: {precision: 16}\nmodel: {precision: '${trainer.precision}'}"))
