"""The formula of a step's time, term by term against numbers by hand, and against the two published runs that set its shares."""

import pytest

from neva_jax.parallel.devices import PLANNED
from neva_jax.training.step_time import Work, between_gemms, sent, step_time

H100 = PLANNED["h100-80g"]
ONE, EIGHT = {"fsdp": 1}, {"data": 1, "fsdp": 8, "tensor": 1}
NOTHING = Work({"bf16": 0.0}, 0.0, {"bf16": 0.0}, 0.0, 0.0, 0.0, 1, [])


def test_terms():
    assert step_time(H100, NOTHING._replace(flops={"bf16": 0.6 * 989e12, "fp8": 0.5 * 1979e12}), ONE)["gemms"] == pytest.approx(2)
    assert step_time(H100, NOTHING._replace(weights=0.8 * 3.35e12), ONE)["expected"] == pytest.approx(1), "few tokens: reading the weights takes longer"
    assert step_time(H100, NOTHING._replace(attention=0.4 * 989e12), ONE)["expected"] == pytest.approx(1)
    assert step_time(H100, NOTHING._replace(trained=0.8 * 3.35e12, micro_batches=4), ONE)["update"] == pytest.approx(28 + 48)
    assert step_time(H100, NOTHING._replace(flops={"bf16": 0.6 * 989e12}, bubble=0.25), ONE)["expected"] == pytest.approx(1.25)
    assert step_time(H100, NOTHING._replace(model_flops={"bf16": 989e12, "fp8": 1979e12}), ONE)["ideal"] == pytest.approx(2)


def test_communication_hides_or_not():
    compute = NOTHING._replace(flops={"bf16": 0.6 * 989e12})
    second = 0.75 * 450e9 * 8 / 7  # bytes that are gathered over 8 devices in a second
    hidden = step_time(H100, compute._replace(collectives=[("all-gather", "fsdp", 8, 0.5 * second)]), EIGHT)
    assert (hidden["communication_hidden"], hidden["expected"]) == (pytest.approx(0.5), pytest.approx(1))
    assert step_time(H100, compute._replace(collectives=[("all-gather", "data+fsdp", 8, 3 * second)]), EIGHT)["expected"] == pytest.approx(3)
    assert step_time(H100, compute._replace(collectives=[("all-reduce", "tensor", 8, 0.25 * second)]), EIGHT)["expected"] == pytest.approx(1.5)
    assert step_time(H100, compute._replace(collectives=[("all-gather", "fsdp", 16, second)]), {"fsdp": 16})["communication_hidden"] > 8, "between machines"
    nodes = {"data": 2, "fsdp": 8}
    inside, across = (step_time(H100, compute._replace(collectives=[("all-gather", axis, 8, second)]), nodes) for axis in ("fsdp", "data"))
    assert inside["communication_hidden"] == pytest.approx(1) and across["communication_hidden"] == pytest.approx(9)


def test_rings():
    assert sent("all-reduce", 4, 100) == 150 and sent("all-gather", 4, 100) == 75 and sent("reduce-scatter", 2, 100) == 50
    assert sent("collective-permute", 4, 100) == 100


@pytest.mark.parametrize(("precision", "rows", "published"), [("bf16", 2, 11361), ("fp8", 1, 16934)])
def test_published_runs(precision, rows, published):
    """Llama-2-7B on 8 H100, T 4096, FSDP: tokens a second and GPU of MaxText in bf16 and of NeMo in FP8."""
    tokens, blocks, head = rows * 4096, 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    flops = {precision: 6 * blocks * tokens}
    flops["bf16"] = flops.get("bf16", 0) + 6 * head * tokens
    gathered = [("all-gather", "fsdp", 8, 2 * 2 * blocks), ("reduce-scatter", "fsdp", 8, 2 * blocks)]
    work = Work(flops, 6 * 4096 * 4096 * 32 * tokens, flops, between_gemms(tokens, 32, 4096, 11008), 3 * 2 * blocks, blocks / 8, 1, gathered)
    assert tokens / step_time(H100, work, EIGHT)["expected"] == pytest.approx(published, rel=0.05)
