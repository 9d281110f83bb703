"""Kernels compile for chips that are not here, and what compilers say of them is read right."""

import functools
import os

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import aot
from kernels_pallas.compile_cases import compile_cases
from kernels_pallas.fp8_gemm import gpu as fp8_gemm_gpu
from kernels_pallas.grouped_gemm import gpu as grouped_gemm_gpu

needs_compilers = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


EVERY_TIME = {"v5p", "tpu7x", "h200"}  # of TPUs the newest, which has the least VMEM, and one of the others
EVERY_CASE = [
    pytest.param(
        case,
        chip,
        id=f"{case}, {chip.name}",
        marks=[] if case.every_time and chip.name in EVERY_TIME else pytest.mark.slow,
    )
    for case in compile_cases()
    for chip in case.chips
]


@needs_compilers
@pytest.mark.parametrize(("case", "chip"), EVERY_CASE)
def test_compiles(case, chip):
    report = chip.compile(case.fn, *case.args)
    if report.exception is not None:
        raise AssertionError(f"{case} does not compile for {chip.name}: {report.error}") from report.exception
    if case.implementation == "tpu":
        assert report.vmem_bytes is not None
    if case.implementation == "gpu":
        assert report.registers is not None, "no word of ptxas about a Mosaic GPU kernel"
        assert report.spill_bytes == 0 and report.registers <= case.max_registers, report
        assert 0 < report.shared_memory_bytes <= 227 * 1024
        assert not report.warnings


