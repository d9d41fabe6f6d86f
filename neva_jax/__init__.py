"""NeVA and LLaVA in JAX and Flax. Importing the package imports nothing heavy: data workers must not start JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "from_pretrained":
        from neva_jax.vlm import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
