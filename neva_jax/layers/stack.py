"""Many equal blocks as one module with a leading layer axis on every weight, and the way to run it."""

import jax
from flax import nnx


def stack(make_block, num_layers: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`make_block(rngs)` built num_layers times at once: every weight gets layers on axis 0."""
    return nnx.split_rngs(splits=num_layers)(nnx.vmap(make_block, in_axes=0, out_axes=0))(rngs)


def run_stack(blocks: nnx.Module, x: jax.Array, side, *, runner, num_layers: int | None = None) -> jax.Array:
    """x through the first `num_layers` (default: all) of the stacked `blocks`; each is called as `block(x, side)`. runner: see parallel/layer_runner.py."""
    graphdef, *stacked = nnx.split(blocks, nnx.Param, ...)  # weights first: a scan mixes up gradients that go into Refs and, before them, such that do not
    body = lambda x, side, layer: nnx.merge(graphdef, *layer)(x, side)  # noqa: E731
    return runner(body, stacked, x, side) if num_layers is None else runner(body, stacked, x, side, first=num_layers)
