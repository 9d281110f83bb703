"""The rate that MFU is a share of: a device's published peak, or a rate measured on the spot."""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# bfloat16 dense FLOP/s of one JAX device, by its `device_kind`. The first match counts.
# Sources: cloud.google.com/tpu/docs (system architecture, one page per generation); NVIDIA's data sheets of A100, H100,
# H200, B200 and L4 without sparsity. T4 (data sheet) has no bfloat16: its float16 rate. A tpu7x chip (2,307 TFLOP/s)
# is two devices.
_TERA_FLOPS = (
    (r"TPU v4$", 275),
    (r"TPU v5 ?(lite|e)", 197),
    (r"TPU v5p?$", 459),
    (r"TPU v6 ?(lite|e)", 918),
    (r"TPU ?(v)?7x", 2307 / 2),
    (r"\bA100\b", 312),
    (r"\bH100 PCIe\b", 756),
    (r"\bH100 NVL\b", 835),
    (r"\bH[12]00\b", 989.4),
    (r"\bB200\b", 2250),
    (r"\bL4\b", 121),
    (r"\bT4\b", 65),
)


class Peak(NamedTuple):
    flops: float  # FLOP/s of all devices together
    line: str  # says what it is, for the log


def peak_flops(device_kind: str) -> float | None:
    """Published bfloat16 dense FLOP/s of one device of this kind; None if it is not in the table."""
    return next((1e12 * tera for pattern, tera in _TERA_FLOPS if re.search(pattern, device_kind)), None)


def find_peak(devices: Sequence[Any]) -> Peak:
    """The peak of these devices together. Takes 0.3 s where it must be measured; call it outside any mesh."""
    device = devices[0]
    if flops := peak_flops(device.device_kind):
        line = f"MFU is counted against {flops / 1e12:.4g} TFLOP/s (bf16 peak of one {device.device_kind}) x {len(devices)}"
        return Peak(flops * len(devices), line)
    measured = measure_matmul_flops(jax.local_devices()[0])
    # The virtual devices of a host's CPU share its cores: one of them can use them all.
    count = len({d.process_index for d in devices}) if device.platform == "cpu" else len(devices)
    line = f"MFU is counted against {measured / 1e9:.0f} GFLOP/s x {count}: float32 matrix products, measured just now"
    return Peak(measured * count, line)


def measure_matmul_flops(device: Any, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few float32 products of two size x size matrices."""
    x = jax.device_put(np.ones((size, size), np.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
