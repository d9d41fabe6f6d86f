"""Where optimizer state lies when it is split over data too."""

from jax.sharding import NamedSharding, PartitionSpec

from neva_jax.parallel.mesh import make_mesh
from neva_jax.parallel.sharding import also_over_data


def test_layers_are_split_last():
    """Gradients lie as their optimizer state does: one layer's can only be added where every device has a part of every layer."""
    mesh = make_mesh(fsdp=2, tensor=1)
    split = lambda spec, *shape: also_over_data(NamedSharding(mesh, PartitionSpec(*spec)), shape).spec  # noqa: E731
    assert split((), 8, 32, 64) == PartitionSpec(None, "data", None)
    assert split((None, "fsdp"), 8, 32, 64) == PartitionSpec(None, ("fsdp", "data"), None)
    assert split((), 8, 3, 5) == PartitionSpec("data", None, None)
    assert split((), 8) == PartitionSpec("data")
    assert split((), 7) == PartitionSpec(None)
    assert split(()) == PartitionSpec()
