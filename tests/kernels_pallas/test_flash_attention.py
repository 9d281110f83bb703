"""Flash attention against its equation in float64 NumPy, written here: values, logsumexp and all gradients."""

import contextlib
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Mask, flash_attention
from kernels_pallas.flash_attention import xla

IMPLEMENTATIONS = ["xla", "reference"]
SCALE = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Conditions are plain arrays here, and `visible` reads them by definition."""

    dims: tuple[int, int] = (16, 8)  # of q and k, of v
    heads: tuple[int, int] = (4, 2)  # N, Z
    lengths: tuple[int, int] = (37, 37)  # T, S
    batch: int = 2
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    offset: int | None = None  # of the first query, where T is not S
    positions: str | None = None  # how queries stand among keys, in place of the offset
    segments: str | None = None
    selected: bool = False
    softcap: float | None = None
    sinks: bool = False
    tiled: bool = True  # several blocks and chunks

    def arrays(self) -> dict[str, np.ndarray]:
        """Integer ids and positions and the selection, each [B, T], [B, S] or [B, T, S]."""
        rng = np.random.default_rng(1)
        B, (T, S) = self.batch, self.lengths
        found = {}
        if self.segments == "packed":  # documents, and padding at the end of queries and keys
            ids = np.sort(rng.integers(1, 5, (B, max(T, S))), axis=1)
            q_ids, kv_ids = ids[:, :T].copy(), ids[:, :S].copy()
            q_ids[:, -3:], kv_ids[:, -2:] = 0, 0
            found |= {"q_segment_ids_BT": q_ids, "kv_segment_ids_BS": kv_ids}
        if self.segments == "shuffled":
            found |= {
                "q_segment_ids_BT": rng.integers(-1, 3, (B, T)),
                "kv_segment_ids_BS": rng.integers(-1, 3, (B, S)),
            }
        if self.segments == "one row empty":
            found |= {
                "q_segment_ids_BT": np.ones((B, T), int) * (np.arange(B) > 0)[:, None],
                "kv_segment_ids_BS": np.ones((B, S), int),
            }
        if self.positions:
            ends = {"tail": np.full(B, S - 1), "cache": np.linspace(T - 1, S - 1, B).astype(int)}[self.positions]
            found |= {
                "q_positions_BT": ends[:, None] - np.arange(T)[::-1],
                "kv_positions_BS": np.broadcast_to(np.arange(S), (B, S)),
            }
        if self.selected:
            found["selected_BTS"] = rng.random((B, T, S)) < 0.3
        return found

    def mask(self) -> Mask:
        arrays = {name: jnp.asarray(a, bool if a.dtype == bool else jnp.int32) for name, a in self.arrays().items()}
        return Mask(causal=self.causal, window=self.window, q_offset=self.offset, **arrays)

    def visible(self) -> np.ndarray:
        arrays, (T, S) = self.arrays(), self.lengths
        seen = np.zeros((self.batch, T, S), bool)
        left, right = self.window or (None, None)
        for b, t, s in np.ndindex(seen.shape):
            q, k = t + (self.offset or 0), s
            if self.positions:
                q, k = arrays["q_positions_BT"][b, t], arrays["kv_positions_BS"][b, s]
            sees = not (self.causal and k > q)
            sees &= left is None or k >= q - left
            sees &= right is None or k <= q + right
            if self.segments:
                mine, its = arrays["q_segment_ids_BT"][b, t], arrays["kv_segment_ids_BS"][b, s]
                sees &= mine == its and mine != 0
            if self.selected:
                sees &= bool(arrays["selected_BTS"][b, t, s])
            seen[b, t, s] = sees
        return seen

    def operands(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """q, k, v and perhaps sinks; cotangents of out and lse. All are bfloat16 numbers."""
        rng = np.random.default_rng(2)
        B, (T, S), (N, Z), (K, U) = self.batch, self.lengths, self.heads, self.dims
        shapes = [(B, T, N, K), (B, S, Z, K), (B, S, Z, U)] + [(N,)] * self.sinks
        draw = lambda shape: rng.standard_normal(shape).astype(jnp.bfloat16).astype(np.float64)  # noqa: E731
        return [draw(shape) for shape in shapes], [draw((B, T, N, U)), draw((B, T, N))]


def truth(case: Case) -> list[np.ndarray]:
    """out, lse, dq, dk, dv and perhaps dsinks by the equations and the chain rule, one row of the batch and head at a time."""
    (q, k, v, *sinks), (dout, dlse) = case.operands()
    out, lse, grads = np.zeros_like(dout), np.zeros_like(dlse), [np.zeros_like(a) for a in (q, k, v, *sinks)]
    visible, group = case.visible(), q.shape[2] // k.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        z = n // group
        raw = SCALE * q[b, :, n] @ k[b, :, z].T
        capped = raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)
        slope = 1 if case.softcap is None else 1 / np.cosh(raw / case.softcap) ** 2
        weights = np.where(visible[b], np.exp(capped), 0)  # no logit here is near overflow
        total = weights.sum(1, keepdims=True) + (np.exp(sinks[0][n]) if sinks else 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            lse[b, :, n] = np.log(total[:, 0])
            p = np.where(total > 0, weights / total, 0)
        out[b, :, n] = p @ v[b, :, z]
        dp = dout[b, :, n] @ v[b, :, z].T
        inner = (p * dp).sum(1, keepdims=True) - dlse[b, :, n, None]
        ds = p * (dp - inner) * slope * SCALE
        grads[0][b, :, n] = ds @ k[b, :, z]
        grads[1][b, :, z] += ds.T @ q[b, :, n]
        grads[2][b, :, z] += p.T @ dout[b, :, n]
        if sinks:
            grads[3][n] -= (np.exp(sinks[0][n]) / total * inner).sum()
    return [out, lse, *grads]


def computed(case: Case, dtype: Any, implementation: str | None = None) -> list[np.ndarray]:
    operands, cotangents = case.operands()
    mask = case.mask()

    def run(operands, cotangents):
        def op(q, k, v, *sinks):
            return flash_attention(
                q,
                k,
                v,
                scale=SCALE,
                mask=mask,
                softcap=case.softcap,
                sinks=sinks[0] if sinks else None,
                implementation=implementation,
                return_lse=True,
            )

        results, vjp = jax.vjp(op, *operands)
        return [*results, *vjp(tuple(cotangents))]

    dout, dlse = cotangents
    wide = jnp.promote_types(dtype, jnp.float32)
    got = jax.jit(run)([jnp.asarray(a, dtype) for a in operands], [jnp.asarray(dout, dtype), jnp.asarray(dlse, wide)])
    assert [a.dtype for a in got] == [dtype, wide, *[dtype] * len(operands)]
    return [np.asarray(a, np.float64) for a in got]


def plain(case: Case) -> list[np.ndarray]:
    """The usual few lines in bfloat16 but for the softmax, differentiated by JAX: what a kernel's rounding is measured by."""
    operands, (dout, dlse) = case.operands()
    visible = jnp.asarray(case.visible())[:, None]

    def op(q, k, v, *sinks):
        k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
        s = SCALE * jnp.einsum("btnk,bsnk->bnts", q, k)
        s = s if case.softcap is None else case.softcap * jnp.tanh(s / case.softcap)
        s = jnp.where(visible, s.astype(jnp.float32), -1e30)
        sink = sinks[0].astype(jnp.float32)[:, None, None] if sinks else jnp.full((q.shape[2], 1, 1), -1e30)
        s = jnp.concatenate([s, jnp.broadcast_to(sink, (*s.shape[:3], 1))], axis=-1)
        p = jnp.where(visible, jax.nn.softmax(s)[..., :-1], 0).astype(jnp.bfloat16)
        return jnp.einsum("bnts,bsnu->btnu", p, v), jax.nn.logsumexp(s, axis=-1).swapaxes(1, 2)

    def run(operands, dout, dlse):
        results, vjp = jax.vjp(op, *operands)
        return [*results, *vjp((dout, jnp.where(results[1] < -1e29, 0, dlse)))]

    got = jax.jit(run)(
        [jnp.asarray(a, jnp.bfloat16) for a in operands], jnp.asarray(dout, jnp.bfloat16), jnp.float32(dlse)
    )
    return [np.asarray(a, np.float64) for a in got]


