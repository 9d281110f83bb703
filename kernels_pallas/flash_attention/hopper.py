"""What the Hopper kernels of `flash_attention` share."""

import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import Unsupported

ROWS = 64  # of a warpgroup: what an instruction multiplies
WARPGROUPS = 2  # that compute
SHARED_MEMORY = 227 * 1024  # bytes that a block of threads may have
# A thread, of a computing warpgroup and of the one that brings: together what three warpgroups start with, 3 x 168. One more, and
# the threads would wait for it forever.
REGISTERS, PRODUCER_REGISTERS = 240, 24
WIDEST_PRODUCT = 256  # columns of what an instruction computes
LOG2_E = math.log2(math.e)
Columns = tuple[slice, ...]  # of a width, in pieces that one product computes
TILE, PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def check(q_BTNK: jax.Array, mask: Mask, scale: float) -> None:
    """Raises Unsupported."""
    lacks = None
    if q_BTNK.dtype not in (jnp.bfloat16, jnp.float16):
        lacks = f"has no {q_BTNK.dtype}, only bfloat16 and float16"
    elif mask.selected_BTS is not None:
        lacks = "has no masks by selection"
    elif not scale > 0:
        lacks = f"needs a positive scale, not {scale}"
    if lacks is not None:
        raise Unsupported(f"flash_attention on gpu {lacks}")


def pad(a: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
    """TMA takes no partial tiles of a swizzled buffer."""
    missing = -a.shape[axis] % multiple
    widths = [(0, missing if i == axis else 0) for i in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value) if missing else a


def pad_widths(*arrays: jax.Array) -> list[jax.Array]:
    """To what a swizzle holds, 64 or 32 numbers of 16 bits, and if one is wide, to what two warpgroups can share."""
    wide = max(a.shape[-1] for a in arrays) > WIDEST_PRODUCT
    return [pad(a, a.ndim - 1, 64 if wide or a.shape[-1] < 64 else 32) for a in arrays]


def swizzle_of(*sizes: int) -> int:
    """Numbers of 16 bits in a swizzle, one for all factors of a product; `sizes` are multiples of it."""
    return 64 if all(size % 64 == 0 for size in sizes) else 32


def smem(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """As TMA writes and wgmma reads it; the last dim is a multiple of `swizzle`."""
    transforms = plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(2 * swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def pieces(start: int, stop: int) -> Columns:
    """As few columns [start, stop) as make products of nearly equal width, each at most WIDEST_PRODUCT."""
    count = -(-(stop - start) // WIDEST_PRODUCT)
    size = -(-(stop - start) // (count * 32)) * 32
    return tuple(slice(at, min(at + size, stop)) for at in range(start, stop, size))


def halves(width: int) -> tuple[Columns, Columns]:
    """`pieces` of a width for each of two warpgroups."""
    middle = -(-width // 64) * 32
    return pieces(0, middle), pieces(middle, width)


def full(shape: tuple[int, ...], value: Any, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across(per_row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcast_in_dim(per_row, shape, (0,))


def down(per_column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcast_in_dim(per_column, shape, (1,))


def tanh(x: jax.Array) -> jax.Array:
    """To an absolute error of float32; the instruction has that of bfloat16."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2_E)))


def multiply(a: Any, b: Any) -> jax.Array:
    """a b of buffers, waiting for the result."""

    def run(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def add_product(sums: jax.Array, a: Any, b: Any, a_smem: Any | None) -> Any:
    """sums + a b, with `a` from registers or by way of a buffer."""
    if a_smem is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.WGMMAAccumulatorRef.init(sums))
    a_smem[...] = a
    plgpu.commit_smem()
    return sums + multiply(a_smem, b)


def no_sums(columns: Columns) -> tuple[jax.Array, ...]:
    return tuple(full((ROWS, piece.stop - piece.start), 0.0, TILE) for piece in columns)


def add_products(sums: tuple[jax.Array, ...], a: Any, b: Any, columns: Columns, a_smem: Any | None) -> tuple[Any, ...]:
    """sums + a b of these columns of the buffer b."""
    return tuple(add_product(sum_, a, b.at[:, piece], a_smem) for sum_, piece in zip(sums, columns, strict=True))


def subtract_from_product(a: Any, b: Any, x: jax.Array, inside: bool) -> Any:
    """a b - x of buffers `a` and `b`; `inside` the instruction, where sums then take no registers beside `x`."""
    if not inside:
        return multiply(a, b) - x
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.WGMMAAccumulatorRef.init(-x))


def put(place: Any, sums: tuple[jax.Array, ...], columns: Columns, factor: float) -> None:
    """Sums of these columns into a buffer."""
    for sum_, piece in zip(sums, columns, strict=True):
        place[:, piece] = (sum_ * factor).astype(place.dtype)


def meet(barrier: Any) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def not_before_the_loop(*indices: jax.Array | int) -> tuple[jax.Array, ...]:
    """The same, but no compiler computes addresses from them before a loop and keeps these in registers, which are short."""
    return jax.lax.optimization_barrier(tuple(map(jnp.int32, indices)))


def compiler_params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
