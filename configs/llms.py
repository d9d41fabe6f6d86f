"""Language models by name: the architecture, tokenizer library and template that each was published with.

`set_llm` sets every one of these fields, so that nothing of a former choice is left. Weights and tokenizer files are the user's. Given up: vocabulary sizes
(the tokenizer says them), and Mistral's sliding window (its first version had one; the numbers here are those of version 0.2, which has none).
"""

from ml_collections import ConfigDict

from neva_jax.errors import UserError


def llm(num_layers: int, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int, num_query_groups: int | None = None, **changes) -> dict:
    """Fields below `model`, Llama 2's where `changes` do not say otherwise."""
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "kv_channels": None,
        "normalization": "rmsnorm",
        "layernorm_epsilon": 1e-5,
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": False,
        "rotary_percentage": 1.0,
        "rotary_base": 10000.0,
        "scale_positional_embedding": False,
        "share_embeddings_and_output_weights": False,
        "encoder_seq_length": 4096,
        "override_vocab_size": None,
        "tokenizer.library": "sentencepiece",
        "mm_cfg.llm.model_type": "llama_2",
        **changes,
    }


V1 = {"mm_cfg.llm.model_type": "v1"}
LLAMA_3 = {"rotary_base": 500000.0, "encoder_seq_length": 8192, "tokenizer.library": "huggingface", "mm_cfg.llm.model_type": "llama_3"}
NVGPT = {"normalization": "layernorm1p", "rotary_percentage": 0.5, "mm_cfg.llm.model_type": "nvgpt"}

LLMS = {
    "llama2_7b": llm(32, 4096, 11008, 32),
    "llama2_13b": llm(40, 5120, 13824, 40),
    "llama2_70b": llm(80, 8192, 28672, 64, 8),
    "llama3_8b": llm(32, 4096, 14336, 32, 8, **LLAMA_3),
    "mistral_7b": llm(32, 4096, 14336, 32, 8, **{"rotary_base": 1e6, "mm_cfg.llm.model_type": "mistral"}),
    "vicuna_7b": llm(32, 4096, 11008, 32, **V1),  # version 1.5, made from Llama 2
    "vicuna_13b": llm(40, 5120, 13824, 40, **V1),
    "nvgpt_2b": llm(24, 2048, 5440, 16, **NVGPT),
    "tiny": llm(2, 64, 128, 4, 2),  # for tests
}


def set_llm(config: ConfigDict, name: str) -> None:
    """Set the fields of the language model `name` on a config made by configs.base."""
    if name not in LLMS:
        raise UserError(f"there is no language model {name!r}; known are {', '.join(LLMS)}")
    config.model.update_from_flattened_dict(LLMS[name])
