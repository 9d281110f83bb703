"""Inputs of decoding over latents, and the truth about them in float64 NumPy, one query of one head at a time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache

SCALE = 0.11
TILE = 128  # of e4m3 values under one scale


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def paged(lengths: np.ndarray, page: int, *arrays: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The same slots in shuffled pages, and a table with numbers that are none behind a row's last page."""
    rows, capacity = arrays[0].shape[:2]
    pages = capacity // page
    numbers = np.random.default_rng(4).permutation(rows * pages).reshape(rows, pages)
    stored = []
    for a in arrays:
        shuffled = np.empty((rows * pages, page, a.shape[-1]), a.dtype)
        shuffled[numbers] = np.asarray(a).reshape(rows, pages, page, a.shape[-1])
        stored.append(shuffled)
    table = numbers.astype(np.int32)
    for b, length in enumerate(lengths):
        table[b, -(-length // page) :] = [-1, 10**6][b % 2]
    return stored, table


def truth(q_latent, q_rope, latent, rope, lengths) -> tuple[np.ndarray, np.ndarray]:
    """One row, query and head at a time, over exactly the positions that are seen."""
    T = q_latent.shape[1]
    out, lse = np.zeros(q_latent.shape), np.full(q_latent.shape[:3], -np.inf)
    for b, t, n in np.ndindex(*q_latent.shape[:3]):
        seen = int(lengths[b]) - T + t + 1
        if seen < 1:
            continue
        keys, rotary = latent[b, :seen].astype(np.float64), rope[b, :seen].astype(np.float64)
        s = SCALE * (keys @ q_latent[b, t, n].astype(np.float64) + rotary @ q_rope[b, t, n].astype(np.float64))
        p = np.exp(s - s.max())
        out[b, t, n] = p @ keys / p.sum()
        lse[b, t, n] = s.max() + np.log(p.sum())
    return out, lse


def check(got, want, tolerance=2e-5):
    """Float32: sums of 136 products and of 640 weights, each a few ULPs off."""
    for g, w in zip(got, want, strict=True):
        assert not np.isnan(np.asarray(g, np.float32)).any()
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(frozen=True)
class Rows:
    """FP8 rows read with NumPy as V3.2 lays them out: e4m3 values, a float32 scale for each TILE of them, bfloat16."""

    rows: np.ndarray
    latent_width: int

    @property
    def latent(self) -> np.ndarray:
        data = self.rows[..., : self.latent_width].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return data * np.repeat(self.scale.astype(np.float64), TILE, axis=-1)

    @property
    def scale(self) -> np.ndarray:
        return self.rows[..., self.latent_width : self._rope_at].copy().view(np.float32)

    @property
    def rope(self) -> np.ndarray:
        return self.rows[..., self._rope_at :].copy().view(ml_dtypes.bfloat16)

    @property
    def _rope_at(self) -> int:
        return self.latent_width + 4 * (self.latent_width // TILE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call; all behind a row's length is NaN, and its page numbers are none."""

    lengths: tuple[int, ...]
    capacity: int
    queries: int = 1
    heads: int = 3
    widths: tuple[int, int] = (128, 8)  # of latent and rotary key
    page: int | None = None
    fp8: bool = False
    ue8m0: bool = False
    dtype: Any = np.float32  # of queries, and of a cache that is not FP8

    @functools.cached_property
    def q(self) -> tuple[np.ndarray, np.ndarray]:
        latent, rope = ((len(self.lengths), self.queries, self.heads, width) for width in self.widths)
        return normal(*latent, dtype=self.dtype), normal(*rope, seed=1, dtype=self.dtype)

    @functools.cached_property
    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """What a cache is made of, without NaN: latent [B, S, C] and rope [B, S, R]."""
        latent, rope = ((len(self.lengths), self.capacity, width) for width in self.widths)
        dtype = np.float32 if self.fp8 else self.dtype
        return normal(*latent, seed=2, dtype=dtype), normal(*rope, seed=3, dtype=dtype)

    @functools.cached_property
    def stored(self) -> tuple[np.ndarray, ...]:
        """In one piece: latent and rope, or FP8 rows."""
        if self.fp8:
            latent, rope = map(jnp.asarray, self.written)
            arrays = (np.array(Fp8LatentCache.pack(latent, rope, ue8m0=self.ue8m0).rows),)
        else:
            arrays = tuple(a.copy() for a in self.written)
        for a in arrays:
            for b, length in enumerate(self.lengths):
                a[b, length:] = 0x7F if self.fp8 else np.nan
        return arrays

    @property
    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """latent and rope as the stored bytes say, in one piece."""
        if not self.fp8:
            return self.stored[0], self.stored[1]
        rows = Rows(self.stored[0], self.widths[0])
        return rows.latent, rows.rope

    @property
    def cache(self) -> LatentCache | Fp8LatentCache:
        arrays, table = self.stored, None
        if self.page is not None:
            arrays, table = paged(np.array(self.lengths), self.page, *arrays)
            table = jnp.asarray(table)
        arrays = [jnp.asarray(a) for a in arrays]
        return Fp8LatentCache(arrays[0], self.widths[0], table) if self.fp8 else LatentCache(*arrays, table)

    @property
    def args(self) -> tuple[np.ndarray, np.ndarray, LatentCache | Fp8LatentCache, np.ndarray]:
        return *self.q, self.cache, np.array(self.lengths, np.int32)

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        return truth(*self.q, *self.read, self.lengths)

    def plain_bfloat16(self) -> np.ndarray:
        """The output of the plain computation: products of bfloat16 summed in float32, softmax in float32."""
        latent, rope = (jnp.nan_to_num(jnp.asarray(a).astype(jnp.bfloat16)) for a in self.read)
        f32 = {"preferred_element_type": jnp.float32}
        s = jnp.einsum("BTNC,BSC->BTNS", self.q[0], latent, **f32)
        s = SCALE * (s + jnp.einsum("BTNR,BSR->BTNS", self.q[1], rope, **f32))
        end = np.array(self.lengths)[:, None] - self.queries + 1 + np.arange(self.queries)
        seen = jnp.arange(self.capacity) < end[:, :, None, None]
        p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1), 0).astype(jnp.bfloat16)
        return np.asarray(jnp.einsum("BTNS,BSC->BTNC", p, latent, **f32).astype(jnp.bfloat16), np.float64)


def check_bfloat16(case: Case, got) -> None:
    """For every row, at most twice the error of the plain computation in bfloat16 with float32 sums."""
    out, lse = got
    want, want_lse = case.truth()
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    plain = case.plain_bfloat16()
    for b in range(len(case.lengths)):
        plain_error = np.abs(plain[b] - want[b]).max()
        assert plain_error > 1e-5 or case.lengths[b] < 2
        error = np.abs(np.asarray(out[b], np.float64) - want[b]).max()
        assert error <= 2 * plain_error, (b, case.lengths[b], error, plain_error)
    if not case.fp8:
        check([lse], [want_lse])  # products of bfloat16 are exact in float32, so the logits are those of float32
