"""GPUs that are not there, to compile for. The wheels of jax[cuda12] (or cuda13) hold all that XLA needs but a description of the card, which stands here.

Given up: XLA's choice of kernels by timing them, so a time can't be read from what is compiled, and cost_analysis(), which is None.
"""

import contextlib
import os

import jax
from jax.experimental import topologies

from neva_jax.errors import UserError
from neva_jax.parallel.devices import Device

# Per multiprocessor: shared memory and what of it a block may have, in KiB, threads, and fp32 units.
PROCESSORS = {8: (164, 163, 2048, 64), 9: (228, 227, 2048, 128), 10: (228, 227, 2048, 128)}
ADA = (100, 99, 1536, 128)

# cuBLAS is fixed: with Triton's GEMMs allowed and no GPU to time them on, the choice is arbitrary, compiling takes three times as long, and FP8 gets lost.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class NoCudaWheels(UserError):
    """Nothing can be compiled for a GPU here."""


def stay_on_cpu() -> None:
    """To be called before JAX opens a backend: no GPU is looked for, whatever JAX_PLATFORMS says."""
    jax.config.update("jax_platforms", "cpu")
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":  # jax's own default; the wheels read it when they are loaded
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA would warn at length of each step that needs more memory than the card has


def cpu_devices(count: int) -> list:
    """`count` devices of this machine's CPU, to describe arrays on where nothing is compiled."""
    with contextlib.suppress(RuntimeError):  # a backend is open already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"JAX has opened {len(devices)} CPU devices already, {count} are needed to describe the mesh; plan in a process of its own")
    return devices[:count]


def absent_devices(device: Device, count: int) -> list:
    """`count` devices of one machine, to build a mesh of and compile for; arrays can't be put on them. NoCudaWheels where the wheels are missing."""
    try:
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=target_config(device)).devices)
    except NotImplementedError:
        raise NoCudaWheels('jax cannot compile for GPUs here: its CUDA wheels are missing; pip install -e ".[cuda12]" brings them, no GPU needed') from None


def target_config(device: Device) -> str:
    """XLA's GpuTargetConfigProto as text. Without runtime_version XLA leaves FP8 GEMMs in bf16 without a word."""
    major, minor = device.capability
    shared, optin, threads, units = ADA if device.capability == (8, 9) else PROCESSORS[major]
    accelerated = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    links = "device_interconnect_info { active_links: 18 }" if major >= 9 and device.link >= 450e9 else ""
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024} shared_memory_per_block_optin: {optin * 1024}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: {device.cores} fpus_per_core: {units}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {device.l2_cache} clock_rate_ghz: {device.clock_ghz} device_memory_size: {device.memory}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {accelerated} }}
      driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
      device_vendor: "NVIDIA Corporation" name: "{device.kind}" {links}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{device.kind}"
    """
