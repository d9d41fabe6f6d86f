r"""A run from NeMo's own YAML file, unchanged. Its ${...} follow what is set on the command line; shell variables are taken from the environment.

    python train.py --config configs/nemo_yaml.py:path/to/neva_config.yaml \
        --config.model.tokenizer.model=tokenizer_neva.model \
        --config.model.mm_cfg.llm.from_pretrained=Llama-2-7b-chat-hf \
        --config.model.mm_cfg.vision_encoder.from_pretrained=clip-vit-large-patch14 \
        --config.model.data.data_path=LLaVA-CC3M-Pretrain-595K/chat.json --config.model.data.image_folder=LLaVA-CC3M-Pretrain-595K/images

Says on standard error which fields are honoured, which do nothing here and which are refused. Files of NeMo 1.2x and 2.x, of its containers and of its
launcher are read alike; what a file does not have keeps its value of configs/base.py.
"""

from configs import base
from neva_jax.build import nemo_yaml


def get_config(path: str = ""):
    return nemo_yaml.load(path, base.get_config())
