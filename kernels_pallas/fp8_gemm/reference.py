"""y[m] = sum over blocks of 128: (x[m, block] @ w[group of m, :, block]^T) * scale of x * scale of w, in float32."""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_gemm import reference


def forward(
    x_MD: jax.Array,
    x_scale: jax.Array,
    w_EFD: jax.Array,
    w_scale: jax.Array,
    sizes_E: jax.Array,
    *,
    dtype: jnp.dtype,
) -> jax.Array:
    y_MF = jnp.zeros((x_MD.shape[0], w_EFD.shape[1]), jnp.float32)
    for k in range(x_scale.shape[1]):
        block = slice(128 * k, 128 * (k + 1))
        scale_EF = jnp.repeat(w_scale[:, :, k], 128, axis=1)[:, : w_EFD.shape[1]]
        w_EDF = (w_EFD[:, :, block].astype(jnp.float32) * scale_EF[:, :, None]).swapaxes(1, 2)
        y_MF += reference.grouped_gemm(x_MD[:, block].astype(jnp.float32) * x_scale[:, k, None], w_EDF, sizes_E)
    return y_MF.astype(dtype)