@needs_compilers
def test_grouped_products_for_gpus_take_any_number_of_rows():
    """TMA takes eight rows at a time."""
    x, y = (jax.ShapeDtypeStruct((1003, width), jnp.bfloat16) for width in (128, 64))
    w, sizes = jax.ShapeDtypeStruct((4, 128, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    weights = functools.partial(grouped_gemm_gpu.backward_weights, dtype=jnp.bfloat16)
    fp8, float32 = jnp.float8_e4m3fn, jnp.float32
    parts = (((1003, 256), fp8), ((1003, 2), float32), ((4, 128, 256), fp8), ((4, 1, 2), float32))
    fp8_args = (*(jax.ShapeDtypeStruct(*part) for part in parts), sizes)
    for product, args in (
        (grouped_gemm_gpu.forward, (x, w, sizes)),
        (grouped_gemm_gpu.backward_rows, (y, w, sizes)),
        (weights, (x, y, sizes)),
        (functools.partial(fp8_gemm_gpu.forward, dtype=jnp.dtype(jnp.bfloat16)), fp8_args),
    ):
        report = aot.chip("h200").compile(product, *args)
        assert report.compiled, report.error


def normalize_rows(columns):
    """A GPU kernel that keeps a tile of 64 x `columns` in registers, columns / 2 of them a thread; and its argument."""

    def normalize_rows_kernel(x_ref, y_ref, x_smem, barrier):
        plgpu.copy_gmem_to_smem(x_ref, x_smem, barrier)
        plgpu.barrier_wait(barrier)
        x = plgpu.layout_cast(x_smem[...], plgpu.Layout.WGMMA)
        x_smem[...] = x / jax.lax.broadcast_in_dim(jnp.max(x, axis=1), x.shape, (0,))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_smem, y_ref)
        plgpu.wait_smem_to_gmem(0)

    def run(x):
        transforms = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
        kernel = plgpu.kernel(
            normalize_rows_kernel,
            out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
            scratch_types=[plgpu.SMEM(x.shape, x.dtype, transforms=transforms), plgpu.Barrier()],
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        )
        return kernel(x)

    return run, jax.ShapeDtypeStruct((64, columns), jnp.float32)


@needs_compilers
def test_registers_spills_and_shared_memory_are_those_of_the_kernel():
    h200 = aot.chip("h200")
    run, x = normalize_rows(128)
    fits = h200.compile(run, x)
    assert fits.compiled, fits.error
    assert 64 <= fits.registers <= 160 and fits.spill_bytes == 0
    assert 64 * 128 * 4 <= fits.shared_memory_bytes < 64 * 128 * 4 + 8192
    assert fits.vmem_bytes is None
    again = h200.compile(lambda x: run(x) + 1, x)  # Mosaic compiles a kernel once: nothing is said this time
    assert (again.registers, again.shared_memory_bytes) == (fits.registers, fits.shared_memory_bytes)
    spills = h200.compile(*normalize_rows(512))
    assert spills.registers == 255 and spills.spill_bytes > 0


def test_words_of_ptxas_are_read():
    said = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ill formed pipeline stage
ptxas info    : Compiling entry function 'a' for 'sm_90a'
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 8 bytes smem
  call void @mosaic_gpu_launch_kernel(ptr %0, i32 %x, i32 1, i32 1, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, i32 4096, ptr %1)
ptxas info    : Used 40 registers
"""
    figures = aot._gpu_kernels('custom-call, kernel_hash = "one\\22two", module = ""', said)
    warning = figures.pop("warnings")[0]
    assert figures == {"registers": 168, "spill_bytes": 16, "shared_memory_bytes": 4104}
    assert warning.startswith("ptxas info    : (C7510) Potential Performance Loss: wgmma")
    assert aot._gpu_kernels("no kernel", said) == {}


@needs_compilers
def test_what_does_not_fit_a_tpu_is_an_error_in_one_line():
    def compile_with_scratch(rows):
        def through_scratch(x_ref, y_ref, scratch):
            at = pl.ds(x_ref[0, 0] * 8, 8)
            scratch[at] = x_ref[...]
            y_ref[...] = scratch[at] + scratch[:8]

        x = jax.ShapeDtypeStruct((8, 128), jnp.int32)
        scratch_shapes = [pltpu.VMEM((rows, 128), x.dtype)]
        return aot.chip("v6e").compile(pl.pallas_call(through_scratch, out_shape=x, scratch_shapes=scratch_shapes), x)

    fits = compile_with_scratch(8192)
    assert fits.compiled, fits.error
    assert 4 << 20 <= fits.vmem_bytes <= 5 << 20
    assert (fits.error, fits.registers, fits.spill_bytes, fits.shared_memory_bytes) == (None, None, None, None)
    large = compile_with_scratch(1 << 18)
    assert not large.compiled and "vmem" in large.error.lower() and "\n" not in large.error


@needs_compilers
def test_a_kernel_of_one_platform_is_refused_by_the_other():
    run, x = normalize_rows(128)
    assert not aot.chip("v5e").compile(run, x).compiled


@needs_compilers
def test_compiling_leaves_the_process_as_it_was(tmp_path, capfd):
    directory = jax.config.jax_compilation_cache_dir
    environment = dict(os.environ)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        for chip in aot.CHIPS.values():
            assert chip.compile(lambda x: jnp.sin(x) * 2, jax.ShapeDtypeStruct((8, 128), jnp.float32)).compiled
        assert not list(tmp_path.iterdir()), "a program that no chip here can load was kept"
    finally:
        jax.config.update("jax_compilation_cache_dir", directory)
    assert {name: os.environ.get(name) for name in environment} == environment
    assert not [name for name in os.environ if name.startswith("MOSAIC_GPU_DUMP")]
    assert capfd.readouterr() == ("", "")
    assert jax.jit(lambda x: x + 1)(1) == 2


def test_an_unknown_chip_is_refused():
    with pytest.raises(ValueError, match=r"no chip 'h100'; there are v5e, v5p, v6e, tpu7x, h200"):
        aot.chip("h100")


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(aot, "_has_module", lambda name: False)
    monkeypatch.setattr(aot, "_ptxas_folder", lambda: None)
    monkeypatch.setattr(aot, "CHIPS", {"v5e": aot.Chip(name="v5e", topology="v5e:2x2")})
    assert aot.unavailable() == (
        "libtpu, jax-cuda13-plugin, nvidia-cuda-nvcc not installed: pip install 'mdl[aot]' on Linux, x86-64"
    )
