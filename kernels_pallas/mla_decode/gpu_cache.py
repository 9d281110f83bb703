"""How blocks of 64 slots come from the caches into shared memory, where two warpgroups multiply with them (Hopper).

Both kinds have the same methods. `bring` is for the warpgroup that brings. The others begin with `open`, and call for the n-th
block `keys`, which waits, then `values`, when they are done with the keys, and `leave`. `held` is how many slots from the first
on hold something: what lies behind may be NaN, and becomes zero before it is a value.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.flash_attention.hopper import PER_ROW, TILE, WARPGROUPS, across, meet, smem
from kernels_pallas.fp8 import BLOCK
from kernels_pallas.mla_decode.cache import Fp8LatentCache, LatentCache

SLOTS = 64
WIDTH = 64  # widths are multiples of it: 16-bit numbers in 128 bytes, the swizzle


@dataclasses.dataclass(frozen=True)
class Bf16Blocks:
    """Latents in halves of their columns, as the cache has them."""

    latent_gmem: Any
    rope_gmem: Any
    latent_smem: Any  # [stages, halves, slots, C / 2]
    rope_smem: Any
    here: Any
    free: Any
    keys_read: Any

    @staticmethod
    def arrays(cache: LatentCache) -> tuple[jax.Array, ...]:
        return cache.arrays

    @staticmethod
    def scratch_types(C: int, R: int, stages: int) -> list[Any]:
        return [
            smem((stages, WARPGROUPS, SLOTS, C // WARPGROUPS), jnp.bfloat16, WIDTH),
            smem((stages, SLOTS, R), jnp.bfloat16, WIDTH),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS + 1),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ]

    def open(self) -> None:
        """The first blocks wait for nobody, as `bring` knows: arriving for them here, as FP8 blocks do, would spill."""

    def bring(self, n: jax.Array, row: jax.Array, slots: Any) -> None:
        stages, half = self.latent_smem.shape[0], self.latent_smem.shape[3]
        stage = self._stage(n)
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(self.free.at[stage]))
        for i in range(WARPGROUPS):
            columns = self.latent_gmem.at[row, slots, pl.ds(i * half, half)]
            plgpu.copy_gmem_to_smem(columns, self.latent_smem.at[stage, i], self.here.at[stage])
        plgpu.copy_gmem_to_smem(self.rope_gmem.at[row, slots], self.rope_smem.at[stage], self.here.at[stage])

    def keys(self, n: jax.Array, w: jax.Array, held: jax.Array) -> tuple[list[Any], Any]:
        """Both halves of the latents, and the rotary keys."""
        del w, held
        stage = self._stage(n)
        plgpu.barrier_wait(self.here.at[stage])
        return [self.latent_smem.at[stage, i] for i in range(WARPGROUPS)], self.rope_smem.at[stage]

    def values(self, n: jax.Array, w: jax.Array, held: jax.Array) -> Any:
        """The half that is this warpgroup's."""
        mine = self.latent_smem.at[self._stage(n), w]

        @pl.when(held < SLOTS)
        def _forget():
            meet(self.keys_read)  # the other warpgroup may still multiply with this half
            _zero_behind(mine, held)
            plgpu.commit_smem()

        return mine

    def leave(self, n: jax.Array) -> None:
        plgpu.barrier_arrive(self.free.at[self._stage(n)])

    def _stage(self, n: jax.Array) -> jax.Array:
        return jax.lax.rem(n, jnp.int32(self.latent_smem.shape[0]))


PADDED = BLOCK + 16  # bytes: rows of 128 would lie in the same banks; what comes along is what follows in the cache
ROPE_BEFORE = 8  # likewise, bfloat16 before the rotary key
BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # a thread has four bytes side by side
NUM_SCALES = 4  # the least that TMA brings


