"""Bits, not tolerances: every implementation that runs here against the truth of `fp8_cases`."""

import functools
import pathlib
import tracemalloc

import fp8_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8_cases import BLOCKS, E4M3, NAMES
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Unsupported, fp8
from kernels_pallas.fp8 import host, xla
from mdl.hf.safetensors import open_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "deepseek_v3_fp8"
QUANTIZE = {"activations": fp8.quantize_activations, "weights": fp8.quantize_weights}


DEQUANTIZE = jax.jit(fp8.dequantize, static_argnames=("dtype", "implementation"))


def codes_of(array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def array_of(codes: np.ndarray) -> jax.Array:
    return jnp.asarray(codes.astype(np.uint8).view(E4M3))


def same(got, wanted):
    """Equal bit for bit, any NaN for a NaN."""
    assert got.shape == wanted.shape
    got, wanted = np.asarray(got).astype(np.float32), np.asarray(wanted).astype(np.float32)
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], wanted.view(np.uint32)[~nan])


def casts(x, kind, ue8m0):
    """The form for devices that cast in hardware; the api takes the other one on CPU."""
    return xla.quantize_with_casts(x, block=BLOCKS[kind], ue8m0=ue8m0, amax_floor=1e-4)


def by_api(implementation, x, kind, ue8m0):
    result = QUANTIZE[kind](x, ue8m0=ue8m0, implementation=implementation)
    assert result.block == BLOCKS[kind]
    return result.data, result.scale


FORMS = {
    "reference": functools.partial(by_api, "reference"),
    "xla": functools.partial(by_api, "xla"),
    "xla with casts": casts,
}


@pytest.mark.parametrize("ue8m0", [False, True], ids=["float32", "ue8m0"])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_quantize(name, kind, ue8m0):
    x = fp8_cases.inputs(name)
    codes, scale = fp8_cases.quantized(x, BLOCKS[kind], ue8m0)
    for form, quantize in FORMS.items():
        data, got_scale = jax.jit(functools.partial(quantize, kind=kind, ue8m0=ue8m0))(jnp.asarray(x))
        assert data.dtype == jnp.float8_e4m3fn and got_scale.dtype == jnp.float32
        np.testing.assert_array_equal(codes_of(data), codes, form)
        np.testing.assert_array_equal(got_scale, scale, form)


def test_the_reciprocal_case_can_fail():
    x = fp8_cases.inputs("a quotient that a reciprocal rounds to another code")
    codes, scale = fp8_cases.quantized(x, (1, 128), False)
    assert np.any(fp8_cases.nearest_codes(x * (np.float32(1) / scale)) != codes)


