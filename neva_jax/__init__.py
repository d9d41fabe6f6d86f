"""NeVA and LLaVA in JAX and Flax. Importing the package imports nothing heavy: data workers must not start JAX."""

__version__ = "0.1.0"
