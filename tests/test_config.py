"""The config: one table for every field, NeMo's defaults, references, what is refused and said, and the way to JSON and back. Types: test_cli.py."""

import json
import logging

import pytest
import yaml
from helpers import golden
from ml_collections import ConfigDict

from configs import base, finetune, llms, pretrain
from neva_jax import config as library
from neva_jax.errors import UserError
from neva_jax.fields import ARCHITECTURE, CHOICES, FOLLOWERS, HONOURED, INERT, REFUSED, RULES

TREE = library.leaves(base.get_config())
SOURCES = {  # follower: source
    "model.precision": "trainer.precision",
    "model.fp8_frozen_weights": "model.fp8",
    "model.max_position_embeddings": "model.encoder_seq_length",
    "model.data.conv_template": "model.mm_cfg.llm.model_type",
    "model.data.micro_batch_size": "model.micro_batch_size",
    "model.data.global_batch_size": "model.global_batch_size",
    "exp_manager.resume_from_checkpoint": "model.resume_from_checkpoint",
    "exp_manager.checkpoint_callback_params.model_parallel_size": "model.tensor_model_parallel_size",
}


def other(path: str, n: int = 1):
    """The n-th value of the field's type that is not its default."""
    kind, default, _ = library.schema()[path]
    values = {bool: not default, tuple: (7,) * n, str: "other" * n, object: "other" * n}
    return kind(default or 0) + n if kind in (int, float) else values[kind]


def changed_config(**changes):
    """The config of stage 1, and changes with __ for the dots."""
    config = pretrain.get_config()
    for path, value in changes.items():
        library.assign(config, path.replace("__", "."), value)
    return config.lock()


def refusal(path: str, value) -> str:
    with pytest.raises(UserError) as error:
        library.check(changed_config(**{path: value}))
    return str(error.value)


# ---- the tree ----------------------------------------------------------------------------------------------------------------------------------------


def test_every_field_stands_in_exactly_one_table():
    for path in TREE:
        assert sum(path in table for table in (HONOURED, INERT, REFUSED)) == 1, path
    for table in (HONOURED, INERT, REFUSED, FOLLOWERS, ARCHITECTURE, CHOICES, RULES):
        assert table - TREE.keys() == set() if isinstance(table, set) else table.keys() <= TREE.keys()
    assert ARCHITECTURE | CHOICES.keys() | RULES.keys() <= HONOURED


def test_types_can_be_overridden():
    assert {leaf.kind for leaf in library.schema().values()} == {bool, int, float, str, tuple, object}  # no list, no NoneType
    assert not any(isinstance(value, list) for value in TREE.values())


def test_followers_follow_and_do_not_lead():
    product = "exp_manager.checkpoint_callback_params.model_parallel_size"
    assert SOURCES.keys() == FOLLOWERS
    config = base.get_config()
    for path in sorted(TREE, key=FOLLOWERS.__contains__):  # one field after the other, the followers at last
        before = library.leaves(config)
        library.assign(config, path, not before[path] if isinstance(before[path], bool) else other(path, 2 if path in FOLLOWERS else 1))
        moved = {p for p, v in library.leaves(config).items() if v != before[p]}
        behind = {follower for follower, source in SOURCES.items() if source == path} | ({product} if path == "model.pipeline_model_parallel_size" else set())
        assert moved == {path} | behind


def yaml_leaves(name: str) -> dict:
    tree = yaml.safe_load(golden(f"yaml/{name}.yaml").read_text())
    multiply = "${multiply:${model.tensor_model_parallel_size}, ${model.pipeline_model_parallel_size}}"
    flat = {path: 1 if value == multiply else value for path, value in library.leaves(tree).items()}

    def resolve(path, value):
        if not (isinstance(value, str) and value.startswith("${")):
            return value
        target = value[2:-1]
        target = path.rpartition(".")[0] + target if target.startswith(".") else target
        return resolve(target, flat[target])

    return {path: resolve(path, value) for path, value in flat.items()}


def test_defaults_are_those_of_nemo():
    found = yaml_leaves("neva_config_v2.0.0")
    assert found.pop("model.energon.data")["splits"]  # without fixed keys; one leaf here, null
    for path, value in found.items():
        assert library.coerce(path, value) == TREE[path], path
    assert len(found) > 150


@pytest.mark.parametrize(
    "name", ["neva_finetune_v2.0.0", "neva_peft_v2.0.0", "llava_config_v2.0.0", "neva_config_v1.23.0", "neva_peft_v1.23.0", "neva_config_23.08"]
)
def test_fields_of_other_nemo_files_are_known(name):
    for path, value in yaml_leaves(name).items():
        library.coerce(path, value)


