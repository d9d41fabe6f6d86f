"""A stack of layers over the `pipeline` axis of the mesh, as a runner (see layer_runner.py): each stage holds its own layers, micro-batches pass through.

The stack lives as [V, S, n, ...]: V virtual stages a device, S stages, n = L / (V S) layers; device s holds the layers (v S + s) n ... of every v, and axis 1
is split over `pipeline`. Everything at rest (checkpoints, key maps, paths) has [L, ...]; `Pipeline.live` and `Pipeline.rest` lead from one to the other.

Schedule: R micro-batches (a round) go round a ring of S stages, V times each, S of them at a time, one stage a tick. R V + S - 1 ticks, of which S - 1 are
idle on each stage: a share of (S - 1) / (R V + S - 1) (Narayanan et al. 2021). Only what enters a stage is kept for the backward pass; a stage is computed
again whole. What goes into the stack and comes out of it stands whole on every stage. Given up: 1F1B (a round's stage inputs are all kept), stages of unequal
depth; an idle stage computes on zeros instead of waiting.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from neva_jax.parallel.sharding import ROWS, axis_rules


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """stages: S. virtual: V, stages a device. round_size: R, micro-batches a gradient; a multiple of S where V > 1."""

    stages: int = 1
    virtual: int = 1
    round_size: int = 1

    @property
    def bubble(self) -> float:
        """The share of a round in which a stage has nothing to do."""
        return (self.stages - 1) / (self.round_size * self.virtual + self.stages - 1)

    def fold(self, field: jax.Array) -> jax.Array:
        """A field [M, B, ...] of a global batch -> [M / R, B R, ...]: rounds, whose rows stay on the devices that hold them."""
        rounds, rows = field.shape[0] // self.round_size, field.shape[1] * self.round_size
        return field.reshape(rounds, self.round_size, *field.shape[1:]).swapaxes(1, 2).reshape(rounds, rows, *field.shape[2:])

    def live(self, tree):
        """Weights at rest [L, ...] (or their moments, or ShapeDtypeStructs of either) as the runner wants them, each in the place of its own."""
        shape = lambda a: (self.virtual, self.stages, a.shape[0] // (self.virtual * self.stages), *a.shape[1:])  # noqa: E731
        return self._move(tree, shape, (None, "pipeline", None), 1, replace=True)

    def rest(self, tree):
        """The inverse of `live`."""
        return self._move(tree, lambda a: (math.prod(a.shape[:3]), *a.shape[3:]), ("pipeline",), 3)

    def _move(self, tree, shape, spec: tuple, dims: int, replace: bool = False):
        def move(path, leaf):
            if self.virtual == 1 or not leaf.shape or not is_pipelined(jax.tree_util.keystr(path, simple=True, separator="/")):
                return leaf  # with one virtual stage, [L, ...] over `pipeline` and [1, S, n, ...] are the same bytes in the same place
            sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec, *leaf.sharding.spec[dims:]))
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(shape(leaf), leaf.dtype, sharding=sharding)
            moved = jax.jit(jnp.reshape, static_argnums=1, out_shardings=sharding)(leaf, shape(leaf))
            if replace:
                leaf.delete()
            return moved

        return jax.tree_util.tree_map_with_path(move, tree)


def is_pipelined(path: str) -> bool:
    """Whether a weight (or what is kept beside it: a moment, an FP8 scale) belongs to the stack that is split into stages: the language model's."""
    return "llm/layers/" in path