def every_value_to_round() -> np.ndarray:
    """Rows of 448 (so that the scale is 1), then every finite bfloat16 and every float32 beside a value or a tie of e4m3."""
    bfloat16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    middles = (fp8_cases.VALUES[1:] + fp8_cases.VALUES[:-1]) / 2
    beside = np.concatenate([fp8_cases.VALUES, middles]).astype(np.float32)
    beside = np.concatenate([beside, np.nextafter(beside, np.float32(0)), np.nextafter(beside, np.float32(500))])
    random = np.random.default_rng(0).integers(0, 0x43E00000, 100_000, np.uint32).view(np.float32)  # 0 … 448
    values = np.concatenate([bfloat16, beside, -beside, random])
    values = values[np.abs(values) <= 448]
    rows = -(-len(values) // 127)
    return np.concatenate([np.full((rows, 1), 448, np.float32), np.resize(values, (rows, 127))], axis=1)


def test_every_rounding():
    x = every_value_to_round()
    codes = fp8_cases.nearest_codes(x)
    for form, quantize in FORMS.items():
        data, scale = jax.jit(functools.partial(quantize, kind="activations", ue8m0=False))(jnp.asarray(x))
        np.testing.assert_array_equal(scale, 1)
        np.testing.assert_array_equal(codes_of(data), codes, form)
    data, scale = host.quantize(x)
    np.testing.assert_array_equal(scale, 1)
    np.testing.assert_array_equal(codes_of(data), codes)


@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_every_code(dtype, scale_dtype):
    """Every code with scales that keep float32 results normal: below, devices may flush to zero."""
    scales = np.array([1, 1e-5, 3.3, 0.0123, 2**-20, 447.9, 7e-30, 1e25, 1 / 3, 1.9999999], np.float32)
    if scale_dtype != np.float32:
        scales = np.exp2(np.array([0, 1, -1, -7, -100, 100, 60, -60, 8, -17], np.float32))
    codes = np.tile(np.arange(256), (len(scales), 1))
    array = fp8.Fp8Array(array_of(codes), jnp.asarray(np.stack([scales] * 2, 1).astype(scale_dtype)), (1, 128))
    with np.errstate(over="ignore"):
        wanted = fp8_cases.values_of(codes) * scales[:, None]
        exact = fp8_cases.values_of(codes).astype(np.float64) * scales[:, None]
        if dtype == jnp.bfloat16:
            wanted = fp8_cases.rounded_to_bfloat16(wanted)
            if scale_dtype != np.float32:
                np.testing.assert_array_equal(wanted, exact)  # powers of two: nothing is rounded
        if dtype == jnp.float16:
            wanted = wanted.astype(np.float16)
    for implementation in ("reference", "xla"):
        got = DEQUANTIZE(array, dtype=dtype, implementation=implementation)
        assert got.dtype == dtype
        same(got, wanted)
    for row, scale in enumerate(scales):  # each row as a weight of its own
        same(host.dequantize(codes_of(array.data)[row : row + 1].view(E4M3), np.full((1, 2), scale, scale_dtype), dtype),
             wanted[row : row + 1])  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("shape", [(256, 256), (130, 300), (3, 5), (2, 3, 140, 130)])
def test_dequantize_takes_the_scale_of_the_block(shape, kind):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, shape)
    block = BLOCKS[kind]
    scale = rng.uniform(0.5, 2, (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))).astype(np.float32)
    wanted = fp8_cases.values_of(codes)
    for index in np.ndindex(scale.shape):
        *batch, i, j = index
        wanted[(*batch, slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))] *= scale[
            index
        ]
    for implementation in ("reference", "xla"):
        array = fp8.Fp8Array(array_of(codes), jnp.asarray(scale), block)
        same(DEQUANTIZE(array, dtype=jnp.float32, implementation=implementation), wanted)


def test_values_with_integers():
    """What CPU makes of codes, against the cast that it replaces, signs of zeros too."""
    codes = np.arange(256)
    same(jax.jit(xla.values_with_integers)(array_of(codes)), fp8_cases.values_of(codes))


def test_dequantize_the_golden_checkpoint():
    """Through the op and through its NumPy twin; hidden sizes 160, 264, 136 and 144 have partial blocks."""
    stored, truth = open_tensors(GOLDEN), open_tensors(GOLDEN / "dequantized_bf16")
    names = [name for name in stored if f"{name}_scale_inv" in stored]
    assert len(names) == 28
    for name in names:
        data, scale, wanted = stored[name], stored[f"{name}_scale_inv"], truth[name].view(np.uint16)
        array = fp8.Fp8Array(jnp.asarray(data), jnp.asarray(scale), (128, 128))
        np.testing.assert_array_equal(np.asarray(DEQUANTIZE(array)).view(np.uint16), wanted, name)
        np.testing.assert_array_equal(host.dequantize(data, scale).view(np.uint16), wanted, name)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["partial blocks", "many magnitudes", "a block of zeros", "below the floor"])
def test_again_gives_the_same(name, dtype, kind):
    """Quantizing what was dequantized gives the same codes, and with scales that are powers of two the same values."""
    quantize = jax.jit(QUANTIZE[kind], static_argnames="ue8m0")
    first = quantize(jnp.asarray(fp8_cases.inputs(name)))
    again = quantize(DEQUANTIZE(first, dtype=dtype))
    np.testing.assert_array_equal(codes_of(again.data), codes_of(first.data))
    # The largest of a block, 448 * scale, was rounded to `dtype`; then divided by 448 again, in float32.
    np.testing.assert_allclose(again.scale, first.scale, rtol=2**-8 if dtype == jnp.bfloat16 else 2**-22)

    first = quantize(jnp.asarray(fp8_cases.inputs(name)), ue8m0=True)
    values = DEQUANTIZE(first, dtype=dtype)
    same(DEQUANTIZE(quantize(values, ue8m0=True), dtype=dtype), values)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_floor_of_amax(implementation):
    x = jnp.full((1, 4), 1e-3)
    for floor, amax in ((1e-4, 1e-3), (1e-2, 1e-2), (1e-30, 1e-3)):
        scale = fp8.quantize_weights(x, amax_floor=floor, implementation=implementation).scale
        np.testing.assert_array_equal(scale, np.float32(amax) * np.float32(1 / 448))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 200), (2, 0, 4), (0, 3, 130)])
