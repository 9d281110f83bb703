"""Decoding over latents against float64 NumPy: ragged lengths, drafted tokens, pages, FP8 rows, splits and shards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from harness import ways
from jax.sharding import PartitionSpec as P

from kernels_pallas import Unsupported
from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache, combine, mla_decode
from kernels_pallas.mla_decode.xla import BLOCK

SCALE = 0.11
PAGE = 64
CAPACITY = 10 * PAGE  # more than one block, and no whole number of them
LENGTHS = np.array([0, 1, 2, PAGE, PAGE + 1, BLOCK, BLOCK + 3, CAPACITY], np.int32)
B, N, C, R = len(LENGTHS), 3, 128, 8
assert CAPACITY % BLOCK


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def queries(T: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    return normal(B, T, N, C, dtype=dtype), normal(B, T, N, R, seed=1, dtype=dtype)


def filled(dtype=np.float32) -> LatentCache:
    """NaN behind every row's length: nothing of it may be seen."""
    latent, rope = normal(B, CAPACITY, C, seed=2, dtype=dtype), normal(B, CAPACITY, R, seed=3, dtype=dtype)
    for b, length in enumerate(LENGTHS):
        latent[b, length:] = rope[b, length:] = np.nan
    return LatentCache(latent, rope)  # pyright: ignore[reportArgumentType]


