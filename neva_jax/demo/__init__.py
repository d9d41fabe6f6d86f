"""A page to try a model: a chat with pictures in the browser. From a shell `python -m neva_jax.demo --model PATH`; in a notebook

    from neva_jax import demo
    demo.build(vlm).launch(**demo.look())

which has neither the command's token nor its limits on requests.
"""

from neva_jax.demo.page import build, look

__all__ = ["build", "look"]
