"""What is kept: the newest always, the best `save_top_k` beside it."""

import jax
import jax.numpy as jnp
import pytest

from neva_jax.checkpoint.manager import Checkpoints


def state(value: float) -> dict:
    return {"params": {"a/b": jnp.full(3, value)}, "opt_state": ({"mu": {"a/b": jnp.zeros(3)}}, ()), "skipped": jnp.int32(0)}


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"save_top_k": 2}, [1, 2, 5]),
        ({"save_top_k": 1, "mode": "max"}, [4, 5]),
        ({"save_top_k": 0}, [5]),
        ({"save_top_k": -1}, [1, 2, 3, 4, 5]),
        ({"save_top_k": 2, "save_last": False}, [1, 2]),
    ],
)
def test_kept(tmp_path, settings, kept):
    checkpoints = Checkpoints(tmp_path, **settings)
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0, None], 1):  # the newest has no val_loss: stopped between validations
        checkpoints.save(step, state(step), {"global_step": step}, {} if loss is None else {"val_loss": loss})
    checkpoints.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == kept


def test_round_trip(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state(0.1), {"global_step": 7, "name": "x"}, {"val_loss": 1.0})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 7 and checkpoints.meta(7) == {"global_step": 7, "name": "x"}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state(0.0))
    found = checkpoints.restore(7, target)
    assert jax.tree.structure(found) == jax.tree.structure(state(0.0))
    assert (found["params"]["a/b"] == state(0.1)["params"]["a/b"]).all()
    checkpoints.close()
