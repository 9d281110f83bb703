"""The public products of block-scaled FP8."""

import functools
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.fp8 import BLOCK, Fp8Array
from kernels_pallas.fp8.api import refuse_gradients
from kernels_pallas.fp8_gemm import reference, xla
from kernels_pallas.select import LazyModule, select
from kernels_pallas.vary import vary_alike

Implementation = Literal["xla", "tpu", "gpu", "reference"]
# A back end is a module with `forward(x_MD, x_scale, w_EFD, w_scale, sizes_E, dtype)`, which raises Unsupported to decline a call;
# the first is the default: no kernel has been timed on a device yet.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "tpu": LazyModule("kernels_pallas.fp8_gemm.tpu"),
    "gpu": LazyModule("kernels_pallas.fp8_gemm.gpu"),
    "reference": reference,
}


def fp8_grouped_gemm(
    x: Fp8Array,
    w: Fp8Array,
    group_sizes_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Rows sorted by group times their group's matrix: y_MF[m] = x_MD[m] @ w_EFD[group of m]^T.

    x in tiles of 1x128 (`quantize_activations`); w in blocks of 128x128 (`quantize_weights`), outputs first as in checkpoints.
    Sums over 128 terms are scaled and added up in float32 (DeepSeek-V3, section 3.3.2), or, in XLA and for many rows on TPU, values
    rounded to `dtype` multiplied: the same where scales are powers of two. Groups are as in `grouped_gemm`. Not differentiable.

    Raises ValueError on what does not fit, Unsupported on an implementation that cannot do the call, and TypeError when
    differentiated.
    """
    _check("fp8_grouped_gemm", x, w, group_sizes_E, dtype)
    back_end = select("fp8_grouped_gemm", implementation, BACK_ENDS)
    if not x.shape[0]:
        back_end = xla  # nothing for a kernel to do
    args = x.data, x.scale.astype(jnp.float32), w.data, w.scale.astype(jnp.float32), group_sizes_E.astype(jnp.int32)
    run = functools.partial(back_end.forward, dtype=jnp.dtype(dtype))
    return refuse_gradients("fp8_grouped_gemm", run)(*vary_alike(args))


def fp8_matmul(
    x: Fp8Array,
    w: Fp8Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y_MF = x_MD @ w_FD^T: `fp8_grouped_gemm` with one group."""
    one = Fp8Array(w.data[None], w.scale[None], w.block)
    rows = jnp.full(1, x.shape[0], jnp.int32)
    return fp8_grouped_gemm(x, one, rows, dtype=dtype, implementation=implementation)


def _check(op: str, x: Fp8Array, w: Fp8Array, group_sizes_E: jax.Array, dtype: jax.typing.DTypeLike) -> None:
    if x.data.ndim != 2 or w.data.ndim != 3 or x.shape[1] != w.shape[2] or 0 in w.shape:
        raise ValueError(f"{op} needs x [M, D] and w [E, F, D], got {x.shape} and {w.shape}")
    for name, a, block in (("x", x, (1, BLOCK)), ("w", w, (BLOCK, BLOCK))):
        *leading, rows, columns = a.shape
        grid = (*leading, -(-rows // block[0]), -(-columns // block[1]))
        if a.data.dtype != jnp.float8_e4m3fn or a.block != block or a.scale.shape != grid:
            raise ValueError(
                f"{op} needs {name} in float8_e4m3fn with scales {grid} of blocks {block}, "
                f"got {a.data.dtype} with scales {a.scale.shape} of blocks {a.block}"
            )
    if group_sizes_E.shape != w.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"{op} needs {w.shape[0]} integer group sizes, got {group_sizes_E.aval}")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{op} gives bfloat16, float16 or float32, not {jnp.dtype(dtype)}")