NAMES = ["out", "lse", "dq", "dk", "dv", "dsinks"]


def check_float32(case: Case, implementation: str | None = None) -> None:
    """float32 sums of some hundred products are right to some ten ULPs of the largest: 1e-5 of it is over a hundred."""
    for name, got, want in zip(NAMES, computed(case, jnp.float32, implementation), truth(case), strict=False):
        assert not np.isnan(got).any(), name
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg=name)
        finite = np.isfinite(want)
        if finite.any():
            largest = np.abs(want[finite]).max()
            np.testing.assert_allclose(got[finite], want[finite], rtol=0, atol=1e-5 * max(1, largest), err_msg=name)


def check_bfloat16(case: Case, implementation: str | None = None) -> None:
    """Root mean square error at most twice that of the plain computation."""
    results = zip(NAMES, computed(case, jnp.bfloat16, implementation), plain(case), truth(case), strict=False)
    for name, got, usual, want in results:
        finite = np.isfinite(want)
        if name == "lse":  # float32 in both, of equal operands
            np.testing.assert_allclose(
                got[finite], want[finite], rtol=0, atol=1e-5 * np.abs(want).max(initial=1, where=finite)
            )
            continue
        error, allowed = (np.sqrt(np.mean(np.square(a - want)[finite])) for a in (got, usual))
        assert error <= 2 * allowed, f"{name}: {error} against {allowed}"


