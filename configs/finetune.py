r"""Stage 2: learn to follow instructions. The projector and the whole language model train; the tower is frozen. The template is the language model's own.

    python train.py --config configs/finetune.py --config.trainer.devices=2 --config.model.tensor_model_parallel_size=2 \
        --config.model.restore_from_path=nemo_experiments/nemo_neva \
        --config.model.mm_cfg.llm.from_pretrained=Llama-2-7b-chat-hf \
        --config.model.mm_cfg.vision_encoder.from_pretrained=clip-vit-large-patch14 \
        --config.model.tokenizer.model=tokenizer_neva.model \
        --config.model.data.data_path=LLaVA-Instruct-150K/llava_instruct_150k.json --config.model.data.image_folder=coco/train2017

restore_from_path is the run of stage 1. The numbers are NeMo's (neva_finetune_v2.0.0.yaml): 4900 steps of 32 records, one epoch of LLaVA-Instruct-150K.
NeMo reaches 6.5 records a second and GPU with 7B in bf16 on two H100 NVL.
"""

from configs import base, llms


def get_config(size: str = "llama2_7b"):
    config = base.get_config()
    llms.set_llm(config, size)
    model = config.model
    model.mm_cfg.llm.freeze = False
    model.micro_batch_size, model.global_batch_size = 4, 32
    model.optim.update({"name": "fused_adam", "lr": 2e-5, "weight_decay": 0.0, "betas": (0.9, 0.95)})
    model.optim.sched.update({"name": "CosineAnnealing", "warmup_steps": 200, "constant_steps": 0, "min_lr": 2e-7})
    config.trainer.max_steps = 4900
    return config
