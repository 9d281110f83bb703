"""Attention over selected keys by its equation in float64 NumPy: values, logsumexp and all gradients."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import sparse_attention
from kernels_pallas.sparse_attention import xla

SCALE = 0.15
NAMES = ["out", "lse", "dq", "dk", "dv"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    dims: tuple[int, int] = (24, 16)  # of q and k, of v
    heads: tuple[int, int] = (4, 1)  # N, Z
    lengths: tuple[int, int] = (21, 30)  # T, S
    batch: int = 2
    slots: int = 7
    keys: str = "some"  # how indices are drawn
    latents: bool = False  # values are the first columns of the keys
    tiled: bool = True  # chunks of a few queries

    def index(self) -> np.ndarray:
        rng = np.random.default_rng(1)
        (T, S), W = self.lengths, self.slots
        index = np.full((self.batch, T, W), S)
        for b, t in np.ndindex(self.batch, T):
            seen = {"causal": min(t + 1, S), "one": 1}.get(self.keys, S)
            count = {"some": rng.integers(0, W + 1), "none": 0}.get(self.keys, W)
            index[b, t, : min(count, seen)] = np.sort(rng.choice(seen, min(count, seen), replace=False))
        if self.keys == "any order":
            index = rng.permuted(rng.integers(-4, S + 4, index.shape), axis=2)
        if self.keys == "repeated":
            index = rng.integers(0, 3, index.shape)
        return index

    def operands(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """q, k and perhaps v; cotangents of out and lse. All are bfloat16 numbers."""
        rng = np.random.default_rng(2)
        B, (T, S), (N, Z), (K, U) = self.batch, self.lengths, self.heads, self.dims
        shapes = [(B, T, N, K), (B, S, Z, K)] + [(B, S, Z, U)] * (not self.latents)
        draw = lambda shape: rng.standard_normal(shape).astype(jnp.bfloat16).astype(np.float64)  # noqa: E731
        return [draw(shape) for shape in shapes], [draw((B, T, N, U)), draw((B, T, N))]


def truth(case: Case) -> list[np.ndarray]:
    """out, lse, dq, dk and perhaps dv by the equations and the chain rule, one query and head at a time."""
    (q, k, *values), (dout, dlse) = case.operands()
    v = values[0] if values else k[..., : case.dims[1]]
    out, lse = np.zeros_like(dout), np.full_like(dlse, -np.inf)
    dq, dk, dv = (np.zeros_like(a) for a in (q, k, v))
    for b, t, n in np.ndindex(q.shape[:3]):
        z = n // (q.shape[2] // k.shape[2])
        chosen = [s for s in case.index()[b, t] if 0 <= s < k.shape[1]] if n == 0 else chosen  # noqa: F821
        if not chosen:
            continue
        s = SCALE * k[b, chosen, z] @ q[b, t, n]
        lse[b, t, n] = np.log(np.exp(s).sum())
        p = np.exp(s - lse[b, t, n])
        out[b, t, n] = p @ v[b, chosen, z]
        dp = v[b, chosen, z] @ dout[b, t, n]
        ds = p * (dp - p @ dp + dlse[b, t, n])
        dq[b, t, n] = SCALE * ds @ k[b, chosen, z]
        for s, dlogit, weight in zip(chosen, ds, p, strict=True):
            dk[b, s, z] += SCALE * dlogit * q[b, t, n]
            dv[b, s, z] += weight * dout[b, t, n]
    if values:
        return [out, lse, dq, dk, dv]
    dk[..., : case.dims[1]] += dv
    return [out, lse, dq, dk]


def computed(case: Case, dtype: Any, implementation: str | None = None) -> list[np.ndarray]:
    operands, (dout, dlse) = case.operands()
    index = jnp.asarray(case.index(), jnp.int32)

    def run(operands, cotangents):
        def op(q, k, v=None):
            return sparse_attention(
                q,
                k,
                v,
                index,
                scale=SCALE,
                value_width=case.dims[1] if case.latents else None,
                return_lse=True,
                implementation=implementation,
            )

        results, vjp = jax.vjp(op, *operands)
        return [*results, *vjp(cotangents)]

    wide = jnp.promote_types(dtype, jnp.float32)
    got = jax.jit(run)([jnp.asarray(a, dtype) for a in operands], (jnp.asarray(dout, dtype), jnp.asarray(dlse, wide)))
    assert [a.dtype for a in got] == [dtype, wide, *[dtype] * len(operands)]
    return [np.asarray(a, np.float64) for a in got]


def plain(case: Case) -> list[np.ndarray]:
    """Dense bfloat16 attention under a mask, differentiated by JAX: what a kernel's rounding is measured by."""
    operands, (dout, dlse) = case.operands()
    visible = np.zeros((case.batch, *case.lengths), bool)
    for b, t in np.ndindex(visible.shape[:2]):
        visible[b, t, [s for s in case.index()[b, t] if 0 <= s < case.lengths[1]]] = True
    visible = jnp.asarray(visible)[:, None]

    def op(q, k, v=None):
        v = k[..., : case.dims[1]] if v is None else v
        k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
        s = jnp.where(visible, (SCALE * jnp.einsum("btnk,bsnk->bnts", q, k)).astype(jnp.float32), -1e30)
        p = jnp.where(visible, jax.nn.softmax(s), 0).astype(jnp.bfloat16)
        return jnp.einsum("bnts,bsnu->btnu", p, v), jax.nn.logsumexp(s, axis=-1).swapaxes(1, 2)

    def run(operands, dout, dlse):
        results, vjp = jax.vjp(op, *operands)
        return [*results, *vjp((dout, jnp.where(results[1] < -1e29, 0, dlse)))]

    got = jax.jit(run)([jnp.asarray(a, jnp.bfloat16) for a in operands], jnp.bfloat16(dout), jnp.float32(dlse))
    return [np.asarray(a, np.float64) for a in got]


@contextlib.contextmanager
def tiles(case: Case):
    """Chunks of a few queries that do not divide their number, or all at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "CPU_GATHERED", 4 * case.slots * case.dims[0] if case.tiled else 1 << 30)
        yield


def check_float32(case: Case, implementation: str | None = None) -> None:
    """float32 sums of some ten products are right to a few ULPs of the largest: 1e-5 of it is eighty."""
    with tiles(case):
        results = computed(case, jnp.float32, implementation)
    for what, got, want in zip(NAMES, results, truth(case), strict=False):
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), err_msg=what)
        finite = np.isfinite(want)
        assert np.isfinite(got[finite]).all(), what
        largest = np.abs(want).max(initial=1, where=finite)
        np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=1e-5 * largest, err_msg=what)


def check_bfloat16(case: Case, implementation: str | None = None) -> None:
    """Root mean square error at most twice that of the plain computation."""
    with tiles(case):
        results = computed(case, jnp.bfloat16, implementation)
    for what, got, usual, want in zip(NAMES, results, plain(case), truth(case), strict=False):
        finite = np.isfinite(want)
        if what == "lse":  # float32 in both, of equal operands; the plain one's logits are rounded
            np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=1e-5 * np.abs(want[finite]).max())
            continue
        error, allowed = (np.sqrt(np.mean(np.square(a - want))) for a in (got, usual))
        assert error <= 2 * allowed, f"{what}: {error} against {allowed}"
