"""The public grouped product."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_gemm import reference, xla
from kernels_pallas.select import select


def grouped_gemm(
    x_MD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: Literal["reference", "xla"] | None = None,
) -> jax.Array:
    """Rows sorted by group times their group's matrix: y_MF[m] = x_MD[m] @ w_EDF[group of m].

    Group e owns the next `group_sizes_E[e]` rows; any sizes are exact, rows beyond their sum give zeros (and have no
    gradient), and the sum must not exceed M. Accumulates in float32; y has x's dtype. Differentiable in x and w.

    Raises ValueError on shapes that do not fit, and Unsupported on an implementation that is not there.
    """
    if x_MD.ndim != 2 or w_EDF.ndim != 3 or x_MD.shape[1] != w_EDF.shape[1]:
        raise ValueError(f"grouped_gemm needs x [M, D] and w [E, D, F], got {x_MD.shape} and {w_EDF.shape}")
    if group_sizes_E.shape != w_EDF.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"grouped_gemm needs {w_EDF.shape[0]} integer group sizes, got {group_sizes_E.aval}")
    table: dict[str, Callable] = {"xla": _xla, "reference": reference.grouped_gemm}
    run = select("grouped_gemm", implementation, table)
    return run(x_MD, w_EDF, group_sizes_E).astype(x_MD.dtype)


@jax.custom_vjp
def _xla(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return xla.forward(x_MD, w_EDF, sizes_E)


def _xla_fwd(x_MD, w_EDF, sizes_E):
    return xla.forward(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _xla_bwd(residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals
    return *xla.backward(x_MD, w_EDF, sizes_E, dy_MF), None


_xla.defvjp(_xla_fwd, _xla_bwd)
