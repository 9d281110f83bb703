"""Block-scaled FP8: e4m3 values with one scale per tile of 1x128 (activations) or block of 128x128 (weights)."""

from kernels_pallas.fp8.api import BLOCK, Fp8Array, dequantize, quantize_activations, quantize_weights

__all__ = ["BLOCK", "Fp8Array", "dequantize", "quantize_activations", "quantize_weights"]
