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
from mla_decode_cases import SCALE, Case, Rows, check, check_bfloat16, normal, truth

from kernels_pallas import Unsupported
from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache, combine, mla_decode
from kernels_pallas.mla_decode.xla import BLOCK

PAGE = 64
CAPACITY = 10 * PAGE  # more than one block, and no whole number of them
LENGTHS = np.array([0, 1, 2, PAGE, PAGE + 1, BLOCK, BLOCK + 3, CAPACITY], np.int32)
B, N, C, R = len(LENGTHS), 3, 128, 8
assert CAPACITY % BLOCK

FILLED = Case(lengths=tuple(LENGTHS.tolist()), capacity=CAPACITY, heads=N, widths=(C, R))


def queries(T: int) -> tuple[np.ndarray, np.ndarray]:
    return dataclasses.replace(FILLED, queries=T).q


def filled() -> LatentCache:
    """NaN behind every row's length: nothing of it may be seen."""
    return LatentCache(*FILLED.stored)  # pyright: ignore[reportArgumentType]


all_ways = pytest.mark.parametrize("way", ways("reference", "xla"), ids=str)
run = functools.partial(mla_decode, scale=SCALE)


@all_ways
@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_values(T, way):
    case = dataclasses.replace(FILLED, queries=T)
    check(way.run(run, *case.args), case.truth())


@all_ways
@pytest.mark.parametrize("T", [1, 3])
def test_pages_in_any_order_equal_one_piece(T, way):
    case = dataclasses.replace(FILLED, queries=T, page=PAGE)
    check(way.run(run, *case.args), case.truth())


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
    case = dataclasses.replace(FILLED, queries=2, dtype=ml_dtypes.bfloat16)
    check_bfloat16(case, way.run(run, *case.args))


@all_ways
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("in_pages", [False, True])
def test_fp8(in_pages, ue8m0, way):
    case = dataclasses.replace(FILLED, queries=2, fp8=True, ue8m0=ue8m0, page=PAGE if in_pages else None)
    out, lse = way.run(run, *case.args)
    check((out, lse), case.truth())  # what the bytes say, exactly

    # Against what was packed: e4m3 has 3 bits of fraction, so a value moves by at most 2**-4 of itself, or by half of the least
    # subnormal, 2**-10 of a scale; the rotary key by 2**-9. Logits move by the sum of these times |q|, weights by the factor
    # exp(2 * that), so the output by (exp(2 * that) - 1) times the largest value, plus the largest change of a value.
    latent, rope = case.written
    want, _ = truth(*case.q, latent, rope, LENGTHS)
    b = B - 1
    change = np.maximum(np.abs(latent[b]) / 16, Rows(case.stored[0], C).scale[b] / 1024)
    q_latent, q_rope = (np.abs(q[b]) for q in case.q)
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
    check((out[:, 0], lse[:, 0]), truth(*q, cache.latent, cache.rope, LENGTHS))


def test_rows_and_heads_on_devices():
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cache, T = filled(), 2
    q = normal(B, T, 4, C), normal(B, T, 4, R, seed=1)
    heads, rows = P("rows", None, "heads"), P("rows")
    with jax.set_mesh(mesh):
        local = jax.shard_map(run, in_specs=(heads, heads, rows, rows), out_specs=(heads, heads))
        got = jax.jit(local)(*q, cache, LENGTHS)
    check(got, truth(*q, cache.latent, cache.rope, LENGTHS))


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
    check(combine(list(zip(out, lse, strict=True))), truth(*q, cache.latent, cache.rope, LENGTHS))


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