def test_empty(shape, implementation):
    x = fp8.quantize_activations(jnp.zeros(shape), implementation=implementation)
    assert x.data.shape == shape and x.scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    assert fp8.dequantize(x, implementation=implementation).shape == shape
    if len(shape) > 1:
        w = fp8.quantize_weights(jnp.zeros(shape), implementation=implementation)
        assert w.scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
        assert fp8.dequantize(w, implementation=implementation).shape == shape


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_vector_is_a_row(implementation):
    x = jnp.asarray(fp8_cases.inputs("partial blocks"))
    quantize = jax.jit(functools.partial(fp8.quantize_activations, implementation=implementation))
    row, rows = quantize(x[0]), quantize(x)
    assert row.scale.shape == (3,)
    np.testing.assert_array_equal(codes_of(row.data), codes_of(rows.data)[0])
    same(DEQUANTIZE(row, implementation=implementation), DEQUANTIZE(rows)[0])


@pytest.mark.parametrize("kind", BLOCKS)
def test_eager_vmap_and_scan_give_the_same(kind):
    x = jnp.asarray(fp8_cases.inputs("leading dims"))
    wanted = jax.jit(QUANTIZE[kind])(x)
    values = fp8.dequantize(wanted)
    for quantize in (QUANTIZE[kind], jax.jit(jax.vmap(jax.vmap(QUANTIZE[kind])))):
        got = quantize(x)
        np.testing.assert_array_equal(codes_of(got.data), codes_of(wanted.data))
        np.testing.assert_array_equal(got.scale, wanted.scale)
    same(jax.jit(jax.vmap(fp8.dequantize))(wanted), values)
    same(jax.lax.scan(lambda carry, part: (carry, fp8.dequantize(part)), 0, wanted)[1], values)


