"""The recipes start on small Hugging Face weights given by path: stage 1 on a CLIP and a Llama, stage 2 on the run of stage 1 and on a LLaVA."""

import json
import re

import jax
import numpy as np
import pytest
from helpers import randomise
from runs import assert_same, logged, run, saved

import train
from configs import finetune, peft, pretrain, quickstart
from configs.quickstart import DIGITS
from neva_jax import config as library
from neva_jax.build.export_lora import to_peft
from neva_jax.build.opened import open_model
from neva_jax.convert import hf
from neva_jax.errors import UserError
from neva_jax.transforms.lora import is_adapter

SIZES = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "micro_batch_size": 2,
    "global_batch_size": 4, "encoder_seq_length": 256, "mm_cfg.vision_encoder.crop_size": (32, 32), "mm_cfg.vision_encoder.hidden_size": 24,
    "tokenizer.model": str(DIGITS / "tokenizer.model"), "data.image_folder": str(DIGITS / "images.tar"), "data.data_path": str(DIGITS / "pretrain.json"),
    "data.num_workers": 0, "optim.sched.warmup_steps": 1, "data.buckets": (128,), "mm_cfg.vision_encoder.patch_dim": 8,
}  # fmt: skip


def recipe(directory, config, **changes):
    for name, value in SIZES.items():
        library.assign(config, f"model.{name}", value)
    fields = {"exp_manager.explicit_log_dir": str(directory), "trainer.max_steps": 3, "trainer.log_every_n_steps": 1, "trainer.precision": "32"}
    for path, value in (fields | {name.replace("__", "."): value for name, value in changes.items()}).items():
        library.assign(config, path, value)
    config.lock()
    library.check(config)
    return train.main(config)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Directories clip, llama and llava, as transformers writes them."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("weights")
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=8
    )
    text = transformers.LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5
    )
    randomise(transformers.CLIPVisionModel(vision)).save_pretrained(directory / "clip")
    randomise(transformers.LlamaForCausalLM(text), 1).save_pretrained(directory / "llama")
    llava = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=383)
    randomise(transformers.LlavaForConditionalGeneration(llava), 2).save_pretrained(directory / "llava")
    return directory


def test_both_stages(tmp_path, weights):
    towers = {"model__mm_cfg__llm__from_pretrained": str(weights / "llama"), "model__mm_cfg__vision_encoder__from_pretrained": str(weights / "clip")}
    recipe(tmp_path / "one", pretrain.get_config(), **towers)
    assert len(logged(tmp_path / "one")) == 3
    assert {path.split("/")[0] for path in saved(tmp_path / "one", "trainable")} == {"projector"}
    assert not (tmp_path / "one" / "base").exists(), "published weights stay where they are"
    recipe(tmp_path / "one", pretrain.get_config(), trainer__max_steps=5, **towers)  # resumes from base.json alone
    train_json = {"model__data__data_path": str(DIGITS / "train.json"), "model__data__conv_template": "v1", "model__data__max_media": 2}
    recipe(tmp_path / "two", finetune.get_config(), restore_from_path=str(tmp_path / "one"), **train_json)
    trained = saved(tmp_path / "two", "trainable")
    assert {path.split("/")[0] for path in trained} == {"projector", "llm"}
    tensors = hf.open_tensors(weights / "llama")
    start = tensors["llm.layers.1.mlp.up_proj.weight"].read().T
    assert 0 < np.abs(trained["llm/layers/mlp/up_proj/kernel"][1] - start).max() < 1e-3, "the language model began where its weights were"


def test_a_llava_directory(tmp_path, weights):
    settings = {"restore_from_path": str(weights / "llava"), "model__mm_cfg__mm_mlp_adapter_type": "mlp2x_gelu", "trainer__max_steps": 2}
    recipe(tmp_path, pretrain.get_config(), **settings)
    start = hf.open_tensors(weights / "llava")["projector.linear_1.weight"].read().T
    assert 0 < np.abs(saved(tmp_path, "trainable")["projector/0/kernel"] - start).max() < 0.1


