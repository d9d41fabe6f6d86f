"""The pipeline's runner against the plain scan, on a stack of small layers; where a stack lives, and how a global batch is cut into rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops
from jax.sharding import NamedSharding, PartitionSpec

from neva_jax.parallel.layer_runner import make_runner, scan_layers
from neva_jax.parallel.mesh import make_mesh
from neva_jax.parallel.pipeline import Pipeline, pipeline_layers

L, D, T = 8, 16, 6


@jax.custom_vjp
def seen(x, amax):
    """x; the "gradient" of amax is the largest magnitude of x, and what several uses of a layer saw is put together by maximum."""
    return x


seen.defvjp(lambda x, amax: (x, jnp.max(jnp.abs(x))), lambda largest, gradient: (gradient, jax.lax.convert_element_type(largest, fp8_ops.fm32)))


def body(x, side, layer):
    """What is seen is largest where x is 0, as it is in a stage that is idle, and never in a row."""
    positions, segments = side
    x = x + 0.01 * seen(jnp.exp(-x), layer["amax"])
    return x + jnp.tanh((x - 5) @ layer["kernel"] + layer["bias"] + positions[..., None]) * (segments[..., None] > 0) / L


def weights() -> dict:
    rng = np.random.default_rng(0)
    kernel, bias = 0.3 * rng.normal(size=(L, D, D)), rng.normal(size=(L, D))
    return {"kernel": np.float32(kernel), "bias": np.float32(bias), "amax": np.zeros(L, np.float32)}


def loss(layers, x, side, runner):
    layers = layers | {"amax": jax.lax.convert_element_type(layers["amax"], fp8_ops.fm32)}
    return jnp.sum(jnp.sin(runner(body, layers, x, side)))


@pytest.mark.parametrize(("stages", "virtual", "count", "inner"), [
    (2, 1, 4, scan_layers), (2, 1, 3, scan_layers), (4, 1, 2, scan_layers), (2, 2, 4, scan_layers), (2, 4, 2, scan_layers),
    (4, 2, 8, make_runner("full", "uniform", 1)),
])  # fmt: skip
def test_equals_the_scan(stages, virtual, count, inner):
    """Values, gradients of weights and inputs, and maxima over micro-batches, to which the ticks of an idle stage add nothing."""
    pipeline, mesh, rng = Pipeline(stages, virtual, count), make_mesh(pipeline=stages, devices=jax.devices()[: 2 * stages]), np.random.default_rng(1)
    x, positions = (rng.normal(size=(2 * count, T, *more)).astype(np.float32) for more in ((D,), ()))
    x = 5 + np.clip(x, -2, 2)
    side = positions, (rng.random(positions.shape) > 0.3).astype(np.int32)
    stacked = weights()
    expected, (layers, inputs) = jax.jit(jax.value_and_grad(functools.partial(loss, runner=scan_layers), (0, 1)))(stacked, x, side)
    runner = functools.partial(pipeline_layers, pipeline=pipeline, inner=inner)
    with jax.set_mesh(mesh):
        place = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("pipeline")))  # noqa: E731
        live = pipeline.live({f"llm/layers/{name}": place(array) for name, array in stacked.items()})
        live = {name.rpartition("/")[2]: array for name, array in live.items()}
        value, (found, ours) = jax.jit(jax.value_and_grad(functools.partial(loss, runner=runner), (0, 1)))(live, x, side)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(ours, inputs, atol=1e-5)
    for name in stacked:
        rest = np.asarray(found[name]).reshape(stacked[name].shape)
        np.testing.assert_allclose(rest, layers[name], atol=1e-5 * np.max(np.abs(layers[name])), err_msg=name)
    assert np.min(np.asarray(found["amax"])) > 0


def test_rows_that_no_round_divides_are_refused_where_micro_batches_must_go_in_groups():
    runner = functools.partial(pipeline_layers, pipeline=Pipeline(2, 2, 4), inner=scan_layers)
    with pytest.raises(ValueError, match="3 rows cannot be cut into a multiple of 2"):
        runner(body, {}, jnp.zeros((3, T, D)), (None, None))


def test_a_stack_at_rest_and_live():
    """Device s holds the layers (v S + s) n ... (v S + s) n + n - 1, for every v; only the language model's stack moves, with all that is kept beside it."""
    mesh, pipeline = make_mesh(pipeline=2, tensor=2, devices=jax.devices()[:4]), Pipeline(2, 4, 4)
    kernel = jax.device_put(np.arange(8 * 4 * 6).reshape(8, 4, 6), NamedSharding(mesh, PartitionSpec("pipeline", None, "tensor")))
    other = jax.device_put(np.arange(8), NamedSharding(mesh, PartitionSpec()))
    tree = {"params": {"llm/layers/kernel": kernel, "vision_encoder/layers/bias": other, "count": jnp.int32(3)}}
    before = np.asarray(kernel)
    described = pipeline.live(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree))
    live = pipeline.live(tree)
    assert live["params"]["vision_encoder/layers/bias"] is other and described["params"]["llm/layers/kernel"].shape == (4, 2, 1, 4, 6)
    array = live["params"]["llm/layers/kernel"]
    assert array.sharding == described["params"]["llm/layers/kernel"].sharding
    for shard in array.addressable_shards:
        stage = shard.index[1].start
        held = np.asarray(shard.data)[:, 0, :, :, 0].reshape(4, 4)
        np.testing.assert_array_equal(held, before[[stage, 2 + stage, 4 + stage, 6 + stage], :, shard.index[4].start])
    assert kernel.is_deleted(), "one after the other takes the place of its own"
    rest = pipeline.rest(live)["params"]["llm/layers/kernel"]
    np.testing.assert_array_equal(rest, before)
    assert rest.sharding.spec == PartitionSpec("pipeline", None, "tensor") and not array.is_deleted()


def test_one_virtual_stage_lives_as_it_rests():
    tree = {"llm/layers/kernel": jnp.ones((8, 2))}
    assert Pipeline(4, 1, 8).live(tree)["llm/layers/kernel"] is tree["llm/layers/kernel"]


def test_rounds():
    """Every row once, each shard's rows in its own part of a round, and weights beside their rows."""
    field = np.arange(6 * 4).reshape(6, 4)  # 6 micro-batches of 4 rows, of which 2 data shards hold 2 each
    rounds = np.asarray(Pipeline(2, 1, 3).fold(field))
    assert rounds.shape == (2, 12) and sorted(rounds.ravel()) == list(range(24))
    assert {int(n) % 4 for n in rounds[:, :6].ravel()} == {0, 1} and {int(n) // 12 for n in rounds[0]} == {0}
    np.testing.assert_array_equal(Pipeline().fold(field), field)


def test_idle_share():
    assert Pipeline(4, 1, 16).bubble == 3 / 19 and Pipeline(4, 2, 16).bubble == 3 / 35 and Pipeline().bubble == 0