def test_a_cast_inside_one_program_is_not_optimized_away():
    x = jnp.asarray(fp8_cases.inputs("partial blocks"))
    both = lambda x: fp8.dequantize(fp8.quantize_activations(x), jnp.float32)  # noqa: E731
    same(jax.jit(both)(x), both(x))
    casts_both = lambda x: fp8.dequantize(fp8.Fp8Array(*casts(x, "activations", False), (1, 128)), jnp.float32)  # noqa: E731
    same(jax.jit(casts_both)(x), both(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_inside_shard_map(kind):
    x = jnp.asarray(fp8_cases.inputs("leading dims"))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    both = lambda x: fp8.dequantize(QUANTIZE[kind](x))  # noqa: E731
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        got = jax.jit(jax.shard_map(both, in_specs=P("data"), out_specs=P("data")))(sharded)
    same(got, both(x))


def test_gradients_are_refused():
    x = jnp.ones((4, 130))
    q = fp8.quantize_weights(x)

    def through(op):
        return lambda x: fp8.dequantize(op(x), jnp.float32).sum()

    for op in QUANTIZE.values():
        with pytest.raises(TypeError, match=r"not differentiable; jax\.lax\.stop_gradient"):
            jax.jit(jax.grad(through(op)))(x)
        np.testing.assert_array_equal(jax.grad(lambda x, op=op: through(op)(jax.lax.stop_gradient(x)) + x.sum())(x), 1)
    with pytest.raises(TypeError, match=r"fp8\.dequantize is not differentiable"):
        jax.grad(lambda scale: fp8.dequantize(fp8.Fp8Array(q.data, scale, q.block), jnp.float32).sum())(q.scale)


def test_refuses_what_has_no_meaning():
    x = jnp.ones((4, 130))
    q = fp8.quantize_weights(x)
    with pytest.raises(ValueError, match="needs float32, bfloat16 or float16, got int32"):
        fp8.quantize_weights(jnp.ones((4, 4), int))
    with pytest.raises(ValueError, match="1 dims has no blocks"):
        fp8.quantize_weights(x[0])
    for floor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="amax_floor"):
            fp8.quantize_activations(x, amax_floor=floor)
    with pytest.raises(Unsupported, match="no implementation 'triton'"):
        fp8.dequantize(q, implementation="triton")  # pyright: ignore
    with pytest.raises(ValueError, match=r"needs scales \(1, 2\), got \(2, 1\)"):
        fp8.dequantize(fp8.Fp8Array(q.data, q.scale.T, q.block))
    with pytest.raises(ValueError, match="float8_e4m3fn data"):
        fp8.dequantize(fp8.Fp8Array(q.data.astype(jnp.float8_e5m2), q.scale, q.block))


@pytest.mark.parametrize("ue8m0", [False, True], ids=["float32", "ue8m0"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "leading dims"])
def test_host_quantize(name, ue8m0):
    x = fp8_cases.inputs(name)
    codes, scale = fp8_cases.quantized(x, (128, 128), ue8m0)
    data, got_scale = host.quantize(x, ue8m0=ue8m0)
    assert data.dtype == E4M3
    np.testing.assert_array_equal(codes_of(data), codes)
    np.testing.assert_array_equal(got_scale, scale)


def test_host_dequantizes_parts():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (300, 2300), np.uint8).view(E4M3)
    scale = rng.uniform(1e-5, 1, (3, 18)).astype(np.float32)
    array = fp8.Fp8Array(jnp.asarray(data), jnp.asarray(scale), (128, 128))
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        whole = np.asarray(fp8.dequantize(array, dtype))
        for rows in (slice(None), slice(0, 128), slice(100, 290), slice(299, 300), slice(-5, None), slice(7, 7)):
            for cols in (slice(None), slice(5, 1000), slice(128, 256), slice(2299, 2300), slice(9, 4)):
                got = host.dequantize(data, scale, dtype, rows=rows, cols=cols)
                assert got.dtype == dtype
                same(got, whole[rows, cols])


def test_host_reads_read_only_maps_and_strided_views(tmp_path):
    w = fp8_cases.inputs("partial blocks")
    data, scale = host.quantize(w)
    data.tofile(tmp_path / "data")
    mapped = np.memmap(tmp_path / "data", np.uint8, mode="r").view(np.ndarray).view(E4M3).reshape(w.shape)
    same(host.dequantize(mapped, scale), host.dequantize(data, scale))
    np.testing.assert_array_equal(codes_of(host.quantize(np.asfortranarray(w))[0]), codes_of(data))
    w.flags.writeable = False
    np.testing.assert_array_equal(codes_of(host.quantize(w)[0]), codes_of(data))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_host_empty(shape):
    data, scale = host.quantize(np.zeros(shape, np.float32))
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    assert host.dequantize(data, scale).shape == shape


def test_host_holds_no_second_copy():
    w = np.ones((4096, 2048), ml_dtypes.bfloat16)
    megabyte = 1 << 20
    tracemalloc.start()
    try:
        data, scale = host.quantize(w)
        assert tracemalloc.get_traced_memory()[1] < data.nbytes + 4 * megabyte  # in float32 the weight has 32
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        host.dequantize(data, scale)
        assert tracemalloc.get_traced_memory()[1] - before < w.nbytes + 4 * megabyte
    finally:
        tracemalloc.stop()


def test_host_refuses_what_has_no_meaning():
    data, scale = host.quantize(np.ones((130, 130), np.float32))
    with pytest.raises(ValueError, match=r"needs scales \(2, 2\), got \(1, 2\)"):
        host.dequantize(data, scale[:1])
    with pytest.raises(ValueError, match="float8_e4m3fn matrix"):
        host.dequantize(data.view(np.uint8), scale)
    with pytest.raises(ValueError, match="without a step"):
        host.dequantize(data, scale, rows=slice(0, 100, 2))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 matrix"):
        host.quantize(np.ones((4, 4)))
    with pytest.raises(ValueError, match="amax_floor"):
        host.quantize(np.ones((4, 4), np.float32), amax_floor=0.0)
