"""Tests run on the CPU with 8 fake devices, compiled quickly rather than well; that is said before JAX starts. They find the modules of the
repository (configs, train) by path."""

import logging
import os
import sys
import tempfile
from pathlib import Path

import numpy
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="neva_jax_tests_"))  # many tests compile the same tiny step
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from neva_jax.parallel.xla_flags import filter_environment  # noqa: E402

filter_environment()


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    """A run sets its mesh and the logs' levels for the whole process; the tests of another file begin without, in whatever order files come."""
    levels = {name: logging.getLogger(name).level for name in (None, "neva_jax", "train", "__main__")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if jax := sys.modules.get("jax"):
        jax.set_mesh(jax.sharding.Mesh(numpy.empty((), object), ()))
