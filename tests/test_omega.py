"""What OmegaConf's dialect of YAML says: references that go on following, the environment, spellings of values, and one clear error for each wrong file."""

import pytest

from configs import nemo_yaml
from neva_jax import config as library
from neva_jax.errors import UserError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in {"MBS": "32", "TP": "4", "DATASET_DIR": "/data"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def load(tmp_path):
    """A function: text of a YAML file -> its config."""

    def load(text: str | bytes):
        path = tmp_path / "neva.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return nemo_yaml.get_config(str(path))

    return load


# ---- references --------------------------------------------------------------------------------------------------------------------------------------

REFERENCES = """
name: neva
base_dir: /runs            # of no field: it serves the references
trainer: {devices: 2, max_steps: 1e3, precision: "${model.precision}"}
exp_manager: {name: "${name}", exp_dir: "${base_dir}/${.name}-${model.num_layers}", version: "${.name}"}
model:
  precision: "${model.data.num_workers}"
  num_layers: 4
  encoder_seq_length: ${multiply:${.num_layers}, ${sum:${trainer.devices},6}}
  max_position_embeddings: ${.encoder_seq_length}
  micro_batch_size: ${model.num_layers}
  data: {num_workers: 32, data_path: ["${base_dir}/a.json", "$HERE/${...num_layers}.json"], image_folder: "${oc.env:NOWHERE,/images}"}
  optim: {sched: {warmup_steps: "${...num_layers}", min_lr: 1e-5}, lr: "1e-3", betas: [9e-1, 95e-2]}
"""


def test_references_follow_what_is_set_later(load, monkeypatch):
    monkeypatch.setenv("HERE", "/here")
    config = load(REFERENCES)
    model, manager = config.model, config.exp_manager
    assert (model.encoder_seq_length, model.max_position_embeddings, model.optim.sched.warmup_steps, config.trainer.max_steps) == (32, 32, 4, 1000)
    assert (manager.name, manager.version, manager.exp_dir) == ("neva", "neva", "/runs/neva-4")
    assert model.data.data_path == ("/runs/a.json", "/here/4.json") and model.data.image_folder == "/images"
    assert (model.optim.betas, model.optim.lr, config.trainer.precision) == ((0.9, 0.95), 1e-3, 32)
    library.assign(config, "model.num_layers", "8")
    assert (model.encoder_seq_length, model.max_position_embeddings, model.optim.sched.warmup_steps, manager.exp_dir) == (64, 64, 8, "/runs/neva-8")
    assert model.data.data_path == ("/runs/a.json", "/here/8.json")
    assert (model.micro_batch_size, model.data.micro_batch_size) == (8, 8)  # the second follows the first though the file does not say so
    config.name = "other"
    assert (manager.name, manager.version, manager.exp_dir) == ("other", "other", "/runs/other-8")
    manager.name = "mine"
    assert (config.name, manager.version, manager.exp_dir) == ("other", "mine", "/runs/mine-8")
    library.assign(config, "model.encoder_seq_length", "128")
    assert (model.max_position_embeddings, model.num_layers) == (128, 8)
    saved = library.to_json(config)
    assert saved["model"]["optim"]["sched"]["warmup_steps"] == 8 and library.leaves(library.from_json(saved)) == library.leaves(config)
    config.lock()
    library.check(config)


def test_files_of_nemos_launcher(load, monkeypatch):
    monkeypatch.setenv("base_results_dir", "/results")
    text = "run: {name: neva, results_dir: '${base_results_dir}/${.name}', time_limit: 1-00:00:00}\ntrainer: {precision: 32}\n"
    text += "exp_manager: {explicit_log_dir: '${fine_tuning.run.results_dir}/x'}\nmodel: {precision: '${fine_tuning.trainer.precision}', micro_batch_size: 2}"
    config = load(text)
    assert (config.exp_manager.explicit_log_dir, config.model.precision) == ("/results/neva/x", 32)
    library.assign(config, "trainer.precision", "bf16")
    assert config.model.precision == "bf16"


def test_a_null_in_a_text_is_null(load):
    assert load("exp_manager: {explicit_log_dir: '/runs/${model.data.image_folder}'}\nmodel: {data: {image_folder: null}}").exp_manager.explicit_log_dir is None
    assert load("run: {a: null}\nexp_manager: {explicit_log_dir: '/runs/${run.a}'}").exp_manager.explicit_log_dir is None


def test_environment_in_all_spellings(load):
    text = "model: {seed: '${oc.env:MBS}', num_layers: '${env:TP,3}', hidden_size: \"${oc.env:NONE,'64'}\", data: {cache_dir: '$DATASET_DIR/$', image_folder: "
    config = load(text + "'${oc.env:NONE, null}'}}")
    model = config.model
    assert (model.seed, model.num_layers, model.hidden_size, model.data.cache_dir, model.data.image_folder) == (32, 4, 64, "/data/$", None)


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("trainer: {max_steps: 1e3}", "trainer.max_steps", 1000),
        ("trainer: {max_steps: '1e3'}", "trainer.max_steps", 1000),
        ("trainer: {max_steps: 4650.0}", "trainer.max_steps", 4650),
        ("trainer: {gradient_clip_val: 1}", "trainer.gradient_clip_val", 1.0),
        ("trainer: {gradient_clip_val: null}", "trainer.gradient_clip_val", None),
        ("trainer: {precision: '32'}", "trainer.precision", 32),
        ("trainer: {precision: bf16-mixed}", "model.precision", "bf16-mixed"),
        ("trainer: {val_check_interval: 0.5}", "trainer.val_check_interval", 0.5),
        ("model: {bias: 'True'}", "model.bias", True),
        ("model: {layernorm_epsilon: 1e-5}", "model.layernorm_epsilon", 1e-5),
        ("model: {tokenizer: {model: ''}}", "model.tokenizer.model", None),
        ("model: {data: {data_path: }}", "model.data.data_path", None),
        ("model: {data: {data_path: [a.json, b.json]}}", "model.data.data_path", ("a.json", "b.json")),
        ("model: {data: null, seed: 3}", "model.data.conv_template", "llama_2"),
        ("exp_manager: {version: 2024-01-02}", "exp_manager.version", "2024-01-02"),
        ("run: &d {lr: 1e-3}\nmodel: {optim: {<<: *d, name: adam}}", "model.optim.lr", 1e-3),
        ("trainer: {replace_sampler_ddp: True}", "trainer.use_distributed_sampler", True),
        ("model: {restore_from_pretrained: a.nemo}", "model.restore_from_path", "a.nemo"),
        ("model: {mm_cfg: {model_type: v1}}", "model.data.conv_template", "v1"),
        ("model: {data: {crop_size: [336, 336]}}", "model.mm_cfg.vision_encoder.crop_size", (336, 336)),
        ("model: {data: {crop_size: null}}", "model.mm_cfg.vision_encoder.crop_size", (224, 224)),
        ("model: {data: {crop_size: [1, 1]}, mm_cfg: {vision_encoder: {crop_size: [336, 336]}}}", "model.mm_cfg.vision_encoder.crop_size", (336, 336)),
        ("model: {posistion_embedding_type: rope, position_embedding_type: rope, restore_from_pretrained: null}", "model.position_embedding_type", "rope"),
        ("model: {window_size: [4096, 0]}", "model.window_size", (4096, 0)),
    ],
)
def test_values_and_older_names(load, text, path, value):
    found = load(text)[path]
    assert found == value and type(found) is type(value)


