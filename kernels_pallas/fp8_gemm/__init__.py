"""Matrix products of block-scaled FP8."""

from kernels_pallas.fp8_gemm.api import fp8_grouped_gemm, fp8_matmul

__all__ = ["fp8_grouped_gemm", "fp8_matmul"]
