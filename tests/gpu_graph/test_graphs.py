"""Steps compiled for H100s that are not there, and read: what a GPU would run, how often, what it would send, and what it would hold in its memory.

XLA chooses kernels without timing them here, so nothing is said of speed. Skipped where the wheels of jax[cuda12] are missing, but never in the project's gate.
"""

import json
import math

import jax
import pytest
import rows
from rows import LAYERS, MESHES, MICRO_BATCH, MICRO_BATCHES, PRECISIONS, ROWS, STAGES, TOKENS, WHOLE

from neva_jax.build.planned import local_bytes
from neva_jax.parallel import hlo

pytestmark = pytest.mark.gpu_graph

NEEDED = {"pretrain": 14, "finetune": 21, "peft": 14}  # GEMMs of a layer: seven forward, seven for activations' gradients, seven for weights that train
AGAIN = {"PP 2": 6}  # a stage is computed again whole, but for its last product
LAYER = 4 * 4096**2 + 3 * 4096 * 11008  # weights of a layer's GEMMs
RESIDUAL = MICRO_BATCH * TOKENS * 4096 * 2  # bytes of the residual stream of a micro-batch
RUNS = LAYERS * MICRO_BATCHES
ADAPTER = 2 * 2**20  # bytes: up to here it is an adapter's weights, and activations as wide as its rank
SCALAR = 1024  # bytes: up to here it is maxima of FP8, the loss, gradients of norms, not a matrix
MESHES_OF = {"fsdp": ("FSDP 8", "FSDP 4 x TP 2"), "tensor": ("TP 2", "FSDP 4 x TP 2")}


@pytest.fixture(scope="module", autouse=True)
def wheels():
    rows.need_wheels()


def parametrize(stages=STAGES, meshes=MESHES):
    chosen = [row for row in ROWS if row[0] in stages and row[2] in meshes]
    return pytest.mark.parametrize("row", [pytest.param(row, id=", ".join(row)) for row in chosen])


def sent(row, *, in_layers: bool, axis: str | None = None, least: int = SCALAR) -> dict[str, tuple[int, int]]:
    """{op: (how many, bytes of all)} of a step and a device, of what is larger than `least` bytes."""
    one, found = rows.compiled(*row), {}
    for c in hlo.collectives(one.module, dict(one.step.mesh.shape)):
        if (c.computation in one.layers) is in_layers and axis in (None, c.axis) and c.bytes > least:
            count, total = found.get(c.op, (0, 0))
            found[c.op] = count + c.count, total + c.count * c.bytes
    return found


@parametrize()
def test_gemms(row):
    """All of the precision asked for, none of a frozen weight's gradient, none twice but where a pipeline's stage is computed again."""
    stage, precision, mesh = row
    assert rows.compiled(*row).gemms_per_layer == {"fp8": 0, "bf16": 0, "fp32": 0} | {precision: NEEDED[stage] + AGAIN.get(mesh, 0)}


@pytest.mark.parametrize("stage", STAGES)
def test_fp8_at_few_tokens(stage):
    """Where XLA would merge small products, and lose FP8 by it."""
    few = rows.SMALL | {"model.micro_batch_size": 1, "model.global_batch_size": 1, "model.fp8": True}
    config, own = STAGES[stage]
    assert rows.compile_config(config, rows.Bucket(64, 64, 0), few | own).gemms_per_layer == {"fp8": NEEDED[stage], "bf16": 0, "fp32": 0}


@parametrize()
def test_attention_is_cudnns(row):
    calls = hlo.targets(rows.compiled(*row).module)
    turns = RUNS if row[2] != "PP 2" else MICRO_BATCHES + 1  # ticks of a stage's one layer
    assert calls["__cudnn$fmhaSoftmaxBackward"] == turns
    assert calls["__cudnn$fmhaSoftmax"] >= turns
    scores = [shape for _, shape in hlo.shapes(rows.compiled(*row).text) if shape.count(TOKENS) > 1]
    assert not scores, f"T x T: {scores}"


@parametrize(stages=("peft",), meshes=("1 GPU", "DP 8", "TP 2"))
def test_adapters_gemms(row):
    """q, k and v with one A: to the rank once, from it three times; backward four for each B. None is in float8, none is computed twice."""
    assert rows.compiled(*row).adapter_gemms_per_layer == 1 + 3 + 4 * 3