# ---- what is refused and what is said ------------------------------------------------------------------------------------------------------------------


def test_what_passes_says_nothing(caplog):
    for size in llms.LLMS:
        library.check(pretrain.get_config(size).lock())
    for size in ("llama2_7b", "llama2_13b", "vicuna_7b", "tiny"):
        library.check(finetune.get_config(size).lock())
    assert not caplog.records


def test_refused_fields_raise():
    for path, sentence in REFUSED.items():
        message = refusal(path, other(path))
        assert message.startswith(f"{path} is {other(path)!r}, but {sentence}") and message.endswith(repr(TREE[path]))


def test_inert_fields_warn_once(caplog):
    library.check(changed_config(**{path: other(path, 2) for path in INERT}))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(INERT)
    said = {record.args[0]: record.getMessage() for record in caplog.records}
    assert all(f"{path} is {other(path, 2)!r}, which does nothing here: {reason}" == said[path] for path, reason in INERT.items())


def test_choices_and_ranges_are_checked():
    for path in CHOICES:
        message = refusal(path, "nonsense")
        assert message.startswith(f"{path} is 'nonsense', expected one of ") and str(CHOICES[path][-1]) in message
    for path in RULES:
        if library.schema()[path].kind in (int, float):
            assert refusal(path, -7 if library.schema()[path].kind is int else -0.5).startswith(f"{path} is -")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("trainer.precision", "16-mixed", "fp16 needs a loss scaler"),
        ("trainer.precision", 16, "bf16-mixed, 32"),
        ("trainer.devices", (0, 1), "CUDA_VISIBLE_DEVICES"),
        ("trainer.devices", 0, "-1 for all"),
        ("trainer.limit_val_batches", 1.5, "a share such as 0.5"),
        ("trainer.max_steps", -1, "never end"),
        ("trainer.num_nodes", 0, "more than 0"),
        ("model.optim.sched.cycle", True, "set it to False"),
        ("model.optim.name", "lamb", "one of fused_adam"),
        ("model.precision", 32, "set trainer.precision alone"),
        ("model.data.conv_template", "llama_4", "one of plain, v1, llama_2, llama_3"),
        ("model.data.validation", 1.5, "a share of the records"),
        ("model.data.buckets", (512, 256), "growing numbers"),
        ("model.mm_cfg.mm_mlp_adapter_type", "mlp0x_gelu", "mlp2x_gelu"),
        ("model.mm_cfg.vision_encoder.crop_size", (224, 336), "(224, 224)"),
        ("model.optim.betas", (0.9,), "(0.9, 0.95)"),
        ("model.optim.lr", 1e-6, "at most model.optim.lr 1e-06"),
        ("model.optim.sched.warmup_ratio", 0.1, "the other to null"),
        ("model.num_query_groups", 5, "does not divide model.num_attention_heads 32"),
        ("model.num_attention_heads", 24, "set model.kv_channels"),
        ("model.tensor_model_parallel_size", 3, "does not divide model.num_attention_heads 32"),
        ("model.tensor_model_parallel_size", 2, "does not divide the 1 devices"),
        ("model.rotary_percentage", 0.01, "expected an even number"),
        ("model.activations_checkpoint_granularity", "full", "uniform or block"),
        ("model.trainable", (("^llm/", 1.0),), "rows (path pattern"),
    ],
)
def test_wrong_values_are_refused(path, value, words):
    message = refusal(path, value)
    assert words in message and path.rpartition(".")[2] in message and "\n" not in message


def test_epochs_alone_do_not_say_the_length_of_the_schedule():
    config = changed_config(trainer__max_steps=-1, trainer__max_epochs=2)
    with pytest.raises(UserError, match="set model.optim.sched.max_steps"):
        library.check(config)
    config.model.optim.sched.max_steps = 100
    library.check(config)


def test_right_values_pass():
    changes = {"trainer.devices": "auto", "trainer.precision": "32", "model.data.validation": 0.01, "model.data.buckets": [512, 1024]}
    changes |= {
        "model.mm_cfg.mm_mlp_adapter_type": "mlp_downsample_rowmajor",
        "model.trainable": [["^projector/", 1.0, None]],
        "trainer.limit_val_batches": 0.5,
    }
    config = changed_config(**changes)
    library.check(config)
    assert (config.model.precision, config.model.data.buckets, config.model.trainable) == (32, (512, 1024), (("^projector/", 1.0, None),))


def test_llama_with_half_rotation_is_warned_about(caplog):
    library.check(changed_config(model__rotary_percentage=0.5))
    assert "need 1.0" in caplog.text


