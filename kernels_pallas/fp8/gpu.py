"""The FP8 formats as Mosaic GPU kernels (Hopper): a block of threads per tile, which TMA brings and takes."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.fp8.scale import MAX, divide, scale_of

COLUMNS = 128  # of every FP8 block, and of a tile
SWIZZLE = 128  # bytes; keeps the register layout free of bank conflicts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one warpgroup works on; weights take rows = 128, a block. Registers: half of the rows plus about 60 a thread."""

    rows: int = 64

    def __post_init__(self):
        if self.rows not in (64, 128):  # the register layout has 64 rows; 192 would spill
            raise ValueError(f"{self}: rows must be 64 or 128")


def quantize(
    x_MN: jax.Array, block: tuple[int, int], ue8m0: bool, amax_floor: float, tile: Tile = Tile()
) -> tuple[jax.Array, jax.Array]:
    """(data, scale) as the public functions promise; `x_MN` may have leading dims."""
    plan = _Plan.of(x_MN.shape, block, tile)
    if not x_MN.size:
        return jnp.zeros(x_MN.shape, jnp.float8_e4m3fn), jnp.zeros(plan.scale_shape, jnp.float32)

    def fp8_quantize(x_gmem, data_gmem, scale_gmem, x_smem, data_smem, scale_smem, barrier):
        rows, columns, i, j = plan.here()
        plgpu.copy_gmem_to_smem(x_gmem.at[rows, columns], x_smem, barrier)
        plgpu.barrier_wait(barrier)
        x = plgpu.layout_cast(x_smem[...], plgpu.Layout.WGMMA).astype(jnp.float32)
        magnitude = jnp.abs(x)
        finite = magnitude < jnp.inf
        amax = jnp.max(jnp.where(finite, magnitude, 0.0), axis=1)
        if block[0] > 1:
            amax = jnp.max(amax)
        scale = scale_of(amax, ue8m0, amax_floor)
        spread = jax.lax.broadcast_in_dim(scale, x.shape, tuple(range(scale.ndim)))
        y = jnp.clip(divide(x, spread, finite, ue8m0), -MAX, MAX)
        data_smem[...] = jnp.where(finite, y, jnp.nan).astype(jnp.float8_e4m3fn)
        if block[0] > 1:
            scale_gmem[j, i] = scale
        else:
            scale_smem[...] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(data_smem, data_gmem.at[rows, columns])
        if block[0] == 1:
            plgpu.copy_smem_to_gmem(scale_smem, scale_gmem.at[j, rows])
        plgpu.wait_smem_to_gmem(0)

    data, scale = plan.kernel(
        fp8_quantize,
        out_type=(
            jax.ShapeDtypeStruct(plan.view, jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct(plan.scale_view, jnp.float32),
        ),
        scratch_types=[
            plan.smem(x_MN.dtype),
            plan.smem(jnp.float8_e4m3fn),
            plgpu.SMEM((plan.rows,), jnp.float32),
            plgpu.Barrier(),
        ],
    )(plan.pad(x_MN))
    return plan.unpad(data, x_MN.shape), plan.unpad_scale(scale)


def dequantize(
    data_MN: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: jnp.dtype, tile: Tile = Tile()
) -> jax.Array:
    """float32(data) * scale, rounded once to `dtype`; `data_MN` may have leading dims."""
    plan = _Plan.of(data_MN.shape, block, tile)
    if not data_MN.size:
        return jnp.zeros(data_MN.shape, dtype)

    def fp8_dequantize(data_gmem, scale_gmem, y_gmem, data_smem, scale_smem, y_smem, barrier):
        rows, columns, i, j = plan.here()
        plgpu.copy_gmem_to_smem(data_gmem.at[rows, columns], data_smem, barrier)
        if block[0] == 1:
            plgpu.copy_gmem_to_smem(scale_gmem.at[j, rows], scale_smem, barrier)
        plgpu.barrier_wait(barrier)
        data = plgpu.layout_cast(data_smem[...], plgpu.Layout.WGMMA).astype(jnp.float32)
        if block[0] == 1:
            scale = plgpu.layout_cast(scale_smem[...], plgpu.Layout.WGMMA.reduce(1))
        else:
            scale = scale_gmem[j, i]
        y = data * jax.lax.broadcast_in_dim(scale, data.shape, tuple(range(scale.ndim)))
        y_smem[...] = y.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_gmem.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    y = plan.kernel(
        fp8_dequantize,
        out_type=jax.ShapeDtypeStruct(plan.view, dtype),
        scratch_types=[
            plan.smem(jnp.float8_e4m3fn),
            plgpu.SMEM((plan.rows,), jnp.float32),
            plan.smem(dtype),
            plgpu.Barrier(num_arrivals=2 if block[0] == 1 else 1),
        ],
    )(plan.pad(data_MN), plan.pad_scale(scale))
    return plan.unpad(y, data_MN.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Whole tiles over an array, which is padded if it has to be: TMA takes no partial tiles of a swizzled buffer.

    Scales are transposed, so that those of a tile's rows lie side by side.
    """

    leading: tuple[int, ...]
    M: int
    N: int
    block_rows: int
    rows: int  # of a tile
    scale_shape: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], block: tuple[int, int], tile: Tile) -> "_Plan":
        *leading, M, N = shape
        scale_shape = (*leading, pl.cdiv(M, block[0]), pl.cdiv(N, COLUMNS))
        rows = block[0]
        if block[0] == 1:  # each row for itself
            leading, M, rows = [], math.prod(leading) * M, tile.rows
        return cls(leading=tuple(leading), M=M, N=N, block_rows=block[0], rows=rows, scale_shape=scale_shape)

    @property
    def padded(self) -> tuple[int, int]:
        return pl.cdiv(self.M, self.rows) * self.rows, pl.cdiv(self.N, COLUMNS) * COLUMNS

    @property
    def view(self) -> tuple[int, int]:
        return math.prod(self.leading) * self.padded[0], self.padded[1]

    @property
    def scale_view(self) -> tuple[int, int]:
        return self.view[1] // COLUMNS, self.view[0] // self.block_rows

    def pad(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*self.leading, self.M, self.N)
        margins = [(0, 0)] * len(self.leading) + [(0, self.padded[0] - self.M), (0, self.padded[1] - self.N)]
        return jnp.pad(x, margins).reshape(self.view)

    def unpad(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return x.reshape(*self.leading, *self.padded)[..., : self.M, : self.N].reshape(shape)

    def pad_scale(self, scale: jax.Array) -> jax.Array:
        scale = scale.astype(jnp.float32).reshape(*self.leading, -1, self.scale_view[0])
        margins = [(0, 0)] * len(self.leading) + [(0, self.padded[0] // self.block_rows - scale.shape[-2]), (0, 0)]
        return jnp.pad(scale, margins).reshape(self.scale_view[::-1]).T

    def unpad_scale(self, scale: jax.Array) -> jax.Array:
        scale = scale.T.reshape(*self.leading, -1, self.scale_view[0])
        return scale[..., : pl.cdiv(self.M, self.block_rows), :].reshape(self.scale_shape)

    def smem(self, dtype: Any) -> Any:
        tiling = plgpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM((self.rows, COLUMNS), dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))

    def here(self) -> tuple[Any, Any, jax.Array, jax.Array]:
        """In a kernel: rows and columns of the tile, and its place in the grid."""
        i, j = jax.lax.axis_index("i"), jax.lax.axis_index("j")
        return pl.ds(i * self.rows, self.rows), pl.ds(j * COLUMNS, COLUMNS), i, j

    def kernel(self, body: Callable, **arguments: Any) -> Callable:
        return plgpu.kernel(
            body,
            grid=(self.view[0] // self.rows, self.scale_view[0]),
            grid_names=("i", "j"),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
            **arguments,
        )
