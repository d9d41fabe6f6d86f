"""The loop over an answer's tokens, compiled for H100s that are not there: a weight is read where it lies, once a token; nothing is copied or sent in vain."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
import rows
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from neva_jax.inference import generate as engine
from neva_jax.inference.sampling import Sampling
from neva_jax.layers.attention import make_attend
from neva_jax.layers.rope import Rope
from neva_jax.models.clip import ClipVisionConfig
from neva_jax.models.llama import LlamaConfig
from neva_jax.models.multimodal import NevaConfig, neva
from neva_jax.parallel.deviceless import COMPILER_OPTIONS, absent_devices
from neva_jax.parallel.devices import PLANNED
from neva_jax.parallel.mesh import make_mesh
from neva_jax.parallel.sharding import weight_sharding
from neva_jax.transforms.select import describe

pytestmark = pytest.mark.gpu_graph

LAYERS, BATCH, PROMPT, ROOM = 4, 8, 704, 64
BF16 = {"dtype": "bfloat16"}
CONFIG = NevaConfig(  # Llama-2-7B's layers
    LlamaConfig(32000, 32000, LAYERS, 4096, 11008, 32, 32, 128, Rope(128), residual_dtype="bfloat16", **BF16),
    ClipVisionConfig(1024, 4096, 2, 16, 336, 14, **BF16), "mlp2x_gelu",
)  # fmt: skip


@functools.cache
def compiled(tensor: int):
    """-> (the loop's program for `tensor` devices, the program that reads the prompts)"""
    attend = functools.partial(make_attend, platform="gpu", dtype="bfloat16")
    make = functools.partial(neva, CONFIG, llm_attend=attend(head_dim=128)[0], vision_attend=attend(head_dim=64)[0])
    graphdef, shapes = describe(lambda: make(rngs=nnx.Rngs(0)))
    mesh = make_mesh(tensor=tensor, devices=absent_devices(PLANNED["h100-80g"], tensor))
    whole = NamedSharding(mesh, PartitionSpec())

    def there(shape, dtype, sharding=whole):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params, apart = {}, [{} for _ in range(LAYERS)]
    for path, w in shapes.items():
        sharding = weight_sharding(path, w.shape, w.axes, mesh)
        if not path.startswith(engine.LAYERS):
            params[path] = there(w.shape, jnp.bfloat16, sharding)
            continue
        for layer in apart:
            one = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
            layer[path.removeprefix(engine.LAYERS)] = there(w.shape[1:], jnp.bfloat16, one)
    batch = {name: there((BATCH, PROMPT), jnp.int32) for name in ("tokens", "segment_ids", "position_ids", "media_index")}
    batch["media"] = there((BATCH, 1, 336, 336, 3), jnp.uint8)
    sampling, keys = Sampling(ROOM), jax.eval_shape(lambda: engine.row_keys(0, jnp.arange(BATCH)))
    numbers = {name: there((), number.dtype) for name, number in jax.eval_shape(lambda: sampling.numbers).items()}
    fixed = there(keys.shape, keys.dtype), numbers, there((engine.STOPS,), jnp.int32)
    how = {"graphdef": graphdef, "kind": sampling.kind, "has_cache": True}
    start, go_on = engine.programs("gpu")
    with jax.set_mesh(mesh):
        lowered = start.lower((params, apart), batch, *fixed, room=ROOM, **how)
        begun = lowered.compile(compiler_options=COMPILER_OPTIONS)
        state, *_ = jax.tree.map(lambda a, sharding: there(a.shape, a.dtype, sharding), lowered.out_info, begun.output_shardings)
        return go_on.lower((params, apart), state, *fixed, there((), jnp.int32), **how).compile(compiler_options=COMPILER_OPTIONS), begun


@pytest.fixture(scope="module", autouse=True)
def wheels():
    rows.need_wheels()


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_token_is_seven_gemms_a_layer_and_no_copy_of_a_weight(tensor):
    loop, _ = compiled(tensor)
    text, memory = loop.as_text(), loop.memory_analysis()
    assert text.count("__cublas$lt$matmul") == 7 * LAYERS + 1
    assert memory.temp_size_in_bytes < 16 * 2**20, "a layer's smallest kernel is 32 MiB"
    cache = 2 * LAYERS * BATCH * (PROMPT + ROOM) * 4096 * 2 // tensor
    assert cache <= memory.alias_size_in_bytes < 1.01 * cache + 2**20, "the cache is written in place"


def test_a_token_over_two_gpus_is_two_small_sums_a_layer():
    """Nothing but sums of rows of the residual stream, and what little choosing a token takes."""
    text = compiled(2)[0].as_text()
    sums = [dims.replace(",1,", ",") for dims in re.findall(r"= bf16\[([\d,]+)\]\S* all-reduce(?:-start)?\(", text)]
    assert sums.count(f"{BATCH},4096") == 2 * LAYERS + 1, "and one for the embedding"
    others = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)
    assert all(math.prod(map(int, filter(None, dims.split(",")))) <= BATCH * 4096 for dims in others), "no weight and no cache is sent"


def test_prompts_are_read_by_cudnn():
    assert "__cudnn$fmha" in compiled(1)[1].as_text()
