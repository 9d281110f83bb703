"""The FP8 products in plain JAX: values in `dtype`, then a grouped product."""

import jax
import jax.numpy as jnp

from kernels_pallas.fp8 import BLOCK, xla
from kernels_pallas.grouped_gemm import xla as grouped


def forward(
    x_MD: jax.Array,
    x_scale: jax.Array,
    w_EFD: jax.Array,
    w_scale: jax.Array,
    sizes_E: jax.Array,
    *,
    dtype: jnp.dtype,
) -> jax.Array:
    """y_MF = x_MD @ w[group]^T; zeros beyond the last group."""
    x_MD, w_EFD = (
        xla.dequantize(x_MD, x_scale, (1, BLOCK), dtype),
        xla.dequantize(w_EFD, w_scale, (BLOCK, BLOCK), dtype),
    )
    return grouped.backward_rows(x_MD, w_EFD, sizes_E)
