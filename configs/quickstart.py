"""A small NeVA from scratch on two CPU cores, on real scanned digits (examples/digits), and what it answers about digits it has never seen.

    python train.py --config configs/quickstart.py

Ends with the exact match on 1,061 held-out questions (at least 95 %) and a sheet of answers in nemo_experiments/quickstart/answers.png.

The true two-stage recipe on the same data, each stage from the run of the one before: towers that have learnt to see and to speak together, then frozen
towers and a new projector alone, both on captions, then the language model too, on questions:

    python train.py --config configs/quickstart.py:towers
    python train.py --config configs/quickstart.py:pretrain
    python train.py --config configs/quickstart.py:finetune

and in the place of the last, with a tenth of its weights trained (LoRA):

    python train.py --config configs/quickstart.py:peft
"""

from pathlib import Path

from configs import base
from neva_jax.errors import UserError

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"


STAGES = {  # name: steps
    "all": 1200,
    "towers": 200,
    "pretrain": 300,
    "finetune": 600,
    "peft": 600,
}


def get_config(stage: str = "all"):
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}; known are {', '.join(STAGES)}")
    config = base.get_config()
    model, mm = config.model, config.model.mm_cfg
    config.name = config.exp_manager.name = "quickstart" if stage == "all" else f"quickstart_{stage}"
    config.exp_manager.checkpoint_callback_params.save_top_k = 1
    config.trainer.update({"precision": "32", "max_steps": STAGES[stage], "log_every_n_steps": 50, "val_check_interval": 250})

    # the model: 0.43 million weights in the language model, 0.36 in the tower
    model.update({"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "encoder_seq_length": 256})
    model.update({"init_method_std": 0.08, "use_scaled_init_method": False})
    vision = {"patch_dim": 16, "crop_size": (32, 32), "hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 256}
    mm.vision_encoder.update({**vision, "vision_select_layer": -1, "freeze": stage in ("pretrain", "finetune", "peft")})
    mm.mm_mlp_adapter_type = "mlp2x_gelu"
    mm.llm.update({"freeze": stage in ("pretrain", "peft"), "model_type": "v1"})
    model.tokenizer.model = str(DIGITS / "tokenizer.model")

    # where weights come from
    runs = Path("nemo_experiments")
    if stage == "pretrain":
        mm.llm.from_pretrained = mm.vision_encoder.from_pretrained = str(runs / "quickstart_towers")
    elif stage in ("finetune", "peft"):
        config.restore_from_path = str(runs / "quickstart_pretrain")

    # the data
    captions = stage in ("towers", "pretrain")
    name, test = ("pretrain", "pretrain_test") if captions else ("train", "test")
    model.micro_batch_size = model.global_batch_size = 32
    model.data.update({"data_path": str(DIGITS / f"{name}.json"), "validation": str(DIGITS / f"{test}.json"), "image_folder": str(DIGITS / "images.tar")})
    model.data.update({"num_workers": 0, "max_media": 2, "buckets": (32,) if captions else (112,)})
    model.data.conv_template = "plain" if captions else "v1"
    config.evaluation.questions = str(DIGITS / f"{test}.json")

    model.optim.update({"lr": 1.5e-3, "weight_decay": 0.05, "betas": (0.9, 0.95)})
    model.optim.sched.update({"warmup_steps": 100, "min_lr": 1e-5})
    if stage == "peft":
        model.peft.peft_scheme = "lora"
        model.peft.lora_tuning.update({"adapter_dim": 12, "target_modules": ("all",)})
        model.peft.projector_lr_factor = 0.0  # of so small a model it would be most of what trains
        model.optim.update({"lr": 5e-3, "weight_decay": 0.0})
    return config
