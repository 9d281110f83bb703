"""The lightning indexer inside of transforms and meshes, and what it reads and holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Mask
from kernels_pallas.lightning_indexer import (
    SAVED_NAMES,
    dense_kl,
    gathers,
    hadamard,
    recall,
    select_keys,
    selected_kl,
    tiles,
    to_fp8,
)

CAUSAL = Mask(causal=True)
LENGTH = 43  # two chunks of keys, which are whole words of bits


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK", 8)
    monkeypatch.setattr(tiles, "CPU_BLOCK", 8)
    monkeypatch.setattr(tiles, "LEAST_CHUNK", 8)
    monkeypatch.setattr(tiles, "CPU_TILE", 1)
    monkeypatch.setattr(gathers, "CPU_GATHERED", 200)


def draw(*rows):
    """The indexer's q, w and k, the attention's q, k and logsumexps (of nothing in particular), and documents."""
    rng = np.random.default_rng(0)
    widths = ((3, 4), (3,), (4,), (4, 6), (2, 6), (4,))
    arrays = [jnp.asarray(rng.normal(size=(*rows, LENGTH, *width)), jnp.float32) for width in widths]
    return *arrays[:5], arrays[5] + 3, jnp.asarray(np.sort(rng.integers(0, 3, (*rows, LENGTH))), jnp.int32)


def loss(q, w, k, main_q, main_k, lse, ids):
    """A number that depends on every op, and whose gradients pass through both losses."""
    mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
    index = select_keys(q, w, k, mask=mask, topk=4)
    dense = dense_kl(q, w, k, main_q, main_k, lse, scale=0.5, mask=mask)
    selected = selected_kl(q, w, k, main_q, main_k, lse, index, scale=0.5)
    parts = (*dense, *selected, recall(main_q, main_k, lse, index, scale=0.5))
    return sum(jnp.sum(part * weight) for part, weight in zip(parts, (1.0, 0.3, 0.7, 0.2, 0.1), strict=True))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_inside_shard_map(small_tiles):
    """Rows over one axis; the indexer's arguments are the same on the other."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    args = draw(2)

    def sharded_loss(*args):
        run = jax.shard_map(lambda *args: jax.lax.psum(loss(*args), "data"), in_specs=P("data"), out_specs=P())
        return run(*args)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, jax.NamedSharding(mesh, P("data"))) for a in args]
        got = jax.jit(jax.value_and_grad(sharded_loss, argnums=(0, 1, 2)))(*placed)
    assert_close(got, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args))


def test_vmap(small_tiles):
    args = draw(2, 2)
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    alone = [jax.jit(gradient)(*(a[i] for a in args)) for i in range(2)]
    assert_close(jax.jit(jax.vmap(gradient))(*args), jax.tree.map(lambda *a: jnp.stack(a), *alone))


@pytest.mark.parametrize("keep", [True, False])
def test_in_a_scan_of_layers_that_are_recomputed(keep):
    """The name lets a policy keep what selected_kl wants for its gradients; without, the attention's keys are gathered again."""
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if keep else None
    q, w, k, main_q, main_k, lse, _ = draw(1)
    index = select_keys(q, w, k, mask=CAUSAL, topk=4)

    def total(q, layer):
        def body(carry, _):
            return layer(carry), None

        return jnp.sum(jax.lax.scan(body, q, None, length=2)[0])

    def layer(q):
        kl = selected_kl(q, w, k, main_q, main_k, lse, index, scale=0.5).kl_BT
        return q + kl[..., None, None] * 0.1

    def gradient(q):
        return jax.grad(total)(q, jax.checkpoint(layer, policy=policy))

    program = str(jax.make_jaxpr(gradient)(q))
    assert program.count("exp2 ") + program.count("exp ") == (2 if keep else 4)  # two softmaxes, forward only or twice
    assert_close(jax.jit(gradient)(q), jax.jit(jax.grad(lambda q: total(q, layer)))(q))


def test_keys_that_no_query_of_a_block_sees_are_not_read(small_tiles):
    """A NaN that was read, hidden or not, would reach the gradients: 0 times NaN."""
    q, w, k, main_q, main_k, lse, _ = draw(1)
    mask = Mask(causal=True, window=(3, None))
    main_k, k = main_k.at[:, :32].set(jnp.nan), k.at[:, :32].set(jnp.nan)

    def last(q):
        return jnp.sum(dense_kl(q, w, k, main_q, main_k, lse, scale=0.5, mask=mask).kl_BT[:, 40:])

    value, gradient = jax.jit(jax.value_and_grad(last))(q)
    assert np.isfinite(value) and np.isfinite(gradient[:, 40:]).all()


