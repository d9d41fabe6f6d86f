"""What is known of accelerators: dense peak FLOP/s by `device_kind`, from NVIDIA's datasheets (dense = half of the sparse figure)."""

BF16_PEAK = {  # FLOP/s of one device; the first key that the device's kind contains counts
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where it is unknown (a CPU, a card that is not in the table)."""
    return next((peak for name, peak in BF16_PEAK.items() if name in device_kind), None)
