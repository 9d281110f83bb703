"""Sharding-free numeric ops, one folder per op; knows nothing of meshes or models."""

from kernels_pallas import fp8, lightning_indexer
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.fp8_gemm.api import fp8_grouped_gemm, fp8_matmul
from kernels_pallas.grouped_gemm.api import grouped_gemm
from kernels_pallas.linear_cross_entropy.api import CrossEntropyAux, linear_cross_entropy
from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache, mla_decode
from kernels_pallas.select import Unsupported
from kernels_pallas.sparse_attention.api import sparse_attention

__all__ = [
    "CrossEntropyAux",
    "Fp8LatentCache",
    "LatentCache",
    "Mask",
    "Unsupported",
    "expert_mlp",
    "flash_attention",
    "fp8",
    "fp8_grouped_gemm",
    "fp8_matmul",
    "grouped_gemm",
    "lightning_indexer",
    "linear_cross_entropy",
    "mla_decode",
    "sparse_attention",
]
