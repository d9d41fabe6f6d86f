"""Model FLOPs of a batch, by formula (a multiply-add is 2): what MFU is measured against. Recomputation does not count, causal attention counts half.

A linear layer costs 2 x weights a token forward, as much again for its activation's gradient, and as much again for its weight's. Whatever trains below a layer
asks for that layer's activation gradient: the projector stands at the language model's input, so pretraining pays for all of them.
"""

from neva_jax.layers.mlp import ACTIVATIONS
from neva_jax.models.multimodal import NevaConfig


def row_flops(config: NevaConfig, *, tokens: int, supervised: int, media: int, trained: set[str], adapters: int = 0) -> float:
    """One row of a batch of shape (T, K, N). trained: parts that have a weight that trains, of "llm", "projector", "vision_encoder"; adapters: weights of
    those in the language model's layers, which train whatever `trained` says."""
    return sum(row_flops_by_kind(config, tokens=tokens, supervised=supervised, media=media, trained=trained, adapters=adapters).values())


def row_flops_by_kind(config: NevaConfig, *, tokens: int, supervised: int, media: int, trained: set[str], adapters: int = 0) -> dict[str, float]:
    """The same, apart: layers (the projections of the language model's layers), adapters, attention (its scores and their product with the values), head,
    encoder."""
    llm, vision = config.llm, config.vision
    below = bool(trained & {"llm", "projector", "vision_encoder"}) or adapters > 0
    passes = 1 + below + ("llm" in trained)
    heads, groups = llm.num_attention_heads * llm.head_dim, llm.num_query_groups * llm.head_dim
    gates = 3 if ACTIVATIONS[llm.activation][1] else 2
    block = llm.hidden_size * (2 * heads + 2 * groups) + gates * llm.hidden_size * llm.ffn_hidden_size
    layers = 2 * tokens * block * llm.num_layers * passes
    attention = 2 * tokens**2 * heads * llm.num_layers * (1 + 2 * below)
    head = 2 * supervised * llm.hidden_size * llm.padded_vocab_size * passes

    length = vision.num_positions
    encoder_block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    encoder = 2 * length * encoder_block * vision.num_computed_layers + 4 * length**2 * vision.hidden_size * vision.num_computed_layers
    encoder += 2 * length * vision.hidden_size * 3 * vision.patch_size**2
    encoder *= media * (3 if "vision_encoder" in trained else 1)
    passes = 1 + ("projector" in trained) + ("vision_encoder" in trained)
    encoder += media * projector_flops(config) * passes
    return {"layers": layers, "adapters": 2 * tokens * adapters * 3, "attention": attention, "head": head, "encoder": encoder}


def projector_flops(config: NevaConfig) -> float:
    """Forward, one medium."""
    width, out, length = config.vision.hidden_size, config.llm.hidden_size, config.media_length
    if config.projector == "identity":
        return 0
    if config.projector == "linear":
        return 2 * length * width * out
    layers = 2 if config.projector.startswith("mlp_downsample") else int(config.projector[3:].split("x")[0])
    width = 4 * width if config.projector.startswith("mlp_downsample") else width
    return 2 * length * (width * out + (layers - 1) * out * out)