# ---- memory

I, J, N, K, TOPK = 4, 16, 4, 24, 64


def select(q, w, k, main_q, main_k, lse, index):
    return select_keys(q, w, k, mask=CAUSAL, topk=TOPK)


def dense(q, w, k, main_q, main_k, lse, index):
    run = lambda *args: jnp.sum(dense_kl(*args, main_q, main_k, lse, scale=1.0, mask=CAUSAL).kl_BT)  # noqa: E731
    return jax.grad(run, argnums=(0, 1, 2))(q, w, k)


def sparse(q, w, k, main_q, main_k, lse, index):
    run = lambda *args: jnp.sum(selected_kl(*args, main_q, main_k, lse, index, scale=1.0).kl_BT)  # noqa: E731
    return jax.grad(run, argnums=(0, 1, 2))(q, w, k)


@pytest.mark.parametrize("step", [select, dense, sparse])
def test_memory_grows_with_the_length_not_its_square(step):
    def lowered(length):
        shapes = [(1, length, *rest) for rest in ((I, J), (I,), (J,), (N, K), (1, K), (N,))]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(step).lower(*args, jax.ShapeDtypeStruct((1, length, TOPK), jnp.int32))

    def temporary(length):
        return lowered(length).compile().memory_analysis().temp_size_in_bytes

    # A token's arguments, results and what is kept for it are 64 + 4 + 16 + 96 + 24 + 4 + 64 numbers, copied a few times; on CPU
    # the scores of a block, its sortable copy and flags are a few MB whatever the length is.
    assert temporary(32768) - temporary(16384) < 6 * 4 * 272 * 16384
    assert temporary(32768) < 270e6  # one byte for each pair would be 1e9
    program = lowered(4096).as_text()
    assert "4096x4096" not in program and f"4096x{TOPK}x{K}" not in program


# ---- as the published inference code scores


def test_rotation_changes_nothing_beyond_rounding():
    """Products of 64 numbers near 1, of some 8 in size, in float32."""
    q, k = (jax.random.normal(jax.random.key(i), (5, 64)) for i in range(2))
    np.testing.assert_allclose(hadamard(q) @ hadamard(k).T, q @ k.T, atol=1e-5)
    np.testing.assert_allclose(hadamard(hadamard(q)), q, atol=1e-6)
    np.testing.assert_allclose(hadamard(jnp.eye(4)) * 2, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert hadamard(q.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="12; it must be a power of two"):
        hadamard(jnp.ones(12))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_fp8_scores_are_those_of_the_rounded_values(implementation):
    """Scales are powers of two, so that scores of values that FP8 holds exactly are the same bits; zeros and large values too."""
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.integers(-3, 4, (1, 20, 1))
    q, k = rng.integers(-8, 9, (1, 20, 3, 16)) * size[..., None], rng.integers(-8, 9, (1, 20, 16)) * size
    q, w, k = (jnp.asarray(a, jnp.float32) for a in (q, rng.integers(-4, 5, (1, 20, 3)), k))
    want = select_keys(q, w, k, mask=CAUSAL, topk=5, implementation="reference")
    *operands, k_scale_BS = to_fp8(q, w, k)
    assert [a.dtype for a in operands] == [jnp.float8_e4m3fn, jnp.float32, jnp.float8_e4m3fn]
    assert len(np.unique(k_scale_BS)) > 2

    @jax.jit
    def run(q, w, k, k_scale_BS):
        return select_keys(q, w, k, mask=CAUSAL, topk=5, k_scale_BS=k_scale_BS, implementation=implementation)

    np.testing.assert_array_equal(run(*operands, k_scale_BS), want)


def test_fp8_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="heads of 256 numbers"):
        to_fp8(jnp.ones((1, 2, 1, 256)), jnp.ones((1, 2, 1)), jnp.ones((1, 2, 256)))
    q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match=r"k_scale must be \[1, 2\], got \[2\]"):
        select_keys(q, q[..., 0], k, mask=CAUSAL, topk=1, k_scale_BS=jnp.ones(2))
