"""Initial values, all fp32: masters are fp32, and what is frozen is cast when it is placed."""

import jax
import jax.numpy as jnp


def normal(std: float):
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def uniform_fan_in(key, shape):
    """torch.nn.Linear's default: U(-1/sqrt(in), 1/sqrt(in)); NeVA's projector is born with it."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zeros(key, shape):
    return jnp.zeros(shape, jnp.float32)


def ones(key, shape):
    return jnp.ones(shape, jnp.float32)
