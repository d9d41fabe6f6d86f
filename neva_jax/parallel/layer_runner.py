"""How a stack of layers is run, and what of it is kept for the backward pass. A runner is `(body, stacked, x, side) -> x`:
`body(x, side, layer)` is one layer, `stacked` its weights with layers on axis 0, `side` what every layer reads (angles, segments).

Models are handed a runner and do not know which; the pipeline is another value of this type. Those that run towers also take `first`: only so many layers.

Blocks mark with `keep` what their backward pass reads and only a GEMM could make again; all else is cheap and made again. That is the same for a frozen stack
as for one that trains, since a GEMM's own input, which its weight's gradient reads, lies one norm, activation or rotation behind something that is kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"

# A loop's backward pass is another loop, which XLA cannot merge with it. Told to prevent that, it copies all that a layer has kept before it uses any of it.
remat = functools.partial(jax.checkpoint, prevent_cse=False)


def keep(x: jax.Array) -> jax.Array:
    """x, kept for the backward pass: the input of a norm, of an activation function, of the attention kernel."""
    return checkpoint_name(x, KEPT)


def scan_layers(body, stacked, x, side, *, first: int | None = None, frozen: bool = False, how=None):
    """One layer after the other, compiled once; everything is kept that the backward pass wants, or what `how` says.

    frozen: nothing of the stack trains; layers are read where they lie, and a part of the stack is no copy. (Such a reading's gradient is a whole stack.)
    """
    if frozen:
        body, stacked = _by_index(body, stacked)
    if first is not None:
        stacked = _part(stacked, 0, first)
    return (how or _scan)(body, stacked, x, side)


def _by_index(body, stacked):
    """The same body for what takes the place of `stacked`: layers' numbers. FP8 scales, which have gradients of their own, are still handed in one by one."""
    leaves, tree = jax.tree.flatten(stacked)
    scales = {n: leaf for n, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jax.dtypes.extended)}

    def indexed(x, side, layer):
        number, mine = layer
        one = [mine[n] if n in mine else jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False) for n, leaf in enumerate(leaves)]
        return body(x, side, tree.unflatten(one))

    return indexed, (jnp.arange(_length(stacked)), scales)


def _scan(body, stacked, x, side):
    return jax.lax.scan(lambda x, layer: (body(x, side, layer), None), x, stacked)[0]


def _scan_kept(body, stacked, x, side, *, also=None):
    """also: a policy that holds for further outputs to keep, those of the attention kernel."""
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(KEPT)
    return _scan(remat(body, policy=policies.save_from_both_policies(policy, also) if also else policy), stacked, x, side)


def _scan_uniform(body, stacked, x, side, *, size: int, inner):
    """Groups of `size` layers; only a group's input is kept, and within the group that is computed again, what `inner` keeps."""
    if size == 1:
        return _scan(remat(body), stacked, x, side)
    length = _length(stacked)
    size = min(size, length)
    whole = length - length % size
    grouped = jax.tree.map(lambda a: a.reshape(whole // size, size, *a.shape[1:]), _part(stacked, 0, whole))
    group = lambda x, side, layers: inner(body, layers, x, side)  # noqa: E731
    x = _scan(remat(group), grouped, x, side)
    return x if whole == length else jax.checkpoint(group)(x, side, _part(stacked, whole, length))


def _scan_block(body, stacked, x, side, *, size: int, inner):
    """The first `size` layers keep only their input, the others what `inner` keeps."""
    length = _length(stacked)
    x = _scan(remat(body), _part(stacked, 0, min(size, length)), x, side)
    return x if size >= length else inner(body, _part(stacked, size, length), x, side)


def _length(stacked) -> int:
    return jax.tree.leaves(stacked)[0].shape[0]


def _part(stacked, start: int, stop: int):
    """Layers start .. stop - 1. (Not a[start:stop]: its gradient cannot be added to a reference in jax 0.10.2, which training/step.py does.)"""
    if (start, stop) == (0, _length(stacked)):
        return stacked
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, stop - start), stacked)


def make_runner(granularity: str | None = None, method: str | None = None, num_layers: int | None = None, *, attention=None, frozen: bool = False):
    """NeMo's `activations_checkpoint_{granularity,method,num_layers}` as a runner.

    null: no GEMM and no attention is computed twice. selective: attention is. full: whole layers are, in groups of num_layers (uniform; the last may be
    smaller) or the first num_layers (block). attention: the policy that keeps the kernel's outputs, see layers/attention.py. frozen: see scan_layers.
    """
    how = functools.partial(_scan_kept, also=None if granularity == "selective" else attention)
    if granularity == "full":
        how = functools.partial({"uniform": _scan_uniform, "block": _scan_block}[method], size=num_layers or 1, inner=how)
    return functools.partial(scan_layers, frozen=frozen, how=how)