def pipeline_layers(body, stacked, x, side, *, pipeline: Pipeline, inner):
    """A runner. stacked: leaves [V, S, n, ...], or [L, ...] where V is 1; x: [rows, ...] and leaves of side [rows, ...], rows folded as `Pipeline.fold` does;
    they are cut into gcd(rows, round_size) micro-batches. inner: the runner of a stage's own layers.
    """
    stages, virtual = pipeline.stages, pipeline.virtual
    count = math.gcd(x.shape[0], pipeline.round_size)
    if virtual > 1 and count % stages:
        raise ValueError(f"{x.shape[0]} rows cannot be cut into a multiple of {stages} micro-batches, which {virtual} virtual stages need")
    if virtual == 1:
        stacked = jax.tree.map(lambda a: a.reshape(1, stages, -1, *a.shape[1:]), stacked)
    stacked = jax.tree.map(lambda a: _pin(a, None, "pipeline"), stacked)
    x, side = jax.tree.map(lambda a: _pin(a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), None, ROWS["batch"]), (x, side))
    first = jnp.arange(stages) == 0

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run_stages(x, stacked, side, turn):
        """x: [S, rows, ...]; turn: int[S], how many turns each stage has had."""
        valid, turn = (turn >= 0) & (turn < count * virtual), jnp.clip(turn, 0, count * virtual - 1)
        chunk, micro = turn // stages % virtual, turn // (stages * virtual) * stages + turn % stages
        layers = jax.tree.map(lambda a: _choose(a, chunk, valid), stacked)
        mine = jax.tree.map(lambda a: _pin(a[micro], "pipeline", ROWS["batch"]), side)
        with axis_rules(ROWS):
            run = jax.vmap(lambda layers, x, side: inner(body, layers, x, side), spmd_axis_name="pipeline")
            return run(layers, x, mine)

    def tick(outputs, t):
        turn = t - jnp.arange(stages)
        entering = x[jnp.clip(t // (stages * virtual) * stages + t % stages, 0, count - 1)]  # for stage 0, if it begins a new micro-batch
        fresh = _column(first & (turn // stages % virtual == 0), outputs)
        inputs = _pin(jnp.where(fresh, entering, _pass_on(outputs)), "pipeline", ROWS["batch"])
        outputs = _pin(run_stages(inputs, stacked, side, turn), "pipeline", ROWS["batch"])
        last = _column(jnp.arange(stages) == stages - 1, outputs)
        return outputs, _pin(jnp.sum(jnp.where(last, outputs, 0), 0, dtype=outputs.dtype), ROWS["batch"])

    start = _pin(jnp.zeros((stages, *x.shape[1:]), x.dtype), "pipeline", ROWS["batch"])
    _, outputs = jax.lax.scan(tick, start, jnp.arange(count * virtual + stages - 1))
    micro = np.arange(count)
    done = micro // stages * stages * virtual + (virtual - 1) * stages + micro % stages + stages - 1  # the tick after which each leaves the last stage
    return _pin(outputs[done], None, ROWS["batch"]).swapaxes(0, 1).reshape(-1, *outputs.shape[2:])


@jax.custom_vjp
def _choose(stacked, chunk, valid):
    """stacked: [V, S, ...], chunk: int[S] -> [S, ...], each stage's layers of this tick. Backwards, only those get a gradient, by a select that XLA fuses with
    the sum over ticks (a scatter would need the whole stack once more), and an idle tick (valid: bool[S]) gives none."""
    if stacked.shape[0] == 1:
        return stacked[0]
    return jax.vmap(lambda a, i: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), (1, 0))(stacked, chunk)


def _choose_forward(stacked, chunk, valid):
    return _choose(stacked, chunk, valid), (chunk, valid, stacked.shape[0])


def _choose_backward(saved, gradient):
    chunk, valid, virtual = saved
    chosen = (jnp.arange(virtual)[:, None] == chunk) & valid
    spread = jax.lax.broadcast_in_dim(gradient, (virtual, *gradient.shape), range(1, gradient.ndim + 1))
    mask = jax.lax.broadcast_in_dim(chosen, spread.shape, (0, 1))
    return jax.lax.select(mask, spread, jax.lax.full_like(spread, 0)), None, None


_choose.defvjp(_choose_forward, _choose_backward)


@jax.custom_vjp
def _pass_on(x):
    """[S, ...]: what stage s has goes to stage s + 1, and the last's to stage 0. Backwards the same the other way; JAX's own gradient of a roll sends twice."""
    return jnp.roll(x, 1, 0)


_pass_on.defvjp(lambda x: (jnp.roll(x, 1, 0), None), lambda _, gradient: (jnp.roll(gradient, -1, 0),))


def _column(mask, like):
    return mask.reshape(-1, *(1,) * (like.ndim - 1))


def _pin(x, *spec):
    """The first dimensions to the mesh axes; the others are left to XLA."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(spec))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec, *free))
