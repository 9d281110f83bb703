"""How tiles of scores cover a call of the TPU kernels of attention, and what is visible of them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.flash_attention.ids import Ids
from kernels_pallas.flash_attention.mask import Mask
from kernels_pallas.select import Unsupported

LANES = 128  # of a vector register
PASS, PARTLY, WHOLLY = range(3)  # what is visible of a tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    queries: int = 1024
    keys: int = 1024
    keys_at_once: int = 512  # of the scores that are in VMEM

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if min(sizes) < LANES or any(size % LANES for size in sizes) or self.keys % self.keys_at_once:
            raise ValueError(f"{self}: multiples of {LANES} are needed, and keys a multiple of keys_at_once")
        if self.queries * self.keys_at_once > 2**20:
            raise ValueError(f"{self}: more than 4 MiB of scores would not fit into every VMEM")

    @classmethod
    def of(cls, q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, *, tall: bool = False) -> "Tile":
        """Large enough that a step costs little beside its products; smaller for wide heads, and so as to pad little.

        tall: twice the queries if there are many. That saves a tenth of the instructions (counted for v6e), and costs what tiles
        along the diagonal compute in vain.
        """
        num_queries, num_keys = q_BTNK.shape[1], k_BSZK.shape[1]
        most = 1024 if max(k_BSZK.shape[-1], v_BSZU.shape[-1]) <= 256 else 512
        keys = _even(num_keys, most)
        halves = keys > 512 and keys % (2 * LANES) == 0
        queries = _even(num_queries, 2 * most if tall and num_queries >= 8 * most else most)
        return cls(queries=queries, keys=keys, keys_at_once=keys // 2 if halves else keys)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How tiles cover a call. Arrays are [B, N, T, …] and [B, Z, S, …] here, padded to whole blocks."""

    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    tile: Tile
    mask: Mask
    dtype: Any
    varies: Any  # over which mesh axes, inside shard_map

    @classmethod
    def of(cls, q_BTNK: jax.Array, k_BSZK: jax.Array, v_BSZU: jax.Array, mask: Mask, tile: Tile) -> "Plan":
        if q_BTNK.dtype not in (jnp.bfloat16, jnp.float32):
            raise Unsupported(f"flash_attention on TPU takes bfloat16 and float32, not {q_BTNK.dtype}; 'xla' does")
        if mask.selected_BTS is not None:
            raise Unsupported("flash_attention on TPU has no selected_BTS; 'xla' does")
        (batch, num_queries, heads, _), (num_keys, kv_heads) = q_BTNK.shape, k_BSZK.shape[1:3]
        return cls(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            num_queries=num_queries,
            num_keys=num_keys,
            tile=tile,
            mask=mask,
            dtype=q_BTNK.dtype,
            varies=jax.typeof(q_BTNK).manual_axis_type,
        )

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def padded_queries(self) -> int:
        return _ceil(self.num_queries, self.tile.queries)

    @property
    def padded_keys(self) -> int:
        return _ceil(self.num_keys, self.tile.keys)

    @property
    def chunks(self) -> list[slice]:
        """Of a block's keys."""
        size = self.tile.keys_at_once
        return [slice(start, start + size) for start in range(0, self.tile.keys, size)]

    def queries(self, a_BTN: jax.Array, fill: float = 0) -> jax.Array:
        return _pad(a_BTN.swapaxes(1, 2), self.padded_queries, 2, constant_values=fill)

    def keys(self, a_BSZ: jax.Array) -> jax.Array:
        return _pad(a_BSZ.swapaxes(1, 2), self.padded_keys, 2)

    def heads_last(self, a_BNT: jax.Array) -> jax.Array:
        return a_BNT.swapaxes(1, 2)[:, : self.num_queries]

    def vary(self, a: jax.Array) -> jax.Array:
        """Inside shard_map, all arguments of a kernel vary over the same mesh axes."""
        missing = tuple(self.varies.varying - jax.typeof(a).manual_axis_type.varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    def result(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varies)

    @functools.cached_property
    def ids(self) -> Ids:
        """[B, T] and [B, S]; what is padded is in no segment."""
        return Ids.of(self.mask, self.padded_queries, self.padded_keys)

    def kinds_by_indices(self) -> np.ndarray:
        """What is visible of each tile [blocks of queries, blocks of keys], as far as indices say."""
        mask, tile = self.mask, self.tile
        i, j = np.arange(self.padded_queries // tile.queries), np.arange(self.padded_keys // tile.keys)
        some_ij, all_ij = np.ones((i.size, j.size), bool), np.ones((i.size, j.size), bool)
        if self.num_keys < self.padded_keys:
            all_ij[:, -1] = False
        if mask.ordered and mask.q_positions_BT is None:
            q_i2 = (mask.q_offset or 0) + i[:, None] * tile.queries + np.array([0, tile.queries - 1])
            kv_j2 = j[:, None] * tile.keys + np.array([0, tile.keys - 1])
            some, every = mask.near(q_i2[:, None], kv_j2[None])
            some_ij, all_ij = some_ij & some, all_ij & every
        return np.where(some_ij, np.where(all_ij, WHOLLY, PARTLY), PASS).astype(np.int32)

    def kinds_by_ids(self, q_blocks: np.ndarray, kv_blocks: np.ndarray) -> jax.Array:
        """What is visible of these tiles in each row of the batch [B, tiles], as far as positions and segments say."""
        sizes = self.tile.queries, self.tile.keys
        some, every = self.ids.seen(self.mask, sizes, (q_blocks, kv_blocks))
        return jnp.where(some, jnp.where(every, WHOLLY, PARTLY), PASS).astype(jnp.int32)


def _ceil(length: int, size: int) -> int:
    return math.ceil(length / size) * size


def _even(length: int, most: int) -> int:
    """Size of as few equal parts of at most `most` as hold `length`."""
    return _ceil(math.ceil(length / math.ceil(length / most)), LANES)


def _pad(a: jax.Array, length: int, axis: int, **how: Any) -> jax.Array:
    missing = length - a.shape[axis]
    return jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)], **how) if missing else a
