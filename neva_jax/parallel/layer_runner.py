"""How a stack of layers is run, and what of it is kept for the backward pass. A runner is `(body, stacked, x, side) -> x`:
`body(x, side, layer)` is one layer, `stacked` its weights with layers on axis 0, `side` what every layer reads (angles, segments).

Models are handed a runner and do not know which; the pipeline will be another value of this type.
"""

import functools

import jax


def scan_layers(body, stacked, x, side):
    """One layer after the other, compiled once; everything the backward pass wants is kept."""
    return jax.lax.scan(lambda x, layer: (body(x, side, layer), None), x, stacked)[0]


def scan_remat_uniform(body, stacked, x, side, *, num_layers: int = 1):
    """Groups of `num_layers` layers; only each group's input is kept (NeMo: full, uniform)."""
    length = jax.tree.leaves(stacked)[0].shape[0]
    size = min(num_layers, length)
    whole = length - length % size
    grouped = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), stacked)
    group = jax.checkpoint(lambda x, side, layers: scan_layers(body, layers, x, side))
    x = scan_layers(group, grouped, x, side)
    return x if whole == length else group(x, side, jax.tree.map(lambda a: a[whole:], stacked))


def scan_remat_block(body, stacked, x, side, *, num_layers: int = 1):
    """The first `num_layers` layers keep only their input, the others everything (NeMo: full, block)."""
    size = min(num_layers, jax.tree.leaves(stacked)[0].shape[0])
    x = scan_layers(jax.checkpoint(body), jax.tree.map(lambda a: a[:size], stacked), x, side)
    return scan_layers(body, jax.tree.map(lambda a: a[size:], stacked), x, side)


def make_runner(granularity: str | None, method: str | None, num_layers: int | None):
    """NeMo's `activations_checkpoint_{granularity,method,num_layers}` as a runner. `selective` recomputes inside attention, not here."""
    if granularity != "full":
        return scan_layers
    runner = {"uniform": scan_remat_uniform, "block": scan_remat_block}[method]
    return functools.partial(runner, num_layers=num_layers or 1)