@contextlib.contextmanager
def tiles(case: Case):
    """Blocks of 16 queries and chunks of 8 keys, or all at once."""
    with pytest.MonkeyPatch.context() as patch:
        if case.tiled:
            patch.setattr(xla, "BLOCK", 16)
            patch.setattr(xla, "CHUNKS", (8, 8))
            patch.setattr(xla, "WHOLE", 1)
        yield


# ---- every feature with every other: all pairs of these values in few cases, many products in the slow test

FACTORS: dict[str, list[Any]] = {
    "dims": [(64, 64), (128, 128), (192, 128), (576, 512), (256, 256)],
    "heads": [(8, 8), (8, 2), (8, 1), (5, 1)],
    "causal": [False, True],
    "window": [None, (9, None), (7, 5)],
    "segments": [None, "packed", "shuffled"],
    "softcap": [None, 2.0],
    "sinks": [False, True],
    "lengths": [(37, 37), (29, 50)],
    "tiled": [True, False],
}


def all_pairs() -> list[Case]:
    """Greedy: each case takes, factor by factor, the value that meets most pairs not met yet."""
    unmet = {
        frozenset({(a, x), (b, y)})
        for a, b in itertools.combinations(FACTORS, 2)
        for x, y in itertools.product(range(len(FACTORS[a])), range(len(FACTORS[b])))
    }
    cases = []
    while unmet:
        chosen = dict(min(unmet, key=sorted))
        for name in sorted(FACTORS.keys() - chosen.keys()):
            gains = [
                len(unmet & {frozenset({(name, i), c}) for c in chosen.items()}) for i in range(len(FACTORS[name]))
            ]
            chosen[name] = gains.index(max(gains))
        unmet -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        cases.append(made({name: FACTORS[name][i] for name, i in chosen.items()}))
    return cases


def made(values: dict[str, Any]) -> Case:
    T, S = values["lengths"]
    return Case(**values, offset=S - T if T != S else None, batch=1 if values["dims"][0] > 128 else 2)


ADVERSARIAL = {
    "length one": Case(lengths=(1, 1), causal=True),
    "one query, a cache": Case(lengths=(1, 40), batch=3, causal=True, positions="cache"),
    "four queries, a cache": Case(lengths=(4, 40), batch=3, causal=True, positions="cache"),
    "a cache, queries in blocks": Case(lengths=(41, 60), causal=True, positions="cache", segments="packed"),
    "a window in a cache": Case(lengths=(41, 60), causal=True, window=(5, None), positions="cache"),
    "few keys": Case(lengths=(70, 3)),
    "a row of padding alone": Case(segments="one row empty", causal=True),
    "a row of padding alone, sinks": Case(segments="one row empty", causal=True, sinks=True),
    "queries before all keys": Case(lengths=(40, 30), causal=True, offset=-20),
    "queries beyond the window": Case(lengths=(40, 30), window=(5, 0), offset=20),
    "nothing seen at all": Case(lengths=(9, 30), causal=True, offset=-50),
    "nothing seen at all, whole": Case(lengths=(9, 30), causal=True, offset=-50, tiled=False),
    "selection": Case(selected=True, causal=True, segments="packed"),
    "selection, sinks and softcap": Case(selected=True, softcap=1.5, sinks=True, lengths=(20, 33)),
    "only what follows": Case(window=(0, 3)),
    "narrow heads": Case(dims=(3, 1), heads=(3, 3), causal=True),
}


PAIRS = all_pairs()


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: f"{c.dims}-{c.heads}")
def test_features_in_pairs(case):
    with tiles(case):
        check_float32(case)


@pytest.mark.parametrize("case", PAIRS[::3], ids=lambda c: f"{c.dims}-{c.heads}")
def test_rounding_in_bfloat16(case):
    with tiles(case):
        check_bfloat16(case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_edges(name, implementation):
    with tiles(ADVERSARIAL[name]):
        check_float32(ADVERSARIAL[name], implementation)


@pytest.mark.slow  # every 37th of 5,760: coprime to the sizes of the factors, so that all values take turns
@pytest.mark.parametrize("values", list(itertools.product(*FACTORS.values()))[::37], ids=str)
def test_many_products_of_features(values):
    case = made(dict(zip(FACTORS, values, strict=True)))
    with tiles(case):
        check_float32(case)


def test_float64():
    case = Case(causal=True, softcap=2.0, sinks=True, window=(9, None))
    with tiles(case), jax.enable_x64(True):
        for name, got, want in zip(NAMES, computed(case, jnp.float64), truth(case), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * max(1, np.abs(want).max()), err_msg=name)
