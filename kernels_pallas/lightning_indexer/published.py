"""How the published inference code scores: index queries and keys are rotated, then quantized to FP8."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import fp8


def hadamard(x: jax.Array) -> jax.Array:
    """x H J^-0.5 over the last dim, J a power of two, in x's dtype; H is Sylvester's Hadamard matrix.

    Orthogonal and its own inverse, so that products of queries and keys that are both rotated stay what they were, but for
    rounding; outliers are spread over all J numbers, which FP8 wants. Differentiable.

    Raises ValueError if J is no power of two.
    """
    width = x.shape[-1]
    if width & (width - 1) or not width:
        raise ValueError(f"hadamard: the last dim is {width}; it must be a power of two")
    matrix_JJ = np.ones((1, 1))
    while len(matrix_JJ) < width:
        matrix_JJ = np.block([[matrix_JJ, matrix_JJ], [matrix_JJ, -matrix_JJ]])
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rotated = jnp.matmul(x.astype(dtype), matrix_JJ.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return (rotated * width**-0.5).astype(x.dtype)


def to_fp8(
    q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array, k_scale_BS: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(q, w, k, k_scale_BS) for `select_keys`: q and k in e4m3, with one scale for each token's head of q and each token of k.

    Scales are powers of two (ue8m0): those of q go into w, those of k are returned, so scoring is exact but for the values'
    own rounding. Not differentiable: select only. k_scale_BS: that of keys which `keys_to_fp8` made already.

    Raises ValueError on heads wider than the 128 numbers that share a scale.
    """
    if k_scale_BS is None:
        k_BSJ, k_scale_BS = keys_to_fp8(k_BSJ)
    q = fp8.quantize_activations(jax.lax.stop_gradient(q_BTIJ), ue8m0=True)
    return q.data, w_BTI * q.scale[..., 0], k_BSJ, k_scale_BS


def keys_to_fp8(k_BSJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys in e4m3 and their scales [B, S], as a cache keeps them. Raises ValueError as `to_fp8`."""
    if k_BSJ.shape[-1] > fp8.BLOCK:
        raise ValueError(
            f"to_fp8: index heads of {k_BSJ.shape[-1]} numbers have more than one scale; at most {fp8.BLOCK}"
        )
    k = fp8.quantize_activations(jax.lax.stop_gradient(k_BSJ), ue8m0=True)
    return k.data, k.scale[..., 0]