@parametrize()
def test_no_logits_of_all_positions(row):
    assert not rows.compiled(*row).has_logits_tensor


@parametrize()
def test_the_state_is_donated(row):
    one = rows.compiled(*row)
    assert one.donated == local_bytes(one.step.state)
    assert one.module.donated == set(range(len(jax.tree.leaves(one.step.state))))


@parametrize(meshes=("1 GPU",))
def test_one_gpu_sends_nothing(row):
    assert rows.compiled(*row).collectives == []


@parametrize(meshes=("DP 8",))
def test_data_parallel_sends_gradients_once(row):
    """Nothing in the layers; outside, the gradients of what trains, once a step however many micro-batches it has."""
    state = rows.compiled(*row).step.state["params"]
    trained = sum(math.prod(leaf.shape) for leaf in state.values())
    assert sent(row, in_layers=True) == {}
    outside = sent(row, in_layers=False)
    assert outside.keys() == {"all-reduce"}
    assert outside["all-reduce"][1] <= 4.01 * trained
    if row[0] == "pretrain":
        assert outside["all-reduce"][0] == 1


@parametrize(meshes=MESHES_OF["fsdp"])
def test_fsdp_gathers_a_layer_twice(row):
    """Each weight forward and backward, in the bytes that its GEMM reads; gradients of trained weights are scattered, and no activation is moved."""
    stage, precision, mesh = row
    tensor = 2 if "TP" in mesh else 1
    found = sent(row, in_layers=True, axis="fsdp")
    assert found.keys() == {"all-gather"} | ({"reduce-scatter"} if stage != "pretrain" else set())
    assert found["all-gather"][1] == pytest.approx(2 * RUNS * LAYER // tensor * (1 if precision == "fp8" else 2), rel=1e-2 if stage == "peft" else 1e-3)
    assert stage != "peft" or found["reduce-scatter"][1] < RUNS * ADAPTER
    if stage == "finetune":
        assert found["reduce-scatter"][1] == pytest.approx(RUNS * LAYER // tensor * 2, rel=1e-3)


@parametrize(meshes=MESHES_OF["tensor"])
def test_tensor_parallel_reduces_four_times(row):
    """Behind attention and MLP forward, before them backward; what adapters add is as wide as their rank."""
    assert sent(row, in_layers=True, axis="tensor", least=ADAPTER) == {"all-reduce": (4 * RUNS, 4 * RUNS * RESIDUAL)}
    everything = sum(size for _, size in sent(row, in_layers=True, axis="tensor").values())
    assert everything - 4 * RUNS * RESIDUAL < (0.02 * everything if row[0] == "peft" else 1)


@parametrize(meshes=("PP 2",))
def test_pipeline_hands_on_residuals(row):
    """One a tick and direction; a round of two micro-batches through two stages takes three ticks."""
    found = sent(row, in_layers=True)
    assert found["collective-permute"] == (2 * (MICRO_BATCHES + 1), 2 * (MICRO_BATCHES + 1) * RESIDUAL)
    assert found.keys() <= {"collective-permute", "all-reduce"}
    assert found.get("all-reduce", (0, 0))[0] <= MICRO_BATCHES + 1


@parametrize()
def test_memory(row):
    assert rows.gib(rows.compiled(*row)) == pytest.approx(json.loads(rows.TABLE.read_text())[", ".join(row)], rel=0.05)


@pytest.mark.parametrize("name", WHOLE)
def test_memory_of_whole_models(name):
    found = rows.gib(rows.whole(name))
    assert found == pytest.approx(json.loads(rows.TABLE.read_text())[name], rel=0.05)
    assert found <= WHOLE[name][-1]


def test_precisions_differ():
    """What the gates count can be seen to change: FP8's frozen weights take half, and its products are others."""
    bf16, fp8 = (rows.compiled("pretrain", precision, "1 GPU") for precision in PRECISIONS)
    assert fp8.step.fixed_bytes()["frozen"] < bf16.step.fixed_bytes()["frozen"] - 0.99 * LAYERS * LAYER
