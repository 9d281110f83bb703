"""The caches that `mla_decode` reads: C + R numbers a token as they are, or in FP8; contiguous or in pages."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import fp8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """The normed latent, which is key and value at once, and the rotated key that all heads share.

    Contiguous: latent [B, S, C], rope [B, S, R], where slot s of a row holds position s. Paged: latent [pages, Y, C], rope
    [pages, Y, R] and page_table_BP int32, where page page_table_BP[b, p] holds positions p·Y to p·Y + Y - 1 of row b. Rows may
    share pages. What lies behind a row's length may be anything, page numbers too.
    """

    latent: jax.Array
    rope: jax.Array
    page_table_BP: jax.Array | None = None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What is indexed by slot."""
        return self.latent, self.rope

    @property
    def widths(self) -> str:
        return f"latent {list(self.latent.shape)} and rope {list(self.rope.shape)}"

    def fits(self, latent_width: int, rope_width: int) -> bool:
        return self.latent.shape[-1] == latent_width and self.rope.shape[-1] == rope_width

    def dtype(self, query: jnp.dtype) -> jnp.dtype:
        """In which products with queries of this dtype are taken."""
        return jnp.promote_types(query, jnp.promote_types(self.latent.dtype, self.rope.dtype))

    def unpack(self, arrays: tuple[jax.Array, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """(latent [..., C], rope [..., R]) of some slots of `arrays`."""
        latent, rope = arrays
        return latent.astype(dtype), rope.astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8LatentCache:
    """As `LatentCache`, but a slot is C bytes of e4m3, C / 128 float32 scales and R bfloat16: 656 bytes for 512 + 64 (V3.2).

    rows uint8 [B, S, bytes], or [pages, Y, bytes] with a page table.
    """

    rows: jax.Array
    latent_width: int = dataclasses.field(metadata={"static": True})
    page_table_BP: jax.Array | None = None

    @classmethod
    def pack(
        cls, latent: jax.Array, rope: jax.Array, page_table_BP: jax.Array | None = None, *, ue8m0: bool = False
    ) -> Self:
        """Quantizes the latent in tiles of 1x128, and rounds the rotary key to bfloat16; ue8m0: scales are powers of two."""
        width = latent.shape[-1]
        if width % fp8.BLOCK:
            raise ValueError(f"an FP8 cache needs latents of whole tiles of {fp8.BLOCK}, got {list(latent.shape)}")
        tiles = fp8.quantize_activations(latent, ue8m0=ue8m0)
        parts = (tiles.data, tiles.scale, rope.astype(jnp.bfloat16))
        return cls(jnp.concatenate([_bytes_of(part) for part in parts], axis=-1), width, page_table_BP)

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """What is indexed by slot."""
        return (self.rows,)

    @property
    def widths(self) -> str:
        return f"rows {list(self.rows.shape)} of {self.latent_width} FP8 values"

    def fits(self, latent_width: int, rope_width: int) -> bool:
        num_bytes = latent_width + 4 * (latent_width // fp8.BLOCK) + 2 * rope_width
        return self.latent_width == latent_width and self.rows.shape[-1] == num_bytes

    def dtype(self, query: jnp.dtype) -> jnp.dtype:
        """In which products with queries of this dtype are taken."""
        return jnp.promote_types(query, jnp.bfloat16)

    def unpack(self, arrays: tuple[jax.Array, ...], dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """(latent [..., C], rope [..., R]) of some slots of `arrays`; exact if the scales are powers of two."""
        (rows,) = arrays
        data, scale, rope = jnp.split(rows, np.cumsum([self.latent_width, self.latent_width // fp8.BLOCK * 4]), axis=-1)
        tiles = fp8.Fp8Array(_of_bytes(data, jnp.float8_e4m3fn), _of_bytes(scale, jnp.float32), (1, fp8.BLOCK))
        return fp8.dequantize(tiles, dtype), _of_bytes(rope, jnp.bfloat16).astype(dtype)


AnyCache = LatentCache | Fp8LatentCache


def capacity(cache: AnyCache) -> int:
    """Positions that a row can hold."""
    slots = cache.arrays[0].shape[1]
    return slots if cache.page_table_BP is None else slots * cache.page_table_BP.shape[1]


def read(cache: AnyCache, start: jax.Array | int, size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """latent [B, size, C] and rope [B, size, R] of all rows; in a paged cache start and size are whole pages."""
    if cache.page_table_BP is None:
        arrays = tuple(jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in cache.arrays)
    else:
        rows_per_page = cache.arrays[0].shape[1]
        pages_Bp = jax.lax.dynamic_slice_in_dim(
            cache.page_table_BP, start // rows_per_page, size // rows_per_page, axis=1
        )
        arrays = tuple(
            a.at[pages_Bp].get(mode="clip").reshape(pages_Bp.shape[0], size, a.shape[-1]) for a in cache.arrays
        )
    return cache.unpack(arrays, dtype)


def _bytes_of(x: jax.Array) -> jax.Array:
    as_bytes = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return as_bytes.reshape(*x.shape[:-1], -1)


def _of_bytes(as_bytes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    size = jnp.dtype(dtype).itemsize
    parts = as_bytes if size == 1 else as_bytes.reshape(*as_bytes.shape[:-1], -1, size)
    return jax.lax.bitcast_convert_type(parts, dtype)
