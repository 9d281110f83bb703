"""The public grouped product."""

import functools
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_gemm import reference, xla
from kernels_pallas.select import LazyModule, select
from kernels_pallas.vary import vary_alike

Implementation = Literal["xla", "tpu", "gpu", "reference"]
# A back end is a module with `forward`, `backward_rows` and `backward_weights` as xla.py has them, which raise Unsupported to
# decline a call; the first is the default: no kernel has been timed on a device yet. JAX itself differentiates the reference.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "tpu": LazyModule("kernels_pallas.grouped_gemm.tpu"),
    "gpu": LazyModule("kernels_pallas.grouped_gemm.gpu"),
    "reference": reference,
}


def grouped_gemm(
    x_MD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Rows sorted by group times their group's matrix: y_MF[m] = x_MD[m] @ w_EDF[group of m].

    Group e owns the next `group_sizes_E[e]` rows; any sizes are exact, rows beyond their sum give zeros (and have no
    gradient, whatever they hold), and the sum must not exceed M. Accumulates in float32; y has x's dtype. Differentiable, once,
    in x and w.

    Raises ValueError on shapes that do not fit, and Unsupported on an implementation that cannot do the call.
    """
    if x_MD.ndim != 2 or w_EDF.ndim != 3 or x_MD.shape[1] != w_EDF.shape[1] or 0 in w_EDF.shape:
        raise ValueError(f"grouped_gemm needs x [M, D] and w [E, D, F], got {x_MD.shape} and {w_EDF.shape}")
    if group_sizes_E.shape != w_EDF.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"grouped_gemm needs {w_EDF.shape[0]} integer group sizes, got {group_sizes_E.aval}")
    back_end = select("grouped_gemm", implementation, BACK_ENDS)
    if not x_MD.shape[0]:
        back_end = xla  # nothing for a kernel to do
    args = vary_alike((x_MD, w_EDF, group_sizes_E.astype(jnp.int32)))
    if back_end is reference:
        return reference.grouped_gemm(*args).astype(x_MD.dtype)
    return _multiply(*args, back_end)  # pyright: ignore[reportGeneralTypeIssues]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, back_end) -> jax.Array:
    return back_end.forward(x_MD, w_EDF, sizes_E)


def _multiply_fwd(x_MD, w_EDF, sizes_E, back_end):
    return back_end.forward(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _multiply_bwd(back_end, residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals
    dx_MD = back_end.backward_rows(dy_MF, w_EDF, sizes_E)
    return dx_MD, back_end.backward_weights(x_MD, dy_MF, sizes_E, w_EDF.dtype), None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)
