"""What is known of accelerators: NVIDIA's datasheet numbers (dense, half of the sparse figures), and what a driver reports of their memory and processors.

Sources of PLANNED: datasheets "H100 Tensor Core GPU" (SXM, NVL), "H200", "A100 80GB" and "A100 40GB", "L40S", "HGX B200", whitepaper "Ada GPU Architecture"
(RTX 4090: figures with FP32 accumulation). Memory is what CUDA reports as the card's total, less than the name says. A link is what one GPU sends to the
others of its machine a second, in one direction, half of the datasheets' bidirectional figure: NVLink where the card has it, else PCIe.
"""

from typing import NamedTuple

from neva_jax.errors import UserError

USABLE = 0.93  # of a card's memory; the rest goes to CUDA, NCCL, cuBLAS' workspaces and fragments


class Device(NamedTuple):
    """kind: its `device_kind`; memory in bytes; bandwidth and link in bytes a second; bf16 and fp8 in FLOP/s, None where it has no FP8. The rest describes
    the processor to XLA (see deviceless.py)."""

    kind: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    link: float
    bf16: float
    fp8: float | None
    cores: int
    clock_ghz: float
    l2_cache: int

    @property
    def usable(self) -> int:
        return int(USABLE * self.memory)


def gib(number: float) -> int:
    return int(number * 2**30)


HOPPER = {"capability": (9, 0), "cores": 132, "l2_cache": 50 * 2**20}
AMPERE = {"capability": (8, 0), "cores": 108, "l2_cache": 40 * 2**20, "clock_ghz": 1.41, "link": 300e9, "bf16": 312e12, "fp8": None}

PLANNED = {
    "h100-80g": Device("NVIDIA H100 80GB HBM3", memory=gib(79.1), bandwidth=3.35e12, link=450e9, bf16=989e12, fp8=1979e12, clock_ghz=1.98, **HOPPER),
    "h100-nvl-94g": Device("NVIDIA H100 NVL", memory=gib(93.1), bandwidth=3.9e12, link=300e9, bf16=835e12, fp8=1671e12, clock_ghz=1.785, **HOPPER),
    "h200": Device("NVIDIA H200", memory=gib(139.8), bandwidth=4.8e12, link=450e9, bf16=989e12, fp8=1979e12, clock_ghz=1.98, **HOPPER),
    "a100-40g": Device("NVIDIA A100-SXM4-40GB", memory=gib(39.4), bandwidth=1.555e12, **AMPERE),
    "a100-80g": Device("NVIDIA A100-SXM4-80GB", memory=gib(79.2), bandwidth=2.039e12, **AMPERE),
    "l40s": Device("NVIDIA L40S", (8, 9), gib(44.4), 864e9, 32e9, 362e12, 733e12, 142, 2.52, 96 * 2**20),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", (8, 9), gib(23.6), 1.008e12, 32e9, 165e12, 330e12, 128, 2.52, 72 * 2**20),
    "b200": Device("NVIDIA B200", (10, 0), gib(178.3), 7.7e12, 900e9, 2250e12, 4500e12, 148, 1.965, 126 * 2**20),
}

BF16_PEAK = {  # FLOP/s of one device; the first key that the device's kind contains counts
    "H100 NVL": PLANNED["h100-nvl-94g"].bf16,
    "H100 PCIe": 756e12,
    "H100": PLANNED["h100-80g"].bf16,
    "H200": PLANNED["h200"].bf16,
    "B200": PLANNED["b200"].bf16,
    "A100": PLANNED["a100-80g"].bf16,
    "L40S": PLANNED["l40s"].bf16,
    "RTX 4090": PLANNED["rtx4090"].bf16,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where it is unknown (a CPU, a card that is not in the table)."""
    return next((peak for name, peak in BF16_PEAK.items() if name in device_kind), None)


def planned(name: str) -> Device:
    """The device that --device names."""
    if name not in PLANNED:
        raise UserError(f"--device is {name!r}, expected one of {', '.join(PLANNED)}")
    return PLANNED[name]
