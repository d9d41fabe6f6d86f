"""NeMo's optimizers, from optax, as directions: the step multiplies by the learning rate. Factors and decay of each path come from the trainable table."""

import jax
import optax

from neva_jax.errors import UserError
from neva_jax.transforms.select import Row, decays

ADAMW = ("adamw", "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim")
SHARDED_OVER_DATA = ("distributed_fused_adam", "mcore_distributed_optim")  # ZeRO-1: moments split over the data axis
OPTIMIZERS = (*ADAMW, "adam", "sgd")


def make_optimizer(
    name: str, rows: dict[str, Row], *, betas: tuple[float, float], eps: float, weight_decay: float, decay_all: bool = False
) -> optax.GradientTransformation:
    """rows: {path: row of the trainable table}. decay_all: NeMo's do_layer_norm_weight_decay. apex's and torch's AdamW decouple the decay, `adam` does not."""
    decay = {
        path: row.weight_decay if row.weight_decay is not None else weight_decay * (decay_all or decays(path)) for path, row in rows.items()
    }
    factor = {path: row.lr_factor for path, row in rows.items()}

    def add_decay(updates, params):
        return {path: update + decay[path] * params[path] if decay[path] else update for path, update in updates.items()}

    def scale(updates, params):
        return {path: -factor[path] * update for path, update in updates.items()}

    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    if name in ADAMW:
        return optax.chain(adam, optax.stateless(add_decay), optax.stateless(scale))
    if name == "adam":
        return optax.chain(optax.stateless(add_decay), adam, optax.stateless(scale))
    if name == "sgd":
        return optax.chain(optax.stateless(add_decay), optax.stateless(scale))
    raise UserError(f"model.optim.name {name!r} is unknown; known are {', '.join(OPTIMIZERS)}")


def clip_factor(norm: jax.Array, clip: float | None) -> jax.Array | float:
    """What gradients of global norm `norm` are multiplied by: min(1, clip / (norm + 1e-6)), NeMo's (apex's) formula."""
    return jax.numpy.minimum(1.0, clip / (norm + 1e-6)) if clip else 1.0
