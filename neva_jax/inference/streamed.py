"""A model larger than memory, run once: the weights of one layer are read, used and let go. Slow, and small: for comparing two sets of weights.

A weight that is not stacked (embedding, head, projector) is in memory whole, in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neva_jax.layers.attention import attend
from neva_jax.models.llama import Llama
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.transforms.select import describe, nest


class Layers:
    """Stands for a stacked weight in a module. array: `[layer]` reads one layer."""

    def __init__(self, array):
        self.array = array

    def __len__(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, index):
        return _float32(self.array[index])


def _float32(array) -> jax.Array:
    return jnp.asarray(np.asarray(array).astype(np.float32))


def stream_layers(body, stacked, x, side, *, first: int | None = None):
    """A layer runner (see parallel/layer_runner.py) over `Layers`."""
    step = jax.jit(body)
    for layer in range(len(jax.tree.leaves(stacked)[0]) if first is None else first):
        x = step(x, side, jax.tree.map(lambda weight, layer=layer: weight[layer], stacked))
    return x


def logits(config: NevaConfig, arrays: dict, batch: dict, *, text_only: bool = False) -> np.ndarray:
    """arrays: {path: array that is read when it is asked for}; batch: see MultimodalModel -> float32[B, T, V] in float32, without the rows of padding.

    text_only: of the language model alone, where there is nothing else.
    """
    llm = dataclasses.replace(config.llm, dtype="float32", residual_dtype="float32")
    prefix = "llm/" if text_only else ""

    def make():
        if text_only:
            return Llama(llm, attend=attend, runner=stream_layers, rngs=nnx.Rngs(0))
        whole = dataclasses.replace(config, llm=llm, vision=dataclasses.replace(config.vision, dtype="float32"))
        return neva(whole, rngs=nnx.Rngs(0), runner=stream_layers, vision_runner=stream_layers)

    graphdef, weights = describe(make)
    filled = {path: Layers(arrays[prefix + path]) if w.axes[0] == "layers" else _float32(arrays[prefix + path]) for path, w in weights.items()}
    model = nnx.merge(graphdef, nest(filled))
    found = model(batch["tokens"]) if text_only else model.llm.logits(model(batch))
    return np.asarray(found)[..., : config.llm.vocab_size]