def paged(*arrays: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The same slots in shuffled pages, and a table with numbers that are none behind a row's last page."""
    pages = CAPACITY // PAGE
    numbers = np.random.default_rng(4).permutation(B * pages).reshape(B, pages)
    stored = []
    for a in arrays:
        shuffled = np.empty((B * pages, PAGE, a.shape[-1]), a.dtype)
        shuffled[numbers] = np.asarray(a).reshape(B, pages, PAGE, a.shape[-1])
        stored.append(shuffled)
    table = numbers.astype(np.int32)
    for b, length in enumerate(LENGTHS):
        table[b, -(-length // PAGE) :] = [-1, 10**6][b % 2]
    return stored, table


def truth(q_latent, q_rope, latent, rope, lengths=LENGTHS) -> tuple[np.ndarray, np.ndarray]:
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


all_ways = pytest.mark.parametrize("way", ways("reference", "xla"), ids=str)
run = functools.partial(mla_decode, scale=SCALE)


@all_ways
@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_values(T, way):
    cache = filled()
    check(way.run(run, *queries(T), cache, LENGTHS), truth(*queries(T), cache.latent, cache.rope))


@all_ways
@pytest.mark.parametrize("T", [1, 3])
def test_pages_in_any_order_equal_one_piece(T, way):
    cache = filled()
    (latent, rope), table = paged(cache.latent, cache.rope)
    check(
        way.run(run, *queries(T), LatentCache(latent, rope, table), LENGTHS),
        truth(*queries(T), cache.latent, cache.rope),
    )


@pytest.mark.parametrize("page", [1, 24, 640])
def test_pages_of_other_sizes(page):
    latent, rope = normal(2, 1920, C), normal(2, 1920, R)
    table = np.arange(2 * 1920 // page, dtype=np.int32).reshape(2, -1)
    cache = LatentCache(latent.reshape(-1, page, C), rope.reshape(-1, page, R), table)
    lengths = np.array([1003, 1920], np.int32)
    q = tuple(a[:2] for a in queries(2))
    check(jax.jit(run)(*q, cache, lengths), truth(*q, latent, rope, lengths))


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_splits_change_nothing(splits):
    q, latent, rope = queries(2), normal(B, 5 * BLOCK - 7, C), normal(B, 5 * BLOCK - 7, R)
    lengths = np.array([0, 1, BLOCK, BLOCK + 1, 3 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK - 8, 5 * BLOCK - 7], np.int32)
    got = jax.jit(functools.partial(run, splits=splits))(*q, LatentCache(latent, rope), lengths)
    check(got, truth(*q, latent, rope, lengths))


def test_a_length_beyond_the_capacity_sees_all():
    latent, rope = normal(B, 70, C), normal(B, 70, R)
    lengths = np.full(B, 75, np.int32)
    check(jax.jit(run)(*queries(2), LatentCache(latent, rope), lengths), truth(*queries(2), latent, rope, lengths))


@all_ways
def test_bfloat16(way):
    """At most twice the error of the plain computation in bfloat16 with float32 sums."""
    bf16 = ml_dtypes.bfloat16
    q, cache = queries(2, bf16), filled(bf16)
    want, want_lse = truth(*q, cache.latent, cache.rope)
    out, lse = way.run(run, *q, cache, LENGTHS)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    b = B - 1  # the one row that is full
    f32 = {"preferred_element_type": jnp.float32}
    s = jnp.einsum("TNC,SC->TNS", q[0][b], cache.latent[b], **f32)
    s = SCALE * (s + jnp.einsum("TNR,SR->TNS", q[1][b], cache.rope[b], **f32))
    s = jnp.where(jnp.arange(CAPACITY) < CAPACITY - 1 + jnp.arange(2)[:, None, None], s, -jnp.inf)
    p = jax.nn.softmax(s, axis=-1).astype(jnp.bfloat16)
    plain = jnp.einsum("TNS,SC->TNC", p, cache.latent[b], **f32).astype(jnp.bfloat16)
    plain_error = np.abs(np.asarray(plain, np.float64) - want[b]).max()
    assert plain_error > 1e-5
    assert np.abs(np.asarray(out[b], np.float64) - want[b]).max() <= 2 * plain_error
    # Products of bfloat16 are exact in float32, so the logits are those of float32.
    check([lse], [want_lse])


@dataclasses.dataclass(frozen=True)
class Rows:
    """FP8 rows read with NumPy as V3.2 lays them out: C e4m3, C / 128 float32, R bfloat16."""

    rows: np.ndarray

    @property
    def latent(self) -> np.ndarray:
        data = self.rows[..., :C].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return data * self.scale.astype(np.float64)

    @property
    def scale(self) -> np.ndarray:
        return self.rows[..., C : C + 4].copy().view(np.float32)

    @property
    def rope(self) -> np.ndarray:
        return self.rows[..., C + 4 :].copy().view(ml_dtypes.bfloat16)


@functools.cache
def packed(ue8m0: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latent, rope, rows), NaN bytes behind the lengths."""
    latent, rope = normal(B, CAPACITY, C, seed=2), normal(B, CAPACITY, R, seed=3)
    rows = np.array(Fp8LatentCache.pack(jnp.asarray(latent), jnp.asarray(rope), ue8m0=ue8m0).rows)
    for b, length in enumerate(LENGTHS):
        rows[b, length:] = 0x7F
    return latent, rope, rows


@all_ways
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("in_pages", [False, True])
def test_fp8(in_pages, ue8m0, way):
    latent, rope, rows = packed(ue8m0)
    cache = Fp8LatentCache(jnp.asarray(rows), C)
    if in_pages:
        (stored,), table = paged(rows)
        cache = Fp8LatentCache(jnp.asarray(stored), C, jnp.asarray(table))
    out, lse = way.run(run, *queries(2), cache, LENGTHS)
    read = Rows(rows)
    check((out, lse), truth(*queries(2), read.latent, read.rope))  # what the bytes say, exactly

    # Against what was packed: e4m3 has 3 bits of fraction, so a value moves by at most 2**-4 of itself, or by half of the least
    # subnormal, 2**-10 of a scale; the rotary key by 2**-9. Logits move by the sum of these times |q|, weights by the factor
    # exp(2 * that), so the output by (exp(2 * that) - 1) times the largest value, plus the largest change of a value.
    want, _ = truth(*queries(2), latent, rope)
    b = B - 1
    change = np.maximum(np.abs(latent[b]) / 16, read.scale[b] / 1024)
    q_latent, q_rope = (np.abs(q[b]) for q in queries(2))
    moved = np.einsum("tnc,sc->tns", q_latent, change) + np.einsum("tnr,sr->tns", q_rope, np.abs(rope[b]) / 512)
    bound = np.expm1(2 * SCALE * moved.max(-1, keepdims=True)) * np.abs(latent[b]).max() + change.max()
    assert np.all(np.abs(out[b] - want[b]) <= bound)
    assert np.abs(out[b] - want[b]).max() < 0.12  # the bound is a worst case; what is lost on normal data is little


def test_an_fp8_row_of_v32_has_656_bytes():
    cache = Fp8LatentCache.pack(jnp.zeros((1, 2, 512)), jnp.zeros((1, 2, 64)))
    assert cache.rows.shape == (1, 2, 656) and cache.rows.dtype == jnp.uint8
    latent = 3.1 * jnp.ones((1, 2, 512))
    scales = Fp8LatentCache.pack(latent, jnp.zeros((1, 2, 64)), ue8m0=True).rows[..., 512:528]
    scales = np.asarray(scales).copy().view(np.float32)
    assert np.all(np.frexp(scales)[0] == 0.5)


# --- drafted tokens ----------------------------------------------------------------------------------------------------------


def test_a_block_of_queries_equals_one_at_a_time():
    cache, (q_latent, q_rope) = filled(), queries(4)
    out, lse = jax.jit(run)(q_latent, q_rope, cache, LENGTHS)
    for t in range(4):
        one = slice(t, t + 1)
        lengths = np.maximum(LENGTHS - 3 + t, 0)
        alone = jax.jit(run)(q_latent[:, one], q_rope[:, one], cache, lengths)
        check((out[:, one], lse[:, one]), alone, tolerance=1e-5)


def test_rejected_tokens_are_forgotten():
    """Three drafted tokens are written; two are rejected, and what comes instead overwrites one of them."""
    latent, rope = normal(B, 40, C), normal(B, 40, R)
    start = np.arange(B) + 5
    clean, drafted = [latent.copy(), rope.copy()], [latent.copy(), rope.copy()]
    for b in range(B):
        for a in drafted:
            a[b, start[b] + 1 : start[b] + 3] = 77
            a[b, start[b] + 3 :] = np.nan
    for a, other in zip(
        drafted, clean, strict=True
    ):  # the token after the accepted one, at the first rejected position
        for b in range(B):
            a[b, start[b] + 1] = other[b, start[b] + 1]
    lengths = (start + 2).astype(np.int32)
    check(jax.jit(run)(*queries(1), LatentCache(*drafted), lengths), truth(*queries(1), *clean, lengths))


# --- transformations ---------------------------------------------------------------------------------------------------------


def test_vmap():
    cache, q = filled(), queries(2)
    one = lambda q_latent, q_rope, latent, rope, length: run(  # noqa: E731
        q_latent[None], q_rope[None], LatentCache(latent[None], rope[None]), length[None]
    )
    out, lse = jax.jit(jax.vmap(one))(*q, cache.latent, cache.rope, LENGTHS)
    check((out[:, 0], lse[:, 0]), truth(*q, cache.latent, cache.rope))


def test_rows_and_heads_on_devices():
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cache, T = filled(), 2
    q = normal(B, T, 4, C), normal(B, T, 4, R, seed=1)
    heads, rows = P("rows", None, "heads"), P("rows")
    with jax.set_mesh(mesh):
        local = jax.shard_map(run, in_specs=(heads, heads, rows, rows), out_specs=(heads, heads))
        got = jax.jit(local)(*q, cache, LENGTHS)
    check(got, truth(*q, cache.latent, cache.rope))


def test_parts_of_the_cache_on_devices_combine():
    """Each of eight devices holds an eighth of the positions of every row."""
    mesh = jax.make_mesh((8,), ("parts",), axis_types=(jax.sharding.AxisType.Auto,))
    cache, q = filled(), queries(1)
    part = CAPACITY // 8

    def local(q_latent, q_rope, cache, lengths):
        here = jnp.clip(lengths - jax.lax.axis_index("parts") * part, 0, part)
        out, lse = run(q_latent, q_rope, cache, here)
        return out[None], lse[None]

    with jax.set_mesh(mesh):
        split = jax.shard_map(local, in_specs=(P(), P(), P(None, "parts"), P()), out_specs=P("parts"))
        out, lse = (np.asarray(a) for a in jax.jit(split)(*q, cache, LENGTHS))
    check(combine(list(zip(out, lse, strict=True))), truth(*q, cache.latent, cache.rope))


def test_a_mostly_empty_cache_costs_little():
    """One block lies in the program, in a loop that ends behind the longest row."""
    long = LatentCache(normal(B, 4 * BLOCK, C), normal(B, 4 * BLOCK, R))
    text = jax.jit(run).lower(*queries(1), long, LENGTHS).as_text()
    assert text.count("stablehlo.while") == 1 and text.count("stablehlo.dot_general") == 3


def test_gradients_are_refused():
    cache = filled()
    with pytest.raises(TypeError, match="not differentiable"):
        jax.grad(lambda q: run(q, queries(1)[1], cache, LENGTHS)[0].sum())(jnp.asarray(queries(1)[0]))


# --- bad input ---------------------------------------------------------------------------------------------------------------


def arguments(**changes):
    cache = filled()
    q_latent, q_rope = queries(2)
    given = {"q_latent": q_latent, "q_rope": q_rope, "latent": cache.latent, "rope": cache.rope, "table": None}
    given |= {"lengths": LENGTHS} | changes
    return (
        given["q_latent"],
        given["q_rope"],
        LatentCache(given["latent"], given["rope"], given["table"]),
        given["lengths"],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_latent": normal(B, 2, C)}, r"needs queries \[B, T, N, C\]"),
        ({"q_rope": normal(B, 2, N + 1, R)}, r"needs queries \[B, T, N, C\]"),
        ({"q_latent": normal(B, 2, N, C).astype(np.float16)}, "float32 or bfloat16"),
        ({"latent": normal(B, CAPACITY, C + 1)}, "do not fit a cache"),
        ({"rope": normal(B, CAPACITY, R + 1)}, "do not fit a cache"),
        ({"rope": normal(B, CAPACITY - 1, R)}, "a cache of one"),
        ({"latent": normal(B + 1, CAPACITY, C), "rope": normal(B + 1, CAPACITY, R)}, "other rows"),
        ({"latent": normal(B, 1, C), "rope": normal(B, 1, R)}, "2 new tokens cannot have been written .* 1 positions"),
        ({"lengths": LENGTHS[:-1]}, "needs lengths"),
        ({"lengths": LENGTHS.astype(np.float32)}, "needs lengths"),
        ({"table": np.zeros((B + 1, 2), np.int32)}, "page table"),
        ({"table": np.zeros((B, 2), np.float32)}, "page table"),
        ({"table": np.zeros((B, 0), np.int32)}, "empty dim"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments(**changes))


def test_options_that_cannot_be_are_refused():
    for options, message in (({"splits": 0}, "splits=0"), ({"scale": float("nan")}, "scale=nan")):
        with pytest.raises(ValueError, match=message):
            mla_decode(*arguments(), **({"scale": SCALE} | options))
    with pytest.raises(Unsupported, match="no implementation 'tpv'"):
        run(*arguments(), implementation="tpv")
    with pytest.raises(ValueError, match="whole tiles of 128"):
        Fp8LatentCache.pack(jnp.zeros((1, 2, 100)), jnp.zeros((1, 2, 8)))
    with pytest.raises(ValueError, match="do not fit a cache"):
        run(*queries(1), Fp8LatentCache(jnp.zeros((B, 8, 140), jnp.uint8), C), LENGTHS)
