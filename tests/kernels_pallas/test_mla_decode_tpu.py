"""The TPU kernel of decoding on a simulated chip against the equation in float64, and what compilers make of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8_cases import values_of
from harness import interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mla_decode_cases import SCALE, Case, check, check_bfloat16, normal, truth

from kernels_pallas import Unsupported, aot
from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache, mla_decode, tpu, tpu_blocks

run = functools.partial(mla_decode, scale=SCALE, implementation="tpu")

SLOTS, AT_ONCE = 256, 128
LENGTHS = (0, 1, 128, 256, 257, 300)  # what ends with a chunk, with a block, one more, and what fills the cache
CASES = {
    "one query": Case(lengths=LENGTHS, capacity=300),
    "two queries, one head": Case(lengths=(1, 257, 300), capacity=300, queries=2, heads=1),
    "four queries": Case(lengths=(0, 2, 259, 4, 300), capacity=300, queries=4),
    "16 heads, nothing at both ends": Case(lengths=(0, 0, 300, 3, 0), capacity=384, heads=16),
    "less than a register": Case(lengths=(0, 5, 9), capacity=9, queries=2),
    "pages": Case(lengths=LENGTHS, capacity=384, page=128),
    "large pages, four queries": Case(lengths=(2, 129, 300, 512), capacity=512, queries=4, page=256),
    "a page a block": Case(lengths=(384, 1, 300), capacity=768, page=384),
    "fp8": Case(lengths=(0, 1, 257, 300), capacity=300, queries=2, widths=(256, 8), fp8=True),
    "fp8 pages": Case(lengths=(300, 0, 257, 384), capacity=384, heads=1, page=128, fp8=True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tpu, "SLOTS", SLOTS)
    monkeypatch.setattr(tpu, "SLOTS_AT_ONCE", AT_ONCE)


def simulated(fn, *args):
    with interpreted("tpu"):
        return jax.block_until_ready(jax.jit(fn)(*args))


QUICK = {
    ("four queries", None),
    ("16 heads, nothing at both ends", 2),
    ("less than a register", None),
    ("fp8 pages", None),
}


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        pytest.param(name, splits, marks=[] if (name, splits) in QUICK else pytest.mark.slow)
        for name in CASES
        for splits in (None, 2, 3)
    ],
)
def test_values(name, splits):
    case = CASES[name]
    check(simulated(functools.partial(run, splits=splits), *case.args), case.truth())


# Of V3: with 16 heads as on one of eight devices.
V3 = Case(lengths=(1, 0, 259, 300), capacity=384, queries=2, heads=16, widths=(512, 64), dtype=ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("changes", "splits"),
    [
        pytest.param({"queries": 1}, None, marks=pytest.mark.slow),
        ({"page": 128}, 2),
        ({"fp8": True}, None),
        pytest.param({"heads": 128}, None, marks=pytest.mark.slow),
        pytest.param({"heads": 128, "queries": 4, "page": 384}, 3, marks=pytest.mark.slow),
        pytest.param({"heads": 128, "fp8": True, "page": 128}, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounding_in_bfloat16(changes, splits):
    case = dataclasses.replace(V3, **changes)
    check_bfloat16(case, simulated(functools.partial(run, splits=splits), *case.args))


@pytest.mark.parametrize("generation", [6, 7])
def test_every_number_that_fp8_has(generation, monkeypatch):
    """Subnormal ones too; with a single slot the output is the latent. Not a number makes the logit none."""
    monkeypatch.setattr(tpu, "_generation", lambda: generation)
    codes = np.arange(256, dtype=np.uint8).reshape(2, 1, 128)
    codes = np.concatenate([np.where(codes % 128 == 127, 0, codes), codes])
    scale = np.array([0.37, 2**-20, 0.37, 2**-20], np.float32)
    tail = np.concatenate([scale.view(np.uint8).reshape(4, 1, 4), np.zeros((4, 1, 16), np.uint8)], axis=-1)
    rows = np.pad(np.concatenate([codes, tail], axis=-1), ((0, 0), (0, 127), (0, 0)))
    q, lengths = (normal(4, 1, 1, 128), normal(4, 1, 1, 8)), np.ones(4, np.int32)
    out, lse = simulated(run, *q, Fp8LatentCache(jnp.asarray(rows), 128), lengths)
    np.testing.assert_array_equal(out[:2, 0, 0], values_of(codes[:2, 0]) * scale[:2, None])
    assert np.isnan(out[2:]).all() and np.isnan(lse[2:]).all()


@pytest.mark.device
@pytest.mark.parametrize("name", CASES)
def test_on_a_chip(name):
    if jax.default_backend() != "tpu":
        pytest.skip(f"no device for 'tpu': this is {jax.default_backend()}")
    case = dataclasses.replace(CASES[name], dtype=ml_dtypes.bfloat16)
    check_bfloat16(case, jax.jit(run)(*case.args))


# ---- what is read


@pytest.mark.parametrize(("page", "splits"), [(None, 1), (128, 3)])
def test_only_what_is_held_is_read(page, splits, monkeypatch):
    """Each slot once, by the 128 that a register has lanes; and the rotary keys with them."""
    case = dataclasses.replace(CASES["one query"], page=page, capacity=384)
    started: list[tuple[int, ...]] = []

    class Noted:
        def __init__(self, source, target, semaphore):
            self.copy, self.shape = copy(source, target, semaphore), target.shape[-2:]
            self.wait = self.copy.wait

        def start(self):
            jax.debug.callback(lambda: started.append(self.shape))
            self.copy.start()

    copy = tpu_blocks.pltpu.make_async_copy
    monkeypatch.setattr(tpu_blocks.pltpu, "make_async_copy", Noted)
    check(simulated(functools.partial(run, splits=splits), *case.args), case.truth())
    R = case.widths[1]
    held = sum(-(-length // 128) * 128 for length in case.lengths)
    assert sum(slots for slots, _ in started if slots != R) == held
    assert sum(slots for width, slots in started if width == R) == held


def test_a_length_beyond_the_capacity_sees_all():
    q, latent, rope = (normal(1, 2, 3, 128), normal(1, 2, 3, 8)), normal(1, 140, 128), normal(1, 140, 8)
    lengths = np.full(1, 300, np.int32)
    check(simulated(run, *q, LatentCache(latent, rope), lengths), truth(*q, latent, rope, lengths))


# ---- transforms and meshes


def test_rows_and_heads_on_devices():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    case = Case(lengths=(0, 130, 256, 7), capacity=256, queries=2, heads=4)
    specs = P("rows", None, "heads"), P("rows", None, "heads"), P("rows"), P("rows")
    with jax.set_mesh(mesh):
        place = lambda tree, spec: jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(mesh, spec)), tree)  # noqa: E731
        placed = [place(a, spec) for a, spec in zip(case.args, specs, strict=True)]
        got = simulated(jax.shard_map(run, in_specs=specs, out_specs=specs[:2]), *placed)
    check(got, case.truth())


def test_vmap():
    case = Case(lengths=(0, 130), capacity=256, queries=2)
    one = lambda *row: tuple(a[0] for a in run(*jax.tree.map(lambda a: a[None], row)))  # noqa: E731
    check(simulated(jax.vmap(one), *case.args), case.truth())


@pytest.mark.slow
def test_twice_the_same_bits():
    args = CASES["pages"].args
    first, second = (simulated(functools.partial(run, splits=2), *args) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


# ---- refusals


def test_what_it_cannot_do_it_says():
    case = Case(lengths=(3,), capacity=128, page=64)
    with pytest.raises(Unsupported, match="takes pages of 128 to 4096 slots, by 128, not 64"):
        run(*case.args)
    with pytest.raises(Unsupported, match="an even number of rotary dims"):
        run(*Case(lengths=(3,), capacity=128, widths=(128, 7), fp8=True).args)
    with pytest.raises(Unsupported, match="takes 1024 queries times heads a row, not 1200"):
        run(*Case(lengths=(3,), capacity=128, queries=4, heads=300).args)
    pages = LatentCache(jnp.zeros((1, 128, 128)), jnp.zeros((1, 128, 8)), jnp.zeros((1, 200_000), jnp.int32))
    with pytest.raises(Unsupported, match="no room for 200000 page numbers"):
        run(*case.q, pages, np.array([3], np.int32))


# ---- for chips that are not here

needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


def compiled(cache, *, heads=16, queries=1, chip="v5e", dtype=jnp.bfloat16):
    batch = cache.arrays[0].shape[0] if cache.page_table_BP is None else cache.page_table_BP.shape[0]
    q = [jax.ShapeDtypeStruct((batch, queries, heads, width), dtype) for width in (512, 64)]
    return aot.chip(chip).compile(run, *q, cache, jax.ShapeDtypeStruct((batch,), jnp.int32))


def latents(*slots: int, dtype=jnp.bfloat16, table=None) -> LatentCache:
    latent, rope = (jax.ShapeDtypeStruct((*slots, width), dtype) for width in (512, 64))
    return LatentCache(latent, rope, table and jax.ShapeDtypeStruct(table, jnp.int32))  # pyright: ignore[reportArgumentType]


@needs_compilers
@pytest.mark.parametrize("heads", [1, 3, pytest.param(16, marks=pytest.mark.slow)])
def test_compiles_with_few_heads(heads):
    report = compiled(latents(4, 2048), heads=heads)
    assert report.compiled, report.error


@pytest.mark.slow
@needs_compilers
def test_compiles_in_float32():
    report = compiled(latents(4, 2048, dtype=jnp.float32), dtype=jnp.float32, queries=4)
    assert report.compiled, report.error


@pytest.mark.slow
@needs_compilers
def test_most_rows_fit():
    report = compiled(latents(4, 2048), heads=128, queries=8, chip="tpu7x")
    assert report.compiled, report.error


@needs_compilers
@pytest.mark.parametrize("cache", [latents(64, 4096), latents(2048, 128, table=(64, 32))], ids=["contiguous", "paged"])
def test_no_call_copies_the_cache(cache):
    """XLA stores it as the kernel reads it."""
    report = compiled(cache)
    assert report.temp_bytes is not None and report.temp_bytes < 1 << 20
