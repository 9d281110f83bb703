"""The public FP8 formats: quantize and dequantize."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.fp8 import reference, xla
from kernels_pallas.select import LazyModule, select

BLOCK = 128
MIN_AMAX_FLOOR = 1e-30  # below, a scale could be a float32 subnormal, which most devices flush to zero

Implementation = Literal["reference", "xla", "tpu", "gpu"]
# A back end is a module with `quantize(x, block, ue8m0, amax_floor) -> (data, scale)` and `dequantize(data, scale, block, dtype)`
# on arrays of two or more dims. The first is the default everywhere: no kernel has been timed against it on a device yet.
BACK_ENDS: dict[str, ModuleType | LazyModule] = {
    "xla": xla,
    "reference": reference,
    "tpu": LazyModule("kernels_pallas.fp8.tpu"),
    "gpu": LazyModule("kernels_pallas.fp8.gpu"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Array:
    """e4m3 values and the factors that undo their scaling: value[i, j] = data[i, j] * scale[i // block[0], j // block[1]].

    `scale` is what checkpoints call `weight_scale_inv`; float8_e8m0fnu can store scales that are powers of two.
    """

    data: jax.Array  # float8_e4m3fn [..., M, N]
    scale: jax.Array  # float32 or float8_e8m0fnu [..., ceil(M / block[0]), ceil(N / block[1])]
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape


def quantize_activations(
    x: jax.Array, *, ue8m0: bool = False, amax_floor: float = 1e-4, implementation: Implementation | None = None
) -> Fp8Array:
    """Tiles of 1x128 along the last dim, the last one partial if need be: scale [..., ceil(N / 128)] in float32.

    scale = max(amax, amax_floor) * (1 / 448), rounded up to a power of two if `ue8m0`; data = e4m3(clamp(x / scale, ±448)), to
    nearest even, all in float32 (DeepSeek-V3.2's act_quant; DeepSeek-V3, section 3.3). An element that is not finite becomes
    NaN (e4m3fn has no infinity) and leaves its tile's scale alone. Not differentiable.

    Raises ValueError on a dtype or floor that has no meaning here, Unsupported on an implementation that declines the call, and
    TypeError when differentiated.
    """
    return _quantize("fp8.quantize_activations", x, (1, BLOCK), ue8m0, amax_floor, implementation)


def quantize_weights(
    w: jax.Array, *, ue8m0: bool = False, amax_floor: float = 1e-4, implementation: Implementation | None = None
) -> Fp8Array:
    """Blocks of 128x128 of the last two dims, partial at the edges: scale [..., ceil(M / 128), ceil(N / 128)] in float32.

    Otherwise as `quantize_activations`.
    """
    return _quantize("fp8.quantize_weights", w, (BLOCK, BLOCK), ue8m0, amax_floor, implementation)


def dequantize(
    x: Fp8Array, dtype: jax.typing.DTypeLike = jnp.bfloat16, implementation: Implementation | None = None
) -> jax.Array:
    """float32(data) * scale, rounded once to `dtype`; exact in bfloat16 when the scales are powers of two.

    A result below float32's normal range may come out as zero: most devices flush it. Not differentiable.

    Raises ValueError on parts that do not belong together, Unsupported on an implementation that declines the call, and
    TypeError when differentiated.
    """
    if x.data.dtype != jnp.float8_e4m3fn or x.scale.dtype not in (jnp.float32, jnp.float8_e8m0fnu):
        raise ValueError(
            f"fp8.dequantize needs float8_e4m3fn data and float32 or float8_e8m0fnu scales, got {x.data.dtype} and {x.scale.dtype}"
        )
    if x.scale.shape != _grid(x.shape, x.block):
        raise ValueError(
            f"fp8.dequantize: data {x.shape} in blocks of {x.block} needs scales {_grid(x.shape, x.block)}, got {x.scale.shape}"
        )
    back_end = select("fp8.dequantize", implementation, BACK_ENDS)

    def run(data: jax.Array, scale: jax.Array) -> jax.Array:
        if not data.size:
            return jnp.zeros(data.shape, dtype)
        if data.ndim == 1:
            return back_end.dequantize(data[None], scale[None], x.block, jnp.dtype(dtype))[0]
        return back_end.dequantize(data, scale, x.block, jnp.dtype(dtype))

    return refuse_gradients("fp8.dequantize", run)(x.data, x.scale)


def check_floor(op: str, amax_floor: float) -> None:
    if not MIN_AMAX_FLOOR <= amax_floor < np.inf:
        raise ValueError(f"{op}: amax_floor = {amax_floor} must be finite and at least {MIN_AMAX_FLOOR}")


def _quantize(
    op: str, x: jax.Array, block: tuple[int, int], ue8m0: bool, amax_floor: float, implementation: Implementation | None
) -> Fp8Array:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{op} needs float32, bfloat16 or float16, got {x.dtype}")
    if x.ndim < (1 if block[0] == 1 else 2):
        raise ValueError(f"{op}: an array of {x.ndim} dims has no blocks of {block}")
    check_floor(op, amax_floor)
    back_end = select(op, implementation, BACK_ENDS)

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not x.size:
            return jnp.zeros(x.shape, jnp.float8_e4m3fn), jnp.zeros(_grid(x.shape, block), jnp.float32)
        if x.ndim == 1:
            data, scale = back_end.quantize(x[None], block, ue8m0, amax_floor)
            return data[0], scale[0]
        return back_end.quantize(x, block, ue8m0, amax_floor)

    data, scale = refuse_gradients(op, run)(x)
    return Fp8Array(data, scale, block)


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales; a vector counts as one row."""
    *leading, rows, columns = shape if len(shape) > 1 else (1, *shape)
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))[-len(shape) :]


def refuse_gradients(op: str, run: Callable) -> Callable:
    """Without it, the derivative of a cast to FP8 would be a cast of the gradient: wrong, and silent."""
    guarded = jax.custom_jvp(run)

    def refuse(primals, tangents):
        raise TypeError(f"{op} is not differentiable; jax.lax.stop_gradient its input, or wrap it in a custom_vjp")

    guarded.defjvp(refuse)
    return guarded
