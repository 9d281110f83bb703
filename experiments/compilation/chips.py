"""Memory and links of the chips that programs can be compiled for; their FLOP/s stand in `experiments.peak_flops`."""

from typing import NamedTuple


class ChipRates(NamedTuple):
    """Published figures of one JAX device; links and network in one direction."""

    hbm_bytes: float
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s out of a device, all its links together: a torus' axes, NVLink
    network_rate: float | None = None  # bytes/s out of a host, per GPU; None: links join all devices


# TPU: docs.cloud.google.com/tpu/docs, "System architecture" of each generation (HBM capacity and bandwidth per chip; half of the
# bidirectional inter-chip bandwidth). A tpu7x chip is two devices, which share its links.
# H100, H200: NVIDIA's data sheets of the SXM boards (HBM3, HBM3e; half of NVLink's 900 GB/s), and of the DGX H100 and H200 (a
# 400 Gb/s port per GPU).
CHIP_RATES = {
    "v5e": ChipRates(16 * 2**30, 819e9, 200e9),
    "v5p": ChipRates(95 * 2**30, 2765e9, 600e9),
    "v6e": ChipRates(32 * 2**30, 1638e9, 400e9),
    "tpu7x": ChipRates(192 * 2**30 / 2, 7380e9 / 2, 600e9 / 2),
    "h100": ChipRates(80e9, 3350e9, 450e9, 50e9),
    "h200": ChipRates(141e9, 4800e9, 450e9, 50e9),
}
