r"""Stage 1: align the projector. The tower and the language model are frozen; captions are learnt behind a bare image (template plain).

    python train.py --config configs/pretrain.py \
        --config.model.mm_cfg.llm.from_pretrained=Llama-2-7b-chat-hf \
        --config.model.mm_cfg.vision_encoder.from_pretrained=clip-vit-large-patch14 \
        --config.model.tokenizer.model=tokenizer_neva.model \
        --config.model.data.data_path=LLaVA-CC3M-Pretrain-595K/chat.json --config.model.data.image_folder=LLaVA-CC3M-Pretrain-595K/images

configs/pretrain.py:llama2_13b takes another size (configs/llms.py). The numbers are NeMo's (neva_config_v2.0.0.yaml): 4650 steps of 128 records, one epoch of
CC3M-595K. NeMo reaches 29 records a second and GPU with 7B in bf16 on two H100 NVL (micro_batch_size 32, global_batch_size 256).
"""

from configs import base, llms


def get_config(size: str = "llama2_7b"):
    config = base.get_config()
    llms.set_llm(config, size)
    model = config.model
    model.mm_cfg.llm.freeze = True
    model.data.conv_template = "plain"
    model.micro_batch_size, model.global_batch_size = 16, 128
    model.activations_checkpoint_granularity = "selective"  # attention twice: under 1 % of a short row's time, 6 % of the memory
    model.optim.update({"name": "fused_adam", "lr": 2e-3, "weight_decay": 0.0, "betas": (0.9, 0.95)})
    model.optim.sched.update({"name": "CosineAnnealing", "warmup_steps": 140, "constant_steps": 0, "min_lr": 2e-5})
    config.trainer.max_steps = 4650
    return config
