"""The same config gives the same numbers on every mesh, and a checkpoint of one is a checkpoint of all; what crosses the wire, counted in the compiled step.

Some 40 s: sixteen steps are compiled, each once for all tests.
"""

import functools
import re

import jax
import numpy as np
import pytest
from mesh_steps import make_step

from neva_jax.checkpoint.manager import Checkpoints, named_leaves
from neva_jax.parallel.sharding import split_heads


def mesh(devices: int, *, fsdp: int = 1, tensor: int = 1, pipeline: int = 1, virtual: int | None = None, **changes) -> dict:
    sizes = {"fsdp_parallel_size": fsdp, "tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    sizes["virtual_pipeline_model_parallel_size"] = virtual
    return {"trainer__devices": devices} | {f"model__{name}": value for name, value in (sizes | changes).items()}


MESHES = {
    "data 2": mesh(2),
    "fsdp 2": mesh(2, fsdp=2),
    "tensor 2": mesh(2, tensor=2),
    "data 2, fsdp 2, optimizer state over data": mesh(4, fsdp=2, optim__name="distributed_fused_adam"),
    "data 2, tensor 2, micro-batches of 2": mesh(4, tensor=2, micro_batch_size=2),
    "fsdp 2, tensor 2, sequence parallel": mesh(4, fsdp=2, tensor=2, sequence_parallel=True),
    "data 4": mesh(4),
    "fsdp 4": mesh(4, fsdp=4),
    "tensor 4, more than key/value heads, sequence parallel": mesh(4, tensor=4, sequence_parallel=True),
    "pipeline 2": mesh(2, pipeline=2),
    "pipeline 2, 2 virtual, rounds of 4": mesh(2, pipeline=2, virtual=2, pipeline_round_size=4),
    "pipeline 4": mesh(4, pipeline=4),
    "pipeline 4, 2 virtual": mesh(4, pipeline=4, virtual=2),
    "pipeline 2, 2 virtual, fsdp 2, tensor 2, sequence parallel": mesh(8, fsdp=2, tensor=2, pipeline=2, virtual=2, sequence_parallel=True),
}
CHAIN = [*list(MESHES)[-1:], *list(MESHES)[3:6:2], *list(MESHES)[-4:-1], "alone"]  # of each kind one, and back
WITHOUT_GRADIENT = {"vision_encoder/layers/self_attn/k_proj/bias"}  # softmax does not see it: what is there is rounding
UNUSED = {"vision_encoder/post_layernorm/scale", "vision_encoder/post_layernorm/bias"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The step of a mesh by its name, made and compiled once."""

    @functools.cache
    def step(name: str, **changes):
        return make_step(tmp_path_factory.mktemp("run"), **(MESHES | {"alone": {}})[name], **changes)

    def made(name: str, **changes):
        found = step(name, **changes)
        jax.set_mesh(found.mesh)
        return found

    return made


@pytest.fixture(scope="module")
def alone(made):
    return made("alone").train(5)


@pytest.mark.parametrize("name", MESHES)
def test_same_numbers(made, alone, name):
    losses, moments, weights, _ = made(name).train(5)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-6)
    largest = {path: np.max(np.abs(moment)) for path, moment in alone[1].items()}
    assert {path for path, size in largest.items() if size < 1e-8} == WITHOUT_GRADIENT | UNUSED
    for path in largest.keys() - WITHOUT_GRADIENT:
        np.testing.assert_allclose(moments[path], alone[1][path], rtol=0, atol=1e-5 * largest[path], err_msg=path)
    for path in weights:
        np.testing.assert_allclose(weights[path], alone[2][path], rtol=0, atol=1e-4, err_msg=path)  # a tenth of the learning rate


def test_a_checkpoint_is_loaded_bit_for_bit_on_every_mesh(tmp_path, made):
    """Through all meshes, one after the other: saved as it lives on one, restored on the next."""
    first = made("alone")
    state = first.weights()[0]
    state["opt_state"] = jax.tree.map(lambda leaf: leaf + 1, state["opt_state"])
    bits = lambda tree: {path: np.asarray(leaf).tobytes() for path, leaf in named_leaves(jax.device_get(tree)).items()}  # noqa: E731
    expected = bits(state)
    for number, name in enumerate(CHAIN):
        checkpoints = Checkpoints(tmp_path / str(number), save_top_k=-1)
        checkpoints.save(1, state, {}, {})
        checkpoints.close()
        step = made(name)
        live = step.model.pipeline.live(checkpoints.restore(1, step.abstract_state))
        state = step.model.pipeline.rest(live)
        assert bits(state) == expected, name
        stacks = {leaf.shape[0] for path, leaf in named_leaves(live).items() if "llm/layers/" in path}
        assert stacks == {step.model.pipeline.virtual if step.model.pipeline.virtual > 1 else 8}


# ---- what crosses the wire -----------------------------------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*")


def collectives(text: str) -> list[tuple[str, list[tuple[int, ...]], str]]:
    """[(operation, shapes of what it gives, the line)]"""
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            shapes = [tuple(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            found.append((match[2], shapes, line))
    return found


def test_data_parallel_over_frozen_weights_sends_the_projectors_gradients(made):
    step = made("data 4", model__mm_cfg__llm__freeze=True, model__mm_cfg__vision_encoder__freeze=True)
    found = collectives(step.compiled.as_text())
    sent = [shape for _, shapes, _ in found for shape in shapes if np.prod(shape) > 1]
    assert sorted(map(np.prod, sent)) == sorted(np.prod(step.model.weights[path].shape) for path in step.model.rows)
    assert {operation for operation, _, _ in found} == {"all-reduce"}
    assert not any("llm_layers" in line for _, _, line in found), "nothing in the layers"


def test_tables_of_the_vocabulary_are_never_gathered(made):
    """Tensor parallel: rows of the table are looked up where they lie, and of logits only maxima and sums are exchanged."""
    step = made("tensor 2")
    text = step.compiled.as_text()
    assert step.model.weights["llm/lm_head/kernel"].shape == (32, 384) and re.search(r"f32\[1,64,192\]", text), "logits of half of the vocabulary"
    assert not re.search(r"f32\[(\d+,)*384[,\]]", text), "nothing of the whole vocabulary exists"
    assert not any(operation == "all-gather" for operation, _, _ in collectives(text))


@pytest.mark.parametrize("name", ["data 2, tensor 2, micro-batches of 2", "pipeline 2, 2 virtual, fsdp 2, tensor 2, sequence parallel"])
def test_the_tower_is_computed_once(made, name):
    """Its states are [media, 5, 16], and the 16 rows of a global batch have a picture each: a device has its share of them, of the tensor axis too."""
    step = made(name)
    rounds = step.micro_batches // step.model.pipeline.round_size
    computed = {int(n) for n in re.findall(r"f32\[(\d+),5,16\]", step.compiled.as_text())}
    assert computed == {16 // rounds // step.mesh.size}


def test_a_tick_sends_what_a_stage_gives(made):
    """A ring: one permute of the micro-batch forwards, one backwards. In and out of the stack: one reduction each. No weight of a layer moves."""
    found = collectives(made("pipeline 4, 2 virtual").compiled.as_text())
    ticks = [(operation, shapes) for operation, shapes, line in found if re.search(r"llm_layers\)+/while", line)]
    assert sorted(operation for operation, _ in ticks) == ["all-reduce", "all-reduce", "collective-permute", "collective-permute"]
    assert all(np.prod(shape) == 32 * 32 for _, shapes in ticks for shape in shapes)


def test_the_head_is_shared_out_over_stages(made):
    """A round of 16 rows: each of 4 stages has the logits of 4."""
    logits = {int(rows) for rows in re.findall(r"f32\[(\d+),64,384\]", made("pipeline 4, 2 virtual").compiled.as_text())}
    assert logits == {4}


def test_key_value_heads_fewer_than_the_tensor_axis(made):
    """2 heads on 4 devices: the weights stand whole on each, and each has a copy of the head that its own query head reads."""
    step = made("tensor 4, more than key/value heads, sequence parallel")
    specs = {name: step.model.shardings[f"llm/layers/self_attn/{name}/kernel"].spec for name in ("q_proj", "k_proj", "v_proj")}
    assert specs["q_proj"][2] == "tensor" and specs["k_proj"][2] is None and specs["v_proj"][2] is None
    key = np.arange(1 * 3 * 2 * 5, dtype=np.float32).reshape(1, 3, 2, 5)
    spread = jax.jit(functools.partial(split_heads, num_heads=4))(key)
    for shard in spread.addressable_shards:
        head = shard.index[2].start
        np.testing.assert_array_equal(shard.data, key[:, :, head // 2 : head // 2 + 1])
