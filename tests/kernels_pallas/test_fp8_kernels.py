"""The FP8 kernels against the truth of `fp8_cases`, bit for bit: every step is IEEE float32 arithmetic or bits."""

import functools

import fp8_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8_cases import BLOCKS, E4M3, NAMES
from harness import Case, interpreted, ways
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Unsupported, fp8
from kernels_pallas.fp8 import gpu, tpu

QUANTIZE = {"activations": fp8.quantize_activations, "weights": fp8.quantize_weights}
IMPLEMENTATIONS = ways("reference", "xla", "tpu", "gpu")
EVERY_TIME = {
    "partial blocks",
    "leading dims",
    "huge",
    "scales next to powers of two",
    "not finite",
    "a quotient that a reciprocal rounds to another code",  # with scales that are no powers of two
}


def cases(kind):
    """Both kinds of scales for every input; in every run, one of them for the inputs that a kernel could stumble on."""
    for number, name in enumerate(name for name in NAMES if name != "float16"):
        quotient = name.startswith("a quotient")
        for scales, ue8m0 in (("float32", False), ("ue8m0", True)):
            args = functools.partial(lambda name: (fp8_cases.inputs(name),), name)
            case = Case(name=f"{name}, {scales}", args=args, options={"ue8m0": ue8m0})
            now = name in EVERY_TIME and ue8m0 == (not quotient and number % 2 == (kind == "weights"))
            yield pytest.param(kind, case, id=f"{kind}, {case}", marks=[] if now else pytest.mark.slow)


CASES = [*cases("activations"), *cases("weights")]


def quantized(case, kind):
    (x,) = case.args()
    return fp8_cases.quantized(x, BLOCKS[kind], **case.options)


@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("way", IMPLEMENTATIONS, ids=str)
def test_quantize(way, kind, case):
    codes, scale = quantized(case, kind)
    got = way.run(functools.partial(QUANTIZE[kind], **case.options), *case.args())
    # Devices divide by what is no power of two within 2 ulp (`scale.divide`): next to a tie, to the other code.
    same_bits(got, codes, scale, neighbours=way.where == "device" and not case.options["ue8m0"])


def same_bits(got, codes, scale, neighbours=False):
    np.testing.assert_array_equal(got.scale, scale)
    got_codes, nan = np.asarray(got.data).view(np.uint8), codes == 0x7F
    np.testing.assert_allclose(got_codes[~nan].astype(int), codes[~nan].astype(int), rtol=0, atol=int(neighbours))
    np.testing.assert_array_equal(got_codes[nan] & 0x7F, 0x7F)  # a NaN of either sign


@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("way", IMPLEMENTATIONS, ids=str)
def test_dequantize(way, kind, case):
    codes, scale = quantized(case, kind)
    rows, columns = (np.arange(codes.shape[axis]) // BLOCKS[kind][axis] for axis in (-2, -1))
    with np.errstate(over="ignore"):
        values = fp8_cases.values_of(codes) * scale[..., rows[:, None], columns]
    dtype, wanted, stored = jnp.float32, values, scale
    if case.options["ue8m0"]:
        dtype, wanted = jnp.bfloat16, fp8_cases.rounded_to_bfloat16(values)
        stored = scale.astype(ml_dtypes.float8_e8m0fnu)
    array = fp8.Fp8Array(jnp.asarray(codes.view(E4M3)), jnp.asarray(stored), BLOCKS[kind])
    got = way.run(functools.partial(fp8.dequantize, dtype=dtype), array)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got).astype(np.float32), wanted)


@pytest.mark.parametrize("kind", BLOCKS)
def test_several_tiles_of_a_tpu(kind):
    """Edges within the last tile, in both directions."""
    x = np.random.default_rng(0).standard_normal((200, 600)).astype(ml_dtypes.bfloat16)
    codes, scale = fp8_cases.quantized(x, BLOCKS[kind], False)
    with interpreted("tpu"):
        tile = tpu.Tile(rows=64, columns=256)
        data, got_scale = jax.jit(lambda x: tpu.quantize(x, BLOCKS[kind], False, 1e-4, tile))(x)
        values = jax.jit(lambda *x: tpu.dequantize(*x, BLOCKS[kind], jnp.dtype(jnp.float32), tile))(data, got_scale)
        jax.block_until_ready(values)
    same_bits(fp8.Fp8Array(data, got_scale, BLOCKS[kind]), codes, scale)
    np.testing.assert_array_equal(values, fp8.dequantize(fp8.Fp8Array(data, got_scale, BLOCKS[kind]), jnp.float32))


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 200), (2, 0, 4)])
def test_nothing_is_quantized_without_a_kernel(shape, implementation):
    for quantize in [fp8.quantize_activations] + [fp8.quantize_weights] * (len(shape) > 1):
        wanted = quantize(jnp.zeros(shape), implementation="reference")
        got = quantize(jnp.zeros(shape), implementation=implementation)
        assert (got.data.shape, got.scale.shape) == (shape, wanted.scale.shape)
        assert fp8.dequantize(got, implementation=implementation).shape == shape


def test_tpu_kernels_inside_shard_map():
    x = jnp.asarray(fp8_cases.inputs("leading dims"))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    both = lambda x: fp8.dequantize(fp8.quantize_weights(x, implementation="tpu"), implementation="tpu")  # noqa: E731
    with jax.set_mesh(mesh), interpreted("tpu"):
        sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        got = jax.jit(jax.shard_map(both, in_specs=P("data"), out_specs=P("data")))(sharded)
        got = jax.block_until_ready(got)
    np.testing.assert_array_equal(got, fp8.dequantize(fp8.quantize_weights(x)))


def test_tpu_has_no_float16():
    with pytest.raises(Unsupported, match="no float16"):
        fp8.quantize_weights(jnp.ones((4, 4), jnp.float16), implementation="tpu")
    with pytest.raises(Unsupported, match="no float16"):
        fp8.dequantize(fp8.quantize_weights(jnp.ones((4, 4))), jnp.float16, implementation="tpu")


def test_tiles_that_no_chip_can_take_are_refused():
    for rows, columns in ((0, 128), (100, 128), (256, 100), (1024, 1024)):
        with pytest.raises(ValueError, match="Tile"):
            tpu.Tile(rows=rows, columns=columns)
    with pytest.raises(ValueError, match="64 or 128"):
        gpu.Tile(rows=96)
