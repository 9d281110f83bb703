"""y[m] = x[m] @ w[group of m], in float32."""

import jax
import jax.numpy as jnp


def grouped_gemm(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    rows_M1 = jnp.arange(x_MD.shape[0])[:, None]
    ends_1E = jnp.cumsum(sizes_E)[None]
    mine_ME = (rows_M1 < ends_1E) & (rows_M1 >= ends_1E - sizes_E[None])
    some_M1 = mine_ME.any(axis=1, keepdims=True)
    dtype = jnp.promote_types(x_MD.dtype, jnp.float32)
    x_MD = jnp.where(some_M1, x_MD, 0).astype(dtype)
    return jnp.where(some_M1, jnp.einsum("ME,MD,EDF->MF", mine_ME.astype(dtype), x_MD, w_EDF.astype(dtype)), 0)
