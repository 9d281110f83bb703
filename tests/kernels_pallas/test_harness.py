"""The harness itself: what it promises to catch, it catches."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Way, interpreted, ways
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

X = np.arange(1024, dtype=np.float32).reshape(8, 128)


def copy_on_tpu(x, *, wait_first, implementation):
    def copy(x_hbm, y_ref, buffer, semaphore):
        coming = pltpu.make_async_copy(x_hbm, buffer, semaphore)
        coming.start()
        if wait_first:
            coming.wait()
        y_ref[...] = buffer[...]
        if not wait_first:
            coming.wait()

    return pl.pallas_call(
        copy,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


def copy_on_gpu(x, *, wait_first, implementation):
    def copy(x_gmem, y_gmem, x_smem, y_smem, barrier):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
        if wait_first:
            plgpu.barrier_wait(barrier)
        y_smem[...] = x_smem[...]
        if not wait_first:
            plgpu.barrier_wait(barrier)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem, y_gmem)
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        copy,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
    )
    return kernel(x)


@pytest.mark.parametrize(("implementation", "copy"), [("tpu", copy_on_tpu), ("gpu", copy_on_gpu)])
def test_a_race_fails_and_the_next_kernel_runs(implementation, copy):
    way = Way(implementation=implementation, where="interpreted")
    with pytest.raises((AssertionError, RuntimeError), match="RACE DETECTED"):
        way.run(functools.partial(copy, wait_first=False), X)
    np.testing.assert_array_equal(way.run(functools.partial(copy, wait_first=True), X), X)


def test_memory_starts_as_nan():
    def half(x_ref, y_ref):
        y_ref[:4] = x_ref[:4]

    with interpreted("tpu"):
        y = jax.jit(pl.pallas_call(half, out_shape=jax.ShapeDtypeStruct(X.shape, X.dtype)))(X)
        np.testing.assert_array_equal(np.isnan(y), np.arange(8)[:, None] * np.ones(128) >= 4)


def test_a_way_gives_its_implementation_and_says_where_it_ran():
    seen = []
    plain = [way for way in ways("xla", "tpu") if isinstance(way, Way)]
    assert [str(way) for way in plain] == ["xla cpu", "tpu interpreted"]
    for way in plain:
        way.run(lambda x, implementation: seen.append(implementation) or jnp.sin(x), X)
    assert seen == ["xla", "tpu"]


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_without_its_device_a_way_is_skipped_with_a_reason(implementation):
    here = jax.default_backend()
    if here != "cpu":
        pytest.skip(f"there is a device: {here}")
    with pytest.raises(pytest.skip.Exception, match=f"no device for '{implementation}': this is cpu"):
        Way(implementation=implementation, where="device").run(lambda x, implementation: x, X)