def test_adapters_on_a_llava_directory(tmp_path, weights):
    """The recipe on published weights, what it leaves in peft's form, and the recipe again from there; published weights are never copied."""
    settings = {"restore_from_path": str(weights / "llava"), "model__mm_cfg__mm_mlp_adapter_type": "mlp2x_gelu", "trainer__max_steps": 2}
    settings |= {"model__peft__lora_tuning__adapter_dim": 4, "model__data__conv_template": "v1"}
    recipe(tmp_path / "one", peft.get_config(), **settings)
    trained = saved(tmp_path / "one", "trainable")
    assert {path.split("/")[0] for path in trained} == {"projector", "llm"} and all(is_adapter(path) for path in trained if path.startswith("llm/"))
    assert not (tmp_path / "one" / "base").exists()
    start = hf.open_tensors(weights / "llava")["projector.linear_1.weight"].read().T
    assert 0 < np.abs(trained["projector/0/kernel"] - start).max() < 1e-4, "at a tenth of the learning rate"
    to_peft(open_model(tmp_path / "one"), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(weights / "llava")
    again = {"model__peft__restore_from_path": str(tmp_path / "adapter"), "model__peft__lora_tuning__variant": "canonical", "model__optim__lr": 0.0}
    recipe(tmp_path / "two", peft.get_config(), **settings | again, model__optim__sched__min_lr=0.0)
    second = saved(tmp_path / "two", "trainable")
    for name in "qkv":
        np.testing.assert_array_equal(second[f"llm/layers/self_attn/{name}_proj/lora_B"], trained[f"llm/layers/self_attn/{name}_proj/lora_B"])
        np.testing.assert_array_equal(second[f"llm/layers/self_attn/{name}_proj/lora_A"], trained["llm/layers/self_attn/k_proj/lora_A"])
    np.testing.assert_array_equal(second["projector/0/kernel"], trained["projector/0/kernel"])


def test_other_sizes_than_the_weights_are_named_with_the_flags_that_would_do(tmp_path, weights):
    towers = {"model__mm_cfg__llm__from_pretrained": str(weights / "llama"), "model__mm_cfg__vision_encoder__from_pretrained": str(weights / "clip")}
    with pytest.raises(UserError) as error:
        recipe(tmp_path, pretrain.get_config(), model__ffn_hidden_size=64, **towers)
    assert "model.ffn_hidden_size is 64, the weights have 48" in str(error.value)
    assert re.search(r"--config\.model\.ffn_hidden_size=48", str(error.value))
    with pytest.raises(UserError, match=r"crop_size is 40, the tower has 32"):
        settings = {"model__mm_cfg__vision_encoder__from_pretrained": str(weights / "clip"), "model__mm_cfg__vision_encoder__crop_size": (40, 40)}
        recipe(tmp_path, pretrain.get_config(), **settings)


def test_bf16_keeps_fp32_masters(tmp_path, weights):
    settings = {"restore_from_path": str(weights / "llava"), "model__mm_cfg__mm_mlp_adapter_type": "mlp2x_gelu", "trainer__precision": "bf16"}
    recipe(tmp_path, pretrain.get_config(), **settings)
    assert all(array.dtype == np.float32 for array in saved(tmp_path, "trainable").values())
    assert all(np.isfinite(loss) for _, loss in logged(tmp_path, "reduced_train_loss"))


def test_the_same_seed_gives_the_same_start(tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, trainer__max_steps=3)
    assert logged(tmp_path / "a", "reduced_train_loss", "grad_norm") == logged(tmp_path / "b", "reduced_train_loss", "grad_norm")
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), saved(tmp_path / "a", "trainable"), saved(tmp_path / "b", "trainable")))


def test_the_quickstarts_stages_follow_one_another(tmp_path, monkeypatch):
    """Three steps each; what the stages reach when they run whole is in the README."""
    monkeypatch.chdir(tmp_path)
    for stage in ("towers", "pretrain", "finetune", "peft"):
        config = quickstart.get_config(stage)
        for path, value in {"trainer.max_steps": 3, "model.optim.sched.warmup_steps": 1, "trainer.limit_val_batches": 1, "evaluation.questions": None}.items():
            library.assign(config, path, value)
        library.check(config)
        train.main(config.lock())
    runs = tmp_path / "nemo_experiments"
    towers, projector = saved(runs / "quickstart_towers", "trainable"), saved(runs / "quickstart_pretrain", "trainable")
    assert projector.keys() == {path for path in towers if path.startswith("projector/")}
    assert np.abs(projector["projector/0/kernel"] - towers["projector/0/kernel"]).max() > 1e-3, "a new projector, not the towers' own"
    assert_same(saved(runs / "quickstart_pretrain", "base"), {path: array for path, array in towers.items() if not path.startswith("projector/")})
    assert {path.split("/")[0] for path in saved(runs / "quickstart_finetune", "trainable")} == {"projector", "llm"}
    assert all(is_adapter(path) for path in saved(runs / "quickstart_peft", "trainable"))
    with pytest.raises(UserError, match="no stage 'finetuning'"):
        quickstart.get_config("finetuning")


@pytest.mark.large
def test_adapters_reach_what_finetuning_reaches(tmp_path, monkeypatch):
    """The four stages whole, some ten minutes on two cores: LoRA has 95 % of full finetuning's gain with under a tenth of its trained weights."""
    monkeypatch.chdir(tmp_path)
    accuracy, trained = {}, {}
    for stage in ("towers", "pretrain", "finetune", "peft"):
        config = quickstart.get_config(stage)
        library.check(config)
        accuracy[stage] = train.main(config.lock())["accuracy"]
        trained[stage] = sum(array.size for array in saved(tmp_path / "nemo_experiments" / f"quickstart_{stage}", "trainable").values())
    start = train.main(_asked_only(quickstart.get_config("peft")))["accuracy"]
    assert accuracy["peft"] - start >= 0.95 * (accuracy["finetune"] - start) and trained["peft"] < 0.1 * trained["finetune"], (accuracy, start, trained)


def _asked_only(config):
    """A step of no length: the questions are asked of the weights that it starts from."""
    values = {"model.optim.lr": 0.0, "model.optim.sched.min_lr": 0.0, "model.optim.sched.warmup_steps": 0, "trainer.max_steps": 1, "exp_manager.name": "start"}
    for path, value in values.items():
        library.assign(config, path, value)
    library.check(config)
    return config.lock()
