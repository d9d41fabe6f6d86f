"""XLA ends a process over a flag that it does not know: those are found by name before, as XLA itself judges them."""

import os
import subprocess
import sys

import pytest

from neva_jax.parallel.xla_flags import filter_environment, libraries, unknown_flags

KNOWN = ("xla_gpu_enable_triton_gemm", "xla_force_host_platform_device_count", "xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_deterministic_ops")
GONE = ("xla_gpu_enable_custom_fusions", "xla_gpu_graph_level", "xla_gpu_enable_triton", "not_a_flag")  # in tutorials still, or a part of a name


def test_names():
    text = " ".join([f"--{name}=1" for name in KNOWN] + [f"--{name}=1" for name in GONE])
    assert libraries() and unknown_flags(text, libraries()) == list(GONE)
    assert unknown_flags(text, []) == []


@pytest.mark.parametrize("name", [KNOWN[0], GONE[0]])
def test_xla_judges_so(name):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--{name}=1"}
    result = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True)
    assert (result.returncode != 0 and name in result.stderr) == (name in GONE)


def test_environment(monkeypatch, caplog):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_graph_level=0 --xla_gpu_enable_triton_gemm=false --xla_dump_to='/a b'")
    filter_environment()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=false '--xla_dump_to=/a b'"
    assert "xla_gpu_graph_level dropped" in caplog.text
    caplog.clear()
    filter_environment()
    assert not caplog.text


def test_a_command_goes_on():
    """A whole command under a flag that would end it."""
    environment = os.environ | {"XLA_FLAGS": "--xla_gpu_graph_level=0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "neva_jax.plan", "--config=configs/pretrain.py", "--device=card"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "xla_gpu_graph_level dropped" in result.stderr and "expected one of h100-80g" in result.stderr
