r"""The third recipe: LoRA. Adapters beside a frozen language model train, and the projector at a tenth of their learning rate; the tower is frozen.

    python train.py --config configs/peft.py \
        --config.model.restore_from_path=nemo_experiments/nemo_neva \
        --config.model.mm_cfg.llm.from_pretrained=Llama-2-7b-chat-hf \
        --config.model.mm_cfg.vision_encoder.from_pretrained=clip-vit-large-patch14 \
        --config.model.tokenizer.model=tokenizer_neva.model \
        --config.model.data.data_path=LLaVA-Instruct-150K/llava_instruct_150k.json --config.model.data.image_folder=coco/train2017

restore_from_path is the run of stage 1, or a whole LLaVA, which needs no from_pretrained. The numbers are NeMo's (neva_peft_v2.0.0.yaml): rank 32 at q, k and
v, learning rate 2e-4, 4900 steps of 32 records. LLaVA 1.5's own numbers:

    --config.model.peft.lora_tuning='{"adapter_dim": 128, "alpha": 256, "target_modules": ("all",), "variant": "canonical", "adapter_dropout": 0.05,
        "dropout_position": "pre"}' --config.model.global_batch_size=128

On one 24 GB card: --config.model.fp8=True (the frozen weights in 8 bits) --config.model.micro_batch_size=1, and layers computed again:
--config.model.activations_checkpoint_granularity=full --config.model.activations_checkpoint_method=uniform.

    python train.py --config configs/peft.py:quickstart

is the recipe on the digits, after configs/quickstart.py:towers and :pretrain.
"""

from configs import base, llms, quickstart


def get_config(size: str = "llama2_7b"):
    if size == "quickstart":
        return quickstart.get_config("peft")
    config = base.get_config()
    llms.set_llm(config, size)
    model = config.model
    model.mm_cfg.llm.freeze = True
    model.peft.peft_scheme = "lora"
    model.micro_batch_size, model.global_batch_size = 4, 32
    model.optim.update({"name": "fused_adam", "lr": 2e-4, "weight_decay": 0.0, "betas": (0.9, 0.95)})
    model.optim.sched.update({"name": "CosineAnnealing", "warmup_steps": 200, "constant_steps": 0, "min_lr": 2e-7})
    config.trainer.max_steps = 4900
    return config
