"""Attention of a few new tokens over a cache of latents (absorbed MLA)."""

from kernels_pallas.mla_decode.api import mla_decode
from kernels_pallas.mla_decode.cache import Fp8LatentCache, LatentCache
from kernels_pallas.mla_decode.combine import combine

__all__ = ["Fp8LatentCache", "LatentCache", "combine", "mla_decode"]