@dataclasses.dataclass(frozen=True)
class Fp8Blocks:
    """Rows of 656 bytes, which both warpgroups turn into bfloat16, each its half of the columns."""

    data_gmem: Any
    scale_gmem: Any
    rope_gmem: Any
    data_smem: Any  # [C / 128, slots, PADDED]
    scale_smem: Any
    rope_smem: Any
    latent_smem: Any  # [halves, slots, C / 2]
    rope_key_smem: Any
    here: Any
    free: Any
    both: Any  # warpgroups have made their half, or have read the other

    @staticmethod
    def arrays(cache: Fp8LatentCache) -> tuple[jax.Array, ...]:
        """The same bytes three times; XLA copies nothing."""
        views = []
        for dtype in (jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16):
            size = jnp.dtype(dtype).itemsize
            parts = cache.rows if size == 1 else cache.rows.reshape(*cache.rows.shape[:2], -1, size)
            views.append(jax.lax.bitcast_convert_type(parts, dtype))
        return tuple(views)

    @staticmethod
    def scratch_types(C: int, R: int, stages: int) -> list[Any]:
        del stages  # the bytes of the next block come while this one is multiplied
        return [
            plgpu.SMEM((C // BLOCK, SLOTS, PADDED), jnp.float8_e4m3fn),
            plgpu.SMEM((SLOTS, NUM_SCALES), jnp.float32),
            plgpu.SMEM((SLOTS, ROPE_BEFORE + R), jnp.bfloat16),
            smem((WARPGROUPS, SLOTS, C // WARPGROUPS), jnp.bfloat16, WIDTH),
            smem((SLOTS, R), jnp.bfloat16, WIDTH),
            plgpu.Barrier(num_arrivals=C // BLOCK + 2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ]

    def open(self) -> None:
        """As if a block before the first had been read."""
        plgpu.barrier_arrive(self.free)
        plgpu.barrier_arrive(self.both)

    def bring(self, n: jax.Array, row: jax.Array, slots: Any) -> None:
        del n
        blocks = self.data_smem.shape[0]
        C = blocks * BLOCK
        plgpu.barrier_wait(self.free)
        for i in range(blocks):
            columns = pl.ds(i * BLOCK, PADDED)
            plgpu.copy_gmem_to_smem(self.data_gmem.at[row, slots, columns], self.data_smem.at[i], self.here)
        plgpu.copy_gmem_to_smem(self.scale_gmem.at[row, slots, pl.ds(C // 4, NUM_SCALES)], self.scale_smem, self.here)
        rope = pl.ds(C // 2 + 2 * blocks - ROPE_BEFORE, self.rope_smem.shape[1])
        plgpu.copy_gmem_to_smem(self.rope_gmem.at[row, slots, rope], self.rope_smem, self.here)

    def keys(self, n: jax.Array, w: jax.Array, held: jax.Array) -> tuple[list[Any], Any]:
        """As of `Bf16Blocks`; of zeros where nothing is held."""
        del n
        plgpu.barrier_wait(self.both)
        plgpu.barrier_wait(self.here)

        @pl.when(w == 0)
        def _rope():
            rope = self.rope_smem[:, pl.ds(ROPE_BEFORE, self.rope_key_smem.shape[1])]
            self.rope_key_smem[...] = plgpu.layout_cast(rope, TILE)

        own = self.data_smem.shape[0] // WARPGROUPS
        for i in range(own):
            scale = plgpu.layout_cast(self.scale_smem[:, w * own + i], BYTES.reduce(1))
            for part in _parts(BLOCK):
                x = plgpu.layout_cast(self.data_smem[w * own + i, :, part], BYTES).astype(jnp.float32)
                x = (x * plgpu.layout_cast(across(scale, x.shape), BYTES)).astype(jnp.bfloat16)
                self.latent_smem[w, :, pl.ds(i * BLOCK + part.start, part.size)] = plgpu.layout_cast(x, TILE)
        pl.when(held < SLOTS)(lambda: _zero_behind(self.latent_smem.at[w], held))
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.free)
        meet(self.both)
        return [self.latent_smem.at[i] for i in range(WARPGROUPS)], self.rope_key_smem

    def values(self, n: jax.Array, w: jax.Array, held: jax.Array) -> Any:
        """As of `Bf16Blocks`."""
        del n, held
        plgpu.barrier_arrive(self.both)
        return self.latent_smem.at[w]

    def leave(self, n: jax.Array) -> None:
        del n


def blocks_of(cache: LatentCache | Fp8LatentCache) -> type[Bf16Blocks] | type[Fp8Blocks]:
    return Fp8Blocks if isinstance(cache, Fp8LatentCache) else Bf16Blocks


def _parts(width: int) -> list[Any]:
    """Of columns, few enough for registers beside the sums."""
    return [pl.ds(i, WIDTH) for i in range(0, width, WIDTH)]


def _zero_behind(values: Any, held: jax.Array) -> None:
    """All rows but the first `held`."""
    for columns in _parts(values.shape[1]):
        x = plgpu.layout_cast(values[:, columns], TILE)
        row = plgpu.broadcasted_iota(jnp.int32, x.shape[:1], 0, layout=PER_ROW)
        values[:, columns] = jnp.where(across(row, x.shape) < held, x, jnp.zeros((), x.dtype))
