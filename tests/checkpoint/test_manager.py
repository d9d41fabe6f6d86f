"""What is kept: the newest always, the best `save_top_k` beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neva_jax.checkpoint import stream
from neva_jax.checkpoint.manager import Checkpoints
from neva_jax.checkpoint.stream import open_lazily
from neva_jax.errors import UserError


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


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def test_chunks_of_a_sharded_step(tmp_path, monkeypatch):
    """Weights and moments alike: chunks of one layer, within a shard and CHUNK bytes; restored onto another mesh."""
    monkeypatch.setattr(stream, "CHUNK", 1024)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("pipeline", "tensor"))
    place = jax.sharding.NamedSharding(mesh, jax.P("pipeline", None, "tensor"))
    weight = {"llm/layers/q_proj/kernel": jax.device_put(np.random.default_rng(0).standard_normal((6, 32, 64), np.float32), place)}
    whole = {"params": weight, "opt_state": ({"mu": weight, "count": jnp.int32(3)}, ()), "skipped": jnp.int32(0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, whole, {}, {})
    checkpoints.close()
    for item, path in (("trainable", "llm/layers/q_proj/kernel"), ("optimizer", "opt_state/0/mu/llm/layers/q_proj/kernel")):
        assert open_lazily(tmp_path / "1" / item)[path]._store.chunk_layout.read_chunk.shape == (1, 32, 8)  # of a shard (3, 32, 16)
    target = abstract(jax.device_put(whole, jax.devices()[3]))
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.restore(1, target)
    checkpoints.close()
    assert jax.tree.all(jax.tree.map(lambda a, b, t: bool((np.asarray(a) == np.asarray(b)).all()) and a.sharding == t.sharding, found, whole, target))


def test_restore_of_what_is_not_there(tmp_path, capfd):
    """Weights that the step lacks, has beyond the config, or holds in another shape, and a damaged file: one error that names the step."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state(0.1), {}, {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    good = abstract(state(0.1))
    more = good["params"] | {"a/c": good["params"]["a/b"]}
    wide = {"a/b": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=good["params"]["a/b"].sharding)}
    for params, said in ((more, "1 missing .a/c."), ({"a/c": more["a/c"]}, "1 missing .a/c., 1 more .a/b."), (wide, r"a/b has the shape \[3\]")):
        with pytest.raises(UserError, match=f"{said}.*or remove {tmp_path / '7'} to resume"):
            checkpoints.restore(7, good | {"params": params})
    (tmp_path / "7/optimizer/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=f"optimizer: cannot be read.*or remove {tmp_path / '7'} to resume"):
        checkpoints.restore(7, good)
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err
