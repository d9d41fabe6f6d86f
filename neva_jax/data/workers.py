"""Where worker processes are born: no device in sight, and without the program's own imports (train.py brings Flax and Orbax: 8 copies for 8 workers)."""

import contextlib
import os
import sys

# The tracker of shared memory warns of what an interrupted run leaves, which it cleans up itself.
BORN_INTO = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker"}


@contextlib.contextmanager
def birthplace():
    """Processes that are spawned inside start bare. What they get to run must not live in `__main__`, or be pickled by value as Grain does."""
    main = sys.modules["__main__"]
    environment = {name: os.environ.get(name) for name in BORN_INTO}
    origin = {name: vars(main).pop(name) for name in ("__spec__", "__file__") if name in vars(main)}  # by these a spawned process imports it again
    main.__spec__ = None
    os.environ.update(BORN_INTO)
    try:
        yield
    finally:
        vars(main).update(origin)
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
