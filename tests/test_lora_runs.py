"""Runs that train adapters: what moves and what does not, what a checkpoint holds, resuming, starting from adapters, and every wrong way to ask."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from runs import assert_same, logged, run, run_until_stopped, saved, steps_of, tiny

from configs import peft, quickstart
from neva_jax import config as library
from neva_jax.build.export_lora import to_nemo
from neva_jax.build.model import build_model, neva_config
from neva_jax.build.opened import open_model
from neva_jax.build.run import build_mesh
from neva_jax.build.trained import trainable_rows
from neva_jax.errors import UserError
from neva_jax.transforms.lora import is_adapter
from neva_jax.transforms.select import Row

pytestmark = pytest.mark.peft
TUNING = "model__peft__lora_tuning__"
LORA = {
    "model__peft__peft_scheme": "lora", f"{TUNING}adapter_dim": 2, f"{TUNING}target_modules": ("attention_qkv", "mlp_fc2"),
    "model__mm_cfg__llm__freeze": True, "model__mm_cfg__vision_encoder__freeze": True, "model__num_layers": 2,
}  # fmt: skip
ONE = {"trainer__max_steps": 1, "model__optim__sched__warmup_steps": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that trained everything."""
    directory = tmp_path_factory.mktemp("base")
    run(directory, trainer__max_steps=3, model__num_layers=2)
    return directory


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Six steps of adapters on it, which is then somewhere else."""
    directory = tmp_path_factory.mktemp("lora")
    run(directory, restore_from_path=str(base), **LORA)
    return directory


def test_only_adapters_and_the_projector_move(base, trained):
    before, stands_on, after = saved(base, "trainable"), saved(trained, "base"), saved(trained, "trainable")
    assert after.keys() == {path for path in before if path.startswith("projector/")} | {path for path in after if is_adapter(path)}
    assert len([path for path in after if is_adapter(path)]) == 1 + 3 + 2
    assert_same(stands_on, {path: array for path, array in before.items() if not path.startswith("projector/")})
    assert all(np.any(after[path] != before[path]) for path in after if path in before)
    assert all(np.any(after[path]) for path in after if path.endswith("lora_B"))


def test_the_optimizer_knows_nothing_else(trained):
    moments = [path for path in saved(trained, "optimizer") if "/mu/" in path]
    assert {path.split("/mu/")[1] for path in moments} == saved(trained, "trainable").keys()


def test_the_first_step_is_the_bases(base, tmp_path):
    """The loss that a full finetuning sees first, to the bit: adapters are born as nothing."""
    run(tmp_path / "lora", **ONE, restore_from_path=str(base), **LORA)
    run(tmp_path / "full", **ONE, restore_from_path=str(base), model__num_layers=2)
    assert logged(tmp_path / "lora", "reduced_train_loss") == logged(tmp_path / "full", "reduced_train_loss")


@pytest.mark.parametrize("changes", [
    {f"{TUNING}adapter_dropout": 0.2, "model__micro_batch_size": 2},
    {f"{TUNING}variant": "canonical", f"{TUNING}layer_selection": (2,), "model__fp8": True},
], ids=["dropout, accumulation", "canonical, one layer, FP8"])  # fmt: skip
def test_resume_is_exact(base, tmp_path, monkeypatch, changes):
    settings = LORA | {"restore_from_path": str(base)} | changes
    run(tmp_path / "whole", **settings)
    assert run_until_stopped(monkeypatch, tmp_path / "parts", after=2, **settings) == 143
    assert 2 <= steps_of(tmp_path / "parts")[-1] < 6
    run(tmp_path / "parts", **settings)
    for item in ("trainable", "optimizer"):
        assert_same(saved(tmp_path / "parts", item), saved(tmp_path / "whole", item))
    names = ("reduced_train_loss", "grad_norm")
    assert logged(tmp_path / "parts", *names) == logged(tmp_path / "whole", *names)
    if f"{TUNING}layer_selection" in changes:
        adapters = {path: array for path, array in saved(tmp_path / "whole", "trainable").items() if is_adapter(path)}
        assert all(np.any(array[1]) and not np.any(array[0]) for array in adapters.values())
        assert_same(saved(tmp_path / "whole", "base"), {p: a for p, a in saved(base, "trainable").items() if not p.startswith("projector/")})


def test_dropout_drops_in_training_alone(base, tmp_path):
    """Other losses than without, another every step (the same batch is shown twice), and a validation that drops nothing."""
    settings = LORA | {"restore_from_path": str(base), "trainer__max_steps": 3, "model__peft__projector_lr_factor": 0.0, "model__optim__lr": 0.0}
    settings |= {"model__optim__sched__min_lr": 0.0, f"{TUNING}row_init_method": "normal", "trainer__val_check_interval": 3}
    plain, dropping = tmp_path / "plain", tmp_path / "dropping"
    run(plain, **settings)
    run(dropping, **settings, **{f"{TUNING}adapter_dropout": 0.5})
    assert logged(plain, "reduced_train_loss") != logged(dropping, "reduced_train_loss")
    validated = [json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"] for directory in (plain, dropping)]
    assert validated[0] == validated[1]


def test_a_run_starts_from_adapters(base, trained, tmp_path, caplog):
    """Of another run: weights alone, and only on the base that they were trained on."""
    settings = LORA | {"model__peft__restore_from_path": str(trained)} | ONE
    run(tmp_path / "on", restore_from_path=str(base), **settings, model__optim__lr=0.0, model__optim__sched__min_lr=0.0)
    assert_same(saved(tmp_path / "on", "trainable"), saved(trained, "trainable"))
    other = tmp_path / "other"
    run(other, **ONE, model__num_layers=2, model__seed=5)
    with pytest.raises(UserError, match=r"another base: the checksum of llm/layers/\S+ was \w{12}, that of the base of this run is \w{12} \(shape \["):
        run(tmp_path / "off", restore_from_path=str(other), **settings)
    with pytest.raises(UserError, match=r"other adapters: model\.peft\.lora_tuning\.adapter_dim is 3, the adapters have 2; .*add --config\.model\.peft"):
        run(tmp_path / "rank", restore_from_path=str(base), **settings | {f"{TUNING}adapter_dim": 3})
    with pytest.raises(UserError, match=r"another base: theirs were weights, and those of this run start random; give them by restore_from_path"):
        run(tmp_path / "random", **settings)
    to_nemo(open_model(trained), tmp_path / "adapter.nemo")
    with pytest.raises(UserError, match=r"adapter\.nemo: was trained for another base"):
        run(tmp_path / "file", **settings | {"model__peft__restore_from_path": str(tmp_path / "adapter.nemo"), "restore_from_path": str(other)})
    with pytest.raises(UserError, match=r"restore_from_path: \S+lora\d has other adapters: model\.peft\.lora_tuning\.alpha is 8\.0, the adapters have 2\.0"):
        run(tmp_path / "alpha", restore_from_path=str(trained), **LORA | ONE | {f"{TUNING}alpha": 8.0})
    with pytest.raises(UserError, match=r"holds LoRA adapters too; merge them"):
        run(tmp_path / "two", restore_from_path=str(trained), **settings)
    with pytest.raises(UserError, match=r"holds another projector than model\.mm_cfg\.mm_mlp_adapter_type linear \(projector/0"):
        run(tmp_path / "linear", restore_from_path=str(base), **settings | {"model__mm_cfg__mm_mlp_adapter_type": "linear"})
    with pytest.raises(UserError, match="holds no LoRA adapters"):
        run(tmp_path / "none", restore_from_path=str(base), **settings | {"model__peft__restore_from_path": str(base)})
    with pytest.raises(UserError, match=r"model\.peft\.restore_from_path: there is no nowhere"):
        run(tmp_path / "missing", restore_from_path=str(base), **settings | {"model__peft__restore_from_path": "nowhere"})


def test_adapters_are_never_dropped_in_silence(trained, tmp_path):
    with pytest.raises(UserError, match=r"weights of LoRA adapters that this config does not ask for .*--merge_lora"):
        run(tmp_path, **ONE, restore_from_path=str(trained), model__num_layers=2)


def test_a_run_goes_on_from_a_run_with_adapters(trained, tmp_path):
    run(tmp_path, **ONE, restore_from_path=str(trained), **LORA, model__optim__lr=0.0, model__optim__sched__min_lr=0.0)
    assert_same(saved(tmp_path, "trainable"), saved(trained, "trainable"))


def test_it_needs_a_base(tmp_path):
    with pytest.raises(UserError, match=r"frozen without weights: llm \(set model\.mm_cfg\.llm\.from_pretrained\).*or all of it by restore_from_path"):
        run(tmp_path, **LORA, model__mm_cfg__allow_random_frozen=False)


@pytest.mark.parametrize(("changes", "told"), [
    ({f"{TUNING}alpha": 4.0}, r"model\.peft\.lora_tuning\.alpha was 2\.0 and is 4\.0"),
    ({f"{TUNING}target_modules": ("all",)}, r"target_modules was \['attention_qkv', 'mlp_fc2'\] and is \['all'\]"),
    ({"model__peft__peft_scheme": None}, r"model\.peft\.peft_scheme was 'lora' and is None"),
])  # fmt: skip
def test_resuming_with_other_adapters_is_refused(base, trained, tmp_path, changes, told):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match=told):
        run(tmp_path / "run", restore_from_path=str(base), **LORA | changes)


BAD = [
    ({f"{TUNING}adapter_dim": 0}, r"adapter_dim is 0, expected more than 0"),
    ({f"{TUNING}adapter_dim": 17}, r"down_proj is a matrix of 32 x 16, .*rank 17; set .*adapter_dim to at most 16, or leave down_proj out"),
    ({f"{TUNING}alpha": 0.0}, r"alpha is 0\.0, expected more than 0"),
    ({f"{TUNING}target_modules": ("attention_qkv", "lm_head")}, r"is \('attention_qkv', 'lm_head'\), expected names among attention_qkv, .*down_proj"),
    ({f"{TUNING}target_modules": ()}, "expected names among"),
    ({f"{TUNING}layer_selection": (3,)}, r"layer_selection names layer 3 of 2"),
    ({f"{TUNING}layer_selection": (0,)}, "the lowest being 1"),
    ({f"{TUNING}layer_selection": (1, 1)}, "the lowest being 1"),
    ({f"{TUNING}adapter_dropout": 1.0}, "a share from 0 to below 1"),
    ({f"{TUNING}dropout_position": "middle"}, "expected one of pre, post"),
    ({f"{TUNING}column_init_method": "orthogonal"}, "expected one of xavier, normal, kaiming, zero"),
    ({f"{TUNING}column_init_method": "zero"}, "both zero, from where no gradient leads away"),
    ({f"{TUNING}variant": "unfused"}, "expected one of nemo, canonical"),
    ({f"{TUNING}weight_tying": True}, "weight_tying is True, but every layer has adapters of its own"),
    ({"model__peft__peft_scheme": "ptuning"}, r"peft_scheme is 'ptuning', expected one of None, lora; ptuning, ia3, adapter"),
    ({"model__peft__peft_scheme": "qlora"}, r"served by lora with model\.fp8=True and model\.fp8_frozen_weights=True"),
    ({"model__peft__projector_lr_factor": -0.1}, "expected 0 or more"),
    ({"model__mm_cfg__llm__freeze": False}, r"peft_scheme is lora and model\.mm_cfg\.llm\.freeze False"),
    ({"model__mm_cfg__vision_encoder__freeze": False}, r"peft_scheme is lora and model\.mm_cfg\.vision_encoder\.freeze False"),
    ({"model__trainable": (("^projector/", 1.0, None),)}, r"model\.trainable leaves out 6 weights of the adapters"),
    ({f"{TUNING}adapter_dropout": 0.1, "trainer__devices": 2, "model__pipeline_model_parallel_size": 2}, "the micro-batches of a round would drop the same"),
]


@pytest.mark.parametrize(("changes", "told"), BAD, ids=[" ".join(f"{name.split('__')[-1]}={value}" for name, value in changes.items()) for changes, _ in BAD])
def test_bad_input(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        run(tmp_path, **LORA | changes)


def test_what_trains_is_the_table(tmp_path):
    config = tiny(tmp_path, **LORA, model__peft__projector_lr_factor=0.25)
    assert trainable_rows(config) == [Row(r"/lora_[AB]$"), Row("^projector/", 0.25)]
    table = (("lora_B$", 2.0, None), ("lora_A$", 1.0, 0.1))
    model = build_model(tiny(tmp_path, **LORA, model__trainable=table), neva_config(config, 300), build_mesh(config))
    assert {path.rsplit("/", 1)[1]: (row.lr_factor, row.weight_decay) for path, row in model.rows.items()} == {"lora_A": (1.0, 0.1), "lora_B": (2.0, None)}


def test_fields_that_do_nothing_say_so(tmp_path, caplog):
    tiny(tmp_path, **{f"{TUNING}adapter_dim": 8})
    assert "model.peft.lora_tuning.adapter_dim is 8, which does nothing here: read only with peft_scheme" in caplog.text
    caplog.clear()
    tiny(tmp_path, **LORA, **{f"{TUNING}dropout_position": "pre"})
    assert "model.peft.lora_tuning.dropout_position is 'pre', which does nothing here: read only with adapter_dropout" in caplog.text


def test_recipes():
    """NeMo's numbers, and the digits' with under a tenth of the weights that a full finetuning trains there."""
    config = peft.get_config()
    tuning = config.model.peft.lora_tuning
    assert (config.model.peft.peft_scheme, tuning.adapter_dim, tuning.alpha, tuning.target_modules) == ("lora", 32, None, ("attention_qkv",))
    assert (config.model.peft.projector_lr_factor, config.model.optim.lr, config.trainer.max_steps) == (0.1, 2e-4, 4900)
    library.check(config)
    assert peft.get_config("quickstart").model == quickstart.get_config("peft").model

    def trained(stage: str) -> int:
        config = quickstart.get_config(stage)
        config.restore_from_path = None
        library.check(config)
        model = build_model(config, neva_config(config, 512), build_mesh(config))
        return sum(math.prod(model.weights[path].shape) for path in model.rows)

    assert trained("peft") < 0.1 * trained("finetune")


def test_an_opened_run_is_its_merged_model(trained):
    """And what it is made of is still there."""
    opened = open_model(trained)
    assert opened.lora is not None and set(opened.adapters) == {f"llm/layers/{path}/kernel" for path in (
        "self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "mlp/down_proj"
    )}  # fmt: skip
    merged, weights = opened.merged().arrays(), saved(trained, "trainable")
    kernel = saved(trained, "base")["llm/layers/self_attn/v_proj/kernel"]
    expected = kernel + np.matmul(weights["llm/layers/self_attn/k_proj/lora_A"], weights["llm/layers/self_attn/v_proj/lora_B"])
    np.testing.assert_allclose(np.asarray(merged["llm/layers/self_attn/v_proj/kernel"]), expected, rtol=1e-6, atol=1e-6)
    assert not any(map(is_adapter, merged)) and opened.merged().config.model.peft.peft_scheme is None
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = opened.merged().load({path: jax.ShapeDtypeStruct(array.shape, np.float32, sharding=place) for path, array in merged.items()})
    assert_same({path: np.asarray(array) for path, array in loaded.items()}, {path: np.asarray(array, np.float32) for path, array in merged.items()})