def test_batches_must_fit_the_devices():
    message = refusal("trainer.devices", 3)
    assert "16 x data parallel size 3" in message and "96 or 144 would do" in message
    message = refusal("model.global_batch_size", 24)
    assert "model.global_batch_size 16 or 32 would do, or model.micro_batch_size 1, 2, 3, 4, 6, 8, 12 or 24" in message
    assert library.check_parallel(changed_config(model__tensor_model_parallel_size=2), 8) == 4
    with pytest.raises(UserError, match="fsdp_parallel_size is 3, .* 1, 2, 4 or 8 would do"):
        library.check_parallel(changed_config(model__fsdp_parallel_size=3), 8)


def test_fields_that_are_not_there():
    config = pretrain.get_config()
    config.model.micro_batchsize = 8
    with pytest.raises(UserError, match="model.micro_batchsize is not a field of the config; did you mean model.micro_batch_size"):
        library.check(config)
    config = pretrain.get_config()
    config.model.optim = ConfigDict({"lr": 1e-3})
    with pytest.raises(UserError, match="lacks model.optim.betas, .* and more"):
        library.check(config)


# ---- comparing and saving ----------------------------------------------------------------------------------------------------------------------------


def test_changed_does_not_count_what_only_follows():
    config = changed_config(trainer__precision=32, model__data__micro_batch_size=2)
    found = library.changed(config)
    assert found["trainer.precision"] == 32 and found["model.data.micro_batch_size"] == 2
    assert "model.precision" not in found and "model.data.global_batch_size" not in found


def test_json_and_back():
    config = changed_config(model__trainable=(("^llm/", 0.1, None),), model__encoder_seq_length=2048, model__num_query_groups=8)
    saved = json.loads(json.dumps(library.to_json(config)))
    again = library.from_json(saved)
    library.check(again)
    assert library.leaves(again) == library.leaves(config)
    again.model.encoder_seq_length = 64
    assert again.model.max_position_embeddings == 64 and again.model.data.conv_template == "plain"
    with pytest.raises(UserError, match="model.colour is not a field"):
        library.from_json({"model": {"colour": 1}})


def test_another_architecture_is_named_field_by_field():
    saved = json.loads(json.dumps(library.architecture(changed_config())))
    library.compare_architecture(saved, library.architecture(changed_config(model__num_query_groups=32, model__kv_channels=128, model__activation="swiglu")))
    library.compare_architecture(saved, library.architecture(changed_config(model__optim__lr=1e-2)))
    with pytest.raises(UserError, match=r"model\.hidden_size was 4096 and is 5120; .*model\.num_layers was 32 and is 40"):
        library.compare_architecture(saved, library.architecture(pretrain.get_config("llama2_13b")))


# ---- recipes -----------------------------------------------------------------------------------------------------------------------------------------


def numbers(config) -> tuple:
    model, sched = config.model, config.model.optim.sched
    batch = (model.micro_batch_size, model.global_batch_size, config.trainer.max_steps)
    return (*batch, model.optim.lr, sched.min_lr, sched.warmup_steps, model.mm_cfg.llm.freeze, model.data.conv_template)


def test_recipes_have_the_documented_numbers():
    assert numbers(pretrain.get_config()) == (16, 128, 4650, 2e-3, 2e-5, 140, True, "plain")
    assert numbers(finetune.get_config()) == (4, 32, 4900, 2e-5, 2e-7, 200, False, "llama_2")
    assert numbers(finetune.get_config("vicuna_13b"))[-1] == "v1"
    for recipe in (pretrain, finetune):
        config = recipe.get_config("llama3_8b")
        model = config.model
        assert (model.optim.name, model.optim.betas, model.optim.sched.name, model.mm_cfg.vision_encoder.freeze) == (
            "fused_adam",
            (0.9, 0.95),
            "CosineAnnealing",
            True,
        )
        assert (model.num_layers, model.ffn_hidden_size, model.num_query_groups, model.rotary_base) == (32, 14336, 8, 500000)
        assert model.max_position_embeddings == 8192 and model.mm_cfg.llm.model_type == "llama_3"


def test_nvgpt_keeps_its_own_shape_and_leaves_nothing_behind():
    config = finetune.get_config("nvgpt_2b")
    assert (config.model.normalization, config.model.rotary_percentage, config.model.data.conv_template) == ("layernorm1p", 0.5, "nvgpt")
    llms.set_llm(config, "llama2_7b")
    assert library.leaves(config) == library.leaves(finetune.get_config("llama2_7b"))
    with pytest.raises(UserError, match="no language model 'llama9'; known are llama2_7b, .*tiny"):
        llms.set_llm(config, "llama9")
