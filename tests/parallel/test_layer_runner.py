"""What is kept of a stack for the backward pass and what is computed again: every way gives the same gradients, and the program's own text is counted."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neva_jax.layers.attention import KEEP_OUTPUTS, attend
from neva_jax.layers.rope import Rope
from neva_jax.layers.stack import run_stack, stack
from neva_jax.models.llama import LlamaBlock, LlamaConfig
from neva_jax.parallel.layer_runner import make_runner, scan_layers

L, B, T, D, F, H, G, C = 5, 2, 6, 16, 40, 4, 2, 4
CONFIG = LlamaConfig(
    vocab_size=8, padded_vocab_size=8, num_layers=L, hidden_size=D, ffn_hidden_size=F, num_attention_heads=H, num_query_groups=G, head_dim=C, rope=Rope(C),
    init_std=0.3, output_init_std=0.3,
)  # fmt: skip
WAYS = [(None, None, None), ("selective", None, None), *(("full", "uniform", n) for n in (1, 2, 5, 9)), *(("full", "block", n) for n in (2, 5, 9))]
runner_of = functools.partial(make_runner, attention=KEEP_OUTPUTS["xla"])


@functools.cache
def blocks():
    return stack(lambda rngs: LlamaBlock(CONFIG, attend, rngs=rngs), L, rngs=nnx.Rngs(0))


def loss(weights, x, runner, dtype=jnp.float32):
    graphdef, _ = nnx.split(blocks())
    module = nnx.merge(graphdef, weights)
    if dtype != jnp.float32:
        module.dtype = dtype
    angles = CONFIG.rope.angles(jnp.tile(jnp.arange(T), (B, 1)))
    return jnp.sum(jnp.sin(run_stack(module, x, (angles, jnp.ones((B, T), jnp.int32)), runner=runner).astype(jnp.float32)))


def arguments(dtype=jnp.float32):
    weights = jax.tree.map(lambda a: a.astype(dtype), nnx.split(blocks())[1])
    return weights, jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), dtype)


@pytest.fixture(scope="module")
def plain():
    return jax.jit(jax.value_and_grad(functools.partial(loss, runner=scan_layers), (0, 1)))(*arguments())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_gradients(plain, way, frozen):
    value, (weight_grads, x_grad) = plain
    wrt = 1 if frozen else (0, 1)
    found, grads = jax.jit(jax.value_and_grad(functools.partial(loss, runner=runner_of(*way, frozen=frozen)), wrt))(*arguments())
    np.testing.assert_allclose(found, value, rtol=1e-6)
    expected = jax.tree.leaves(x_grad if frozen else (weight_grads, x_grad))
    for one, other in zip(expected, jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * float(jnp.max(jnp.abs(one))))


def equations(jaxpr, times=1):
    """(equation, how often it runs), those inside loops and calls too."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value), inner)


def traced(way, frozen, dtype=jnp.float32):
    run = functools.partial(loss, runner=runner_of(*way, frozen=frozen), dtype=dtype)
    return jax.make_jaxpr(jax.grad(run, 1 if frozen else (0, 1)))(*arguments(dtype)).jaxpr


def products(way, frozen) -> tuple[float, float]:
    """A layer's GEMMs (products with a weight, or a weight's gradient), and its products inside attention."""
    count = collections.Counter()
    for eqn, times in equations(traced(way, frozen)):
        if eqn.primitive.name == "dot_general":
            count[eqn.params["dimension_numbers"][1] != ((), ())] += times / L
    return count[False], count[True]


@pytest.mark.parametrize(
    ("way", "again", "attention", "attention_trained"),
    [
        ((None, None, None), 0, 0, 0),
        (("selective", None, None), 0, 1, 2),  # the scores; the product with the values is o_proj's input, which only its weight's gradient reads
        (("full", "uniform", 1), 6, 2, 2),  # not down_proj, whose output is the next layer's kept input
        (("full", "block", 2), 6 * 2 / L, 2 * 2 / L, 2 * 2 / L),
    ],
)
def test_how_many_products_are_computed_again(way, again, attention, attention_trained):
    """7 forward, 7 for the activations' gradients, 7 for the weights' where they train; attention 2 and 4."""
    assert products(way, frozen=True) == pytest.approx((14 + again, 6 + attention))
    assert products(way, frozen=False) == pytest.approx((21 + again, 6 + attention_trained))


def kept(way, frozen, dtype) -> list[tuple]:
    """(shape, dtype) without the layer axis of everything that the forward loop leaves for the backward loop."""
    scan = next(eqn for eqn, _ in equations(traced(way, frozen, dtype)) if eqn.primitive.name == "scan")
    outputs = zip(scan.outvars, scan.params["jaxpr"].jaxpr.outvars, strict=True)
    return sorted((inside.aval.shape, str(inside.aval.dtype)) for out, inside in outputs if out.aval.shape != inside.aval.shape)  # those are not carried on


WIDE, HEADS, GROUPS, GATE = ((B, T, D), "bfloat16"), ((B, T, H, C), "bfloat16"), ((B, T, G, C), "bfloat16"), ((B, T, F), "bfloat16")


@pytest.mark.parametrize("frozen", [False, True])
def test_only_what_the_gradient_of_the_activations_needs_is_kept(frozen):
    """Two norms' inputs, q, k, v, gate and up; no GEMM's input, nothing in fp32, no weight's copy. Without `selective` also what attention's products gave:
    its scores, and its output where o_proj trains."""
    needed = sorted([WIDE, WIDE, HEADS, GROUPS, GROUPS, GATE, GATE])
    assert kept(("selective", None, None), frozen, jnp.bfloat16) == needed
    assert kept(("full", "uniform", 1), frozen, jnp.bfloat16) == [WIDE]
    more = collections.Counter(kept((None, None, None), frozen, jnp.bfloat16)) - collections.Counter(needed)
    assert sorted((int(np.prod(shape)), dtype) for shape, dtype in more) == [(B * T * H * C, "bfloat16")] * (not frozen) + [(B * H * T * T, "float32")]


def test_a_part_of_a_frozen_stack_is_no_copy():
    """A tower's last blocks are not run: the others are read where they lie."""
    weights, x = arguments()
    frozen, trained = (functools.partial(scan_layers, frozen=frozen) for frozen in (True, False))

    def run(runner, weights, x):
        module = nnx.merge(nnx.split(blocks())[0], weights)
        return run_stack(module, x, (CONFIG.rope.angles(jnp.tile(jnp.arange(T), (B, 1))), None), runner=runner, num_layers=3)

    def copies(runner):
        jaxpr = jax.make_jaxpr(functools.partial(run, runner))(weights, x).jaxpr
        return [eqn for eqn, times in equations(jaxpr) if times == 1 and any(v.aval.ndim == 3 and v.aval.shape[0] == 3 for v in eqn.outvars)]

    np.testing.assert_array_equal(run(frozen, weights, x), run(trained, weights, x))
    three = jax.tree.map(lambda a: a[:3], weights)
    graphdef = nnx.split(blocks())[0]
    side = (CONFIG.rope.angles(jnp.tile(jnp.arange(T), (B, 1))), None)
    np.testing.assert_array_equal(run_stack(nnx.merge(graphdef, three), x, side, runner=scan_layers), run(frozen, weights, x))
    assert copies(trained), "the search finds them"
    assert not copies(frozen)