# ---- errors ------------------------------------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGE_BOMB = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))

WRONG = {
    "a list": ("- a", r"neva.yaml holds a list, expected a mapping"),
    "nothing": ("", r"holds a NoneType"),
    "two documents": ("name: a\n---\nname: b", r"line 2: not YAML: but found another document"),
    "not YAML": ("name: [a\nmodel: b", r"line 2: not YAML: "),
    "bytes": (b"\x80\x81\x00", r"neva.yaml: not YAML that a config can be"),
    "a picture's length": ("# " + "x" * (1 << 20), r"more than 1048576 bytes"),
    "deep": ("[" * 5000, r"not YAML that a config can be: RecursionError"),
    "python": ("name: !!python/object/apply:os.system [ls]", r"line 1: the tag !!python/object/apply:os.system is not read"),
    "a set": ("a: 1\nname: !!set {a, b}", r"line 2: the tag !!set is not read"),
    "own tag": ("name: !mine a", r"the tag !mine is not read"),
    "a wrong number": ("name: !!int many", r"ValueError"),
    "twice": ("name: a\nmodel:\n  seed: 1\n  bias: true\n  seed: 2", r"line 3: seed is given twice"),
    "bomb": (BOMB, r"unfolds into more than 20000 values"),
    "merge bomb": (MERGE_BOMB, r"unfolds into more than 20000 values"),
    "contains itself": ("model: &m {mm_cfg: *m}", r"unfolds into more than 20000 values"),
    "a circle": (
        "name: ${exp_manager.name}\nexp_manager: {name: '${.version}', version: '${name}'}",
        r"name refers to itself: name -> exp_manager\.name -> exp_manager\.version -> name",
    ),
    "itself": ("name: a ${name}", r"name refers to itself: name -> name"),
    "a circle in text": ("run: {a: '${.b}', b: 'x${.a}'}\nname: ${run.a}", r"run\.a -> run\.b -> run\.a"),
    "nowhere": ("name: ${model.colour}", r"name refers to \$\{model\.colour\}, and the file has no model\.colour"),
    "nowhere, relative": ("exp_manager: {name: '${..colour}'}", r"the file has no colour"),
    "out of the file": ("exp_manager: {name: '${......name}'}", r"exp_manager\.name refers to"),
    "below a value": ("exp_manager: {name: '${name.first}'}\nname: a", r"the file has no name\.first"),
    "a section": ("name: ${model}\nmodel: {seed: 1}", r"\$\{model\}, which is a section; name one of its fields: seed"),
    "not in the environment": ("name: ${COLOUR}\nmodel: {seed: $OF_SKY}", r"the environment lacks COLOUR \(name\), OF_SKY \(model\.seed\); set each"),
    "open": ("name: ${a", r"name is '\$\{a', which holds a \$\{\.\.\.\} that cannot be read"),
    "open resolver": ("name: ${multiply:1,2", r"cannot be read"),
    "nested name": ("name: ${a.${b}}", r"cannot be read"),
    "resolver": ("name: ${now:%Y}", r"name: \$\{now:\.\.\.\} cannot be read; known are multiply"),
    "too much to multiply": ("name: ${multiply:1,2,3}", r"\$\{multiply:\.\.\.\} cannot be read"),
    "multiplied text": ("model: {seed: '${multiply:a,2}'}", r"model\.seed: \$\{multiply:\.\.\.\} takes numbers, found 'a'"),
    "inference": ("inference: {greedy: true}", r"file for asking a trained model"),
    "a model alone": ("mm_cfg: {}\nprecision: bf16", r"the `model` section alone"),
    "misspelt": ("model: {micro_batchsize: 1}", r"model\.micro_batchsize is not a field of NeVA; did you mean model\.micro_batch_size"),
    "several": ("model: {colour: 1, taste: 2}\nsound: 3", r"model\.colour is not a field of NeVA, nor are model\.taste, sound"),
    "misspelt section": ("modell: {seed: 1}", r"modell\.seed is not a field of NeVA; did you mean model\.seed"),
    "a dotted key": ("model.seed: 1", r"the key 'model\.seed' has a dot"),
    "a value for a section": ("model: {optim: adam}", r"model\.optim is 'adam', expected a mapping"),
    "both names": ("model: {restore_from_pretrained: a, restore_from_path: b}", r"restore_from_pretrained is an older name of model\.restore_from_path"),
    "a wrong type": ("model: {num_layers: 1.5}", r"neva\.yaml: model\.num_layers is 1\.5, expected a whole number"),
    "null": ("model: {num_layers: null}", r"model\.num_layers is None, expected a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(load, name):
    text, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        load(text)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(("path", "message"), [("", "no YAML file is named"), ("none.yaml", "none.yaml: no such file"), (".", "is a directory")])
def test_files_that_are_not_there(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        nemo_yaml.get_config(path)


def test_a_late_value_of_the_wrong_type_is_named(load):
    config = load("name: a\nmodel: {precision: bf16, data: {num_workers: '${multiply:${..seed},2}', cache_dir: '${..seed}'}, seed: 3}")
    assert (config.model.data.num_workers, config.model.data.cache_dir) == (6, "3")
    config = load("model: {tokenizer: {model: a.model}, data: {num_workers: '${model.tokenizer.type}'}}".replace("model: a.model", "type: 4"))
    library.assign(config, "model.tokenizer.type", "many")
    with pytest.raises(UserError, match="model.data.num_workers is 'many', expected a whole number"):
        library.check(config)
