"""The Hopper kernel of decoding on a simulated chip against the equation in float64. That it compiles is in test_aot.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import pytest
from harness import Way, interpreted
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mla_decode_cases import SCALE, Case, check_bfloat16

from kernels_pallas import Unsupported, aot
from kernels_pallas.mla_decode import Fp8LatentCache, LatentCache, gpu, mla_decode
from kernels_pallas.mla_decode.gpu_cache import SLOTS

bfloat16 = functools.partial(Case, dtype=ml_dtypes.bfloat16, widths=(128, 64))
fp8 = functools.partial(Case, dtype=ml_dtypes.bfloat16, widths=(512, 64), fp8=True)
# Blocks of 64 slots that are full, end at a slot, or begin behind what the first of several queries sees.
CASES = {
    "one query": bfloat16(lengths=(1, 63, 64, 65, 150), capacity=192),
    "drafted tokens, pages, an empty row": bfloat16(lengths=(0, 2, 64, 65, 130), capacity=192, queries=3, page=64),
    "rows over two tiles, large pages": bfloat16(lengths=(1, 70, 256), capacity=256, queries=4, heads=17, page=128),
    "wide": bfloat16(lengths=(70,), capacity=128, widths=(512, 64), heads=64),
    "fp8": fp8(lengths=(70,), capacity=128, queries=2, page=64),
    "fp8, ue8m0, an empty row": fp8(lengths=(0, 1, 192), capacity=192, queries=2, ue8m0=True),
}
EVERY_TIME = {"drafted tokens, pages, an empty row", "fp8"}


@pytest.fixture
def interpretable(monkeypatch):
    def choose(latent, rope):
        return gpu.Tile(latent=latent, rope=rope, stages=1 if latent == 512 else 2, in_shared_memory=True)

    monkeypatch.setattr(gpu, "choose", choose)
    with interpreted("gpu"):
        yield


def run(case: Case, splits: int | None):
    call = functools.partial(mla_decode, scale=SCALE, splits=splits, implementation="gpu")
    return jax.block_until_ready(jax.jit(call)(*case.args))


@pytest.mark.parametrize(
    "name", [name if name in EVERY_TIME else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_values(name, interpretable):
    check_bfloat16(CASES[name], run(CASES[name], splits=1))


@pytest.mark.device
@pytest.mark.parametrize("splits", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_values_on_a_device(name, splits):
    call = functools.partial(mla_decode, scale=SCALE, splits=splits)
    check_bfloat16(CASES[name], Way(implementation="gpu", where="device").run(call, *CASES[name].args))


@pytest.mark.parametrize("splits", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_splits(splits, interpretable):
    """More parts than some rows have blocks; None takes as many as there are blocks, for so few rows."""
    case = bfloat16(lengths=(0, 1, 128, 70, 256), capacity=256, queries=2)
    check_bfloat16(case, run(case, splits))


def test_a_length_beyond_the_capacity_sees_all(interpretable):
    case = bfloat16(lengths=(64, 64), capacity=64)
    q_latent, q_rope, cache, lengths = case.args
    call = functools.partial(mla_decode, scale=SCALE, splits=1, implementation="gpu")
    check_bfloat16(case, jax.jit(call)(q_latent, q_rope, cache, lengths + 5))


def shapes(kind: str, in_pages: bool):
    """Arguments for four rows of 512 slots."""
    shape = jax.ShapeDtypeStruct
    table: Any = shape((4, 8), jnp.int32) if in_pages else None
    rows = (32, SLOTS) if in_pages else (4, 8 * SLOTS)
    arrays: list[Any] = [shape((*rows, width), dtype) for width, dtype in WIDTHS]
    latent, rope, packed = arrays
    cache = LatentCache(latent, rope, table) if kind == "bfloat16" else Fp8LatentCache(packed, 512, table)
    return *(shape((4, 2, 16, width), jnp.bfloat16) for width in (512, 64)), cache, shape((4,), jnp.int32)


WIDTHS: Any = (512, jnp.bfloat16), (64, jnp.bfloat16), (656, jnp.uint8)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("splits", [1, None])
def test_it_lowers_without_a_gpu(splits, in_pages, kind):
    call = functools.partial(mla_decode, scale=SCALE, splits=splits, implementation="gpu")
    lowered = jax.jit(call).trace(*shapes(kind, in_pages)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_it_lowers_inside_shard_map():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    heads, rows = P("rows", None, "heads"), P("rows")
    call = functools.partial(mla_decode, scale=SCALE, implementation="gpu")
    with jax.set_mesh(mesh):
        local = jax.shard_map(call, in_specs=(heads, heads, rows, rows), out_specs=(heads, heads))
        lowered = jax.jit(local).trace(*shapes("bfloat16", in_pages=False)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_an_fp8_cache_is_not_copied():
    """Its bytes reach the kernel under three types."""
    call = functools.partial(mla_decode, scale=SCALE, splits=1, implementation="gpu")
    report = aot.chip("h200").compile(call, *shapes("fp8", in_pages=True))
    assert report.compiled and report.temp_bytes is not None and report.temp_bytes < 4 * 512 * 656


def test_splits_fill_the_chip_in_whole_waves():
    assert gpu.choose_splits(row_blocks=256, blocks=64, num_sms=132) == 1
    assert gpu.choose_splits(row_blocks=128, blocks=64, num_sms=132) == 1, "two would take two waves"
    assert gpu.choose_splits(row_blocks=16, blocks=512, num_sms=132) == 8, "nine would take two waves"
    assert gpu.choose_splits(row_blocks=1, blocks=512, num_sms=132) == 128, (
        "of four blocks each; 132 would take as long"
    )
    assert gpu.choose_splits(row_blocks=1, blocks=1, num_sms=132) == 1
    for row_blocks in (1, 3, 40, 70, 200):
        splits = gpu.choose_splits(row_blocks, 1000, 132)
        waves = -(-row_blocks * splits // 132)
        assert row_blocks * splits > 0.8 * 132 * waves, "a fifth of the chip has nothing to do"


def test_what_it_lacks_is_said():
    def call(C=512, R=64, dtype=jnp.bfloat16, cache_dtype=jnp.bfloat16, slots=64, scale: float = SCALE, **kind: bool):
        array = jax.ShapeDtypeStruct
        q = array((1, 1, 2, C), dtype), array((1, 1, 2, R), dtype)
        latent: Any = array((1, slots, C), cache_dtype)
        rope: Any = array((1, slots, R), cache_dtype)
        rows: Any = array((1, slots, C + 4 * (C // 128) + 2 * R), jnp.uint8)
        table: Any = array((1, 4), jnp.int32) if "paged" in kind else None
        cache = Fp8LatentCache(rows, C, table) if "fp8" in kind else LatentCache(latent, rope, table)
        run = functools.partial(mla_decode, scale=scale, implementation="gpu")
        jax.eval_shape(run, *q, cache, array((1,), jnp.int32))

    call()
    call(fp8=True, paged=True)
    cases: list[tuple[Any, str]] = [
        ({"dtype": jnp.float32}, "bfloat16 alone, not bfloat16, float32"),
        ({"cache_dtype": jnp.float32}, "bfloat16 alone, not bfloat16, float32"),
        ({"C": 576}, "latents of 128, 256, 384 or 512 .* have 576 and 64"),
        ({"C": 192}, "have 192 and 64"),
        ({"R": 32}, "have 512 and 32"),
        ({"slots": 100}, "a capacity of a multiple of 64 slots, not 100"),
        ({"slots": 16, "paged": True}, "pages of a multiple of 64 slots, not 16"),
        ({"scale": 0.0}, "positive scale"),
        ({"C": 256, "fp8": True}, "FP8 latents of 512 alone"),
    ]
    for options, said in cases:
        with pytest.raises(Unsupported, match=said):
            call(**options)


def test_what_the_chip_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="stages must be at least 1"):
        gpu.Tile(latent=512, rope=64, stages=0)
    with pytest.raises(ValueError, match="shared memory"):
        gpu.Tile(latent=512, rope=64, stages=3)
    assert [gpu.choose(latent, 64).stages for latent in (128, 256, 384, 512)] == [4, 4, 3, 2]
