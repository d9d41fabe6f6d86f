"""Reading compiled programs: a stored text in XLA's own spelling for GPUs, and what XLA makes of small programs here."""

import functools
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from neva_jax.parallel import hlo
from neva_jax.parallel.mesh import make_mesh

MESH = {"pipeline": 1, "data": 2, "fsdp": 2, "tensor": 2}
STORED = Path(__file__).with_name("stored_step.hlo").read_text()


@functools.cache
def stored():
    return hlo.parse(STORED)


def test_loops_multiply():
    runs = hlo.executions(stored())
    assert (runs["main"], runs["micro_batch"], runs["layer"], runs["fused_dot"]) == (1, 4, 128, 128)


def test_gemms_by_precision():
    found = hlo.gemms(stored())
    assert Counter((g.precision, g.batched, g.count) for g in found) == {("bf16", False, 128): 1, ("fp8", False, 128): 1, ("bf16", True, 128): 1}
    assert hlo.targets(stored())["__cudnn$fmhaSoftmax"] == 128


def test_what_runs_inside_a_scope():
    assert hlo.loops_of(stored(), "llm_layers") >= {"layer", "fused_dot"}
    assert not hlo.loops_of(stored(), "llm_layers") & {"main", "micro_batch"}


def test_collectives_by_axis():
    found = {(c.op, c.axis, c.num_devices, c.bytes, c.count) for c in hlo.collectives(stored(), MESH)}
    assert found == {
        ("all-gather", "fsdp", 2, 2 * 32 * 16 * 2, 128),  # what a device has at the end: both halves
        ("all-reduce", "tensor", 2, 4 * 4 + 8 * 16 * 2, 1),  # two arrays in one
        ("reduce-scatter", "data+fsdp", 4, 4 * 4, 1),
        ("collective-permute", "data", 2, 4 * 4, 1),
    }  # groups of one device move nothing


@pytest.mark.parametrize(("spelling", "groups"), [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,0,1,2) {'b'}", [[0, 3], [1, 2]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
])  # fmt: skip
def test_groups_in_every_spelling(spelling, groups):
    assert sorted(map(sorted, hlo.replica_groups(f"channel_id=1, {spelling}, dimensions={{0}}", 4))) == groups


def test_donated_and_tensors():
    assert stored().donated == {0, 3}
    assert hlo.holds_tensor(STORED, width=32128, rows=1024)
    assert not hlo.holds_tensor(STORED, width=32128, rows=1025)
    assert not hlo.holds_tensor("f32[4096,32128]{1,0}", width=32128, rows=1024, but_not=frozenset({4096}))
    assert hlo.num_bytes("(bf16[2,3]{1,0}, f8e4m3fn[5]{0}, pred[])") == 12 + 5 + 1


@pytest.mark.parametrize(("axis", "sizes"), [("tensor", {"tensor": 4}), ("fsdp", {"fsdp": 4}), ("data", {"fsdp": 2})])
def test_what_xla_makes_here(axis, sizes):
    """A loop of 3 products that are split over an axis, then summed: 3 all-reduces over it, of one device's result."""
    mesh = make_mesh(devices=jax.devices()[:8], **sizes)

    def program(x, w):
        with jax.named_scope("llm_layers"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    split = NamedSharding(mesh, PartitionSpec(None, axis))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((3, 32, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, axis, None)))
    text = jax.jit(program, out_shardings=split).lower(x, w).compile().as_text()
    module = hlo.parse(text)
    reduced = [c for c in hlo.collectives(module, dict(mesh.shape)) if c.op == "all-reduce"]
    assert [(c.axis, c.num_devices, c.bytes, c.count) for c in reduced] == [(axis, mesh.shape[axis], 16 * 32 * 4, 3)]
    assert reduced[0].computation in hlo.loops_of(module, "llm_layers")
    assert sum(g.count for g in hlo.gemms(module)) == 3 and {g.precision for g in hlo.gemms(module)} == {"fp32"}


def test_axes_of_groups():
    mesh = {"pipeline": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert hlo.axis_of([[0, 4]], mesh) == "pipeline"
    assert hlo.axis_of(np.arange(8).reshape(1, 8).tolist(), mesh) == "pipeline+fsdp+tensor"
