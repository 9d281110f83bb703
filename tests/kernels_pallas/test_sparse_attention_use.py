"""Attention over selected keys inside of transforms and meshes, what it reads and holds, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import LatentCache, Mask, Unsupported, flash_attention, mla_decode, sparse_attention
from kernels_pallas.flash_attention.api import SAVED_NAMES
from kernels_pallas.sparse_attention import xla


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(xla, "CPU_GATHERED", 100)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def choose(batch, queries, keys, slots, seed=0):
    """Ascending indices, some of them absent."""
    drawn = np.random.default_rng(seed).permuted(np.tile(np.arange(keys + slots), (batch, queries, 1)), axis=2)
    return jnp.asarray(np.minimum(np.sort(drawn[..., :slots], axis=2), keys), jnp.int32)


def test_all_visible_keys_selected_is_causal_attention():
    """Values and gradients; each query names the keys up to its own."""
    q, k, v = draw(2, 12, 4, 6), draw(2, 12, 2, 6, seed=1), draw(2, 12, 2, 3, seed=2)
    t = jnp.arange(12)
    index = jnp.broadcast_to(jnp.where(t[None] <= t[:, None], t[None], 12), (2, 12, 12))

    def outcome(op):
        results, vjp = jax.vjp(op, q, k, v)
        return results, vjp(jax.tree.map(jnp.cos, results))

    got = outcome(lambda q, k, v: sparse_attention(q, k, v, index, scale=0.4, return_lse=True))
    want = outcome(lambda q, k, v: flash_attention(q, k, v, scale=0.4, mask=Mask(causal=True), return_lse=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_all_keys_of_a_cache_selected_is_decoding():
    """The last of T new tokens over a row's filled slots, what mla_decode computes; behind them is NaN."""
    lengths = jnp.array([9, 16, 4], jnp.int32)
    cache = draw(3, 16, 12)
    cache = jnp.where(jnp.arange(16)[:, None] < lengths[:, None, None], cache, jnp.nan)
    q, slots = draw(3, 2, 4, 12, seed=1), jnp.arange(16)
    index = jnp.where(slots < (lengths[:, None] - 1 + jnp.arange(2))[..., None], slots, 16)
    latents = LatentCache(cache[..., :8], cache[..., 8:])
    want = mla_decode(q[..., :8], q[..., 8:], latents, lengths, scale=0.3)
    got = sparse_attention(q, cache[:, :, None], None, index, scale=0.3, value_width=8, return_lse=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("latents", [True, False])
def test_nan_in_keys_that_nobody_names_stays_there(latents, implementation, small_chunks):
    index = choose(1, 9, 20, 5)
    index = index.at[0, 3].set(20)  # no keys
    index = jnp.where(index == 7, 8, index)  # key 7 by nobody
    k = draw(1, 20, 1, 6).at[:, 7].set(jnp.nan)
    v = None if latents else k

    def op(q, k, v):
        width = 4 if latents else None
        return sparse_attention(q, k, v, index, scale=1.0, value_width=width, implementation=implementation)

    out, vjp = jax.vjp(op, draw(1, 9, 2, 6), k, v)
    for a in (out, *jax.tree.leaves(vjp(out))):
        assert np.isfinite(a).all()
    assert (out[:, 3] == 0).all()


def test_a_query_without_keys_passes_nothing_on(small_chunks):
    """Whatever it holds itself, and whatever comes back to it; its own logsumexp is -inf."""
    index = choose(1, 9, 20, 5).at[0, 3].set(20)
    q, k = draw(1, 9, 2, 6).at[:, 3].set(jnp.nan), draw(1, 20, 1, 6)
    op = lambda q, k: sparse_attention(q, k, None, index, scale=1.0, value_width=6, return_lse=True)  # noqa: E731
    (out, lse), vjp = jax.vjp(op, q, k)
    dq, dk = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    assert (out[:, 3] == 0).all() and (lse[:, 3] == -jnp.inf).all() and (dq[:, 3] == 0).all()
    assert np.isfinite(dk).all()


def test_large_logits_do_not_overflow():
    k = jnp.full((1, 4, 1, 2), 200.0)
    out = sparse_attention(k, k, jnp.ones((1, 4, 1, 3)), jnp.zeros((1, 4, 2), jnp.int32), scale=1.0)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_the_same_bits_each_time():
    q, k, index = draw(1, 512, 4, 24), draw(1, 512, 1, 24, seed=1), choose(1, 512, 512, 64)
    step = jax.jit(
        jax.grad(lambda q, k: (sparse_attention(q, k, None, index, scale=1.0, value_width=16) ** 2).sum(), (0, 1))
    )
    first, second = step(q, k), step(q, k)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# ---- what is held


def test_memory_grows_with_the_length_not_its_square():
    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)
        k = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32)
        index = jax.ShapeDtypeStruct((1, length, 64), jnp.int32)

        def loss(q, k, index):
            return sparse_attention(q, k, None, index, scale=1.0, value_width=24).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return step.lower(q, k, index).compile().memory_analysis().temp_size_in_bytes

    # The growth is that of copies of the arguments; what is gathered at a time stays. All of it would be 64 x 32 floats a token.
    assert temporary(32768) - temporary(16384) < 10 * 4 * (4 * 32 + 32 + 64) * 16384
    assert temporary(16384) < 10 * 4 * (4 * 32 + 32 + 64) * 16384 + 16 * xla.CPU_GATHERED


def test_neither_scores_nor_gathered_keys_of_all_queries_are_traced():
    q = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)
    index = jax.ShapeDtypeStruct((1, 4096, 64), jnp.int32)

    def loss(q, index):
        return sparse_attention(q, q, q, index, scale=1.0).sum()

    program = jax.jit(jax.grad(loss)).lower(q, index).as_text()
    assert "4096x4096" not in program and "4096x64x64" not in program


# ---- transforms and meshes


def test_inside_shard_map(small_chunks):
    """Rows over one axis, heads over the other; one key head, alike on all devices of a row, and so are the indices."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    q, k, index = draw(2, 21, 4, 6), draw(2, 21, 1, 6, seed=1), choose(2, 21, 21, 5)

    def loss(q, k, index):
        return jnp.sum(sparse_attention(q, k, None, index, scale=1.0, value_width=4) ** 2)

    def sharded_loss(*args):
        run = jax.shard_map(
            lambda *args: jax.lax.psum(loss(*args), ("data", "tensor")),
            in_specs=(P("data", None, "tensor"), P("data"), P("data")),
            out_specs=P(),
        )
        return run(*args)

    with jax.set_mesh(mesh):
        specs = (P("data", None, "tensor"), P("data"), P("data"))
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip((q, k, index), specs, strict=True)
        ]
        got = jax.jit(jax.grad(sharded_loss, argnums=(0, 1)))(*placed)
    want = jax.grad(loss, argnums=(0, 1))(q, k, index)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_vmap(small_chunks):
    q, index = draw(3, 2, 11, 2, 4), choose(6, 11, 11, 4).reshape(3, 2, 11, 4)

    def gradient(q, index):
        return jax.grad(lambda q: jnp.sum(sparse_attention(q, q, q, index, scale=1.0) ** 2))(q)

    want = jnp.stack([jax.jit(gradient)(*each) for each in zip(q, index, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(q, index), want, atol=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_remat_in_a_scan(keep, small_chunks):
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if keep else None
    index = choose(1, 16, 16, 4)

    def layer(x, _):
        q = jnp.sin(x)
        return sparse_attention(q, q, q, index, scale=1.0), None

    def loss(x, layer):
        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0])

    x = draw(1, 16, 2, 4)
    got = jax.jit(jax.grad(lambda x: loss(x, jax.checkpoint(layer, policy=policy))))(x)
    np.testing.assert_allclose(got, jax.jit(jax.grad(lambda x: loss(x, layer)))(x), atol=1e-6)


# ---- what does not fit

Q, K = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 5, 2, 2))
INDEX = jnp.zeros((1, 4, 3), jnp.int32)
REFUSED = {
    "ranks": (lambda: sparse_attention(Q[0], K, K, INDEX, scale=1.0), "wrong ranks"),
    "widths": (lambda: sparse_attention(Q, K[..., :1], K, INDEX, scale=1.0), "do not fit"),
    "values of other keys": (lambda: sparse_attention(Q, K, K[:, 1:], INDEX, scale=1.0), "do not fit"),
    "no keys": (lambda: sparse_attention(Q, K[:, :0], K[:, :0], INDEX, scale=1.0), "empty dim"),
    "head counts": (lambda: sparse_attention(Q, K, K, INDEX, scale=1.0), "3 query heads are not a multiple of 2"),
    "dtypes": (lambda: sparse_attention(Q, Q.astype(jnp.bfloat16), Q, INDEX, scale=1.0), "one floating dtype"),
    "neither values nor their width": (lambda: sparse_attention(Q, Q, None, INDEX, scale=1.0), "one of the two"),
    "values and their width": (lambda: sparse_attention(Q, Q, Q, INDEX, scale=1.0, value_width=2), "one of the two"),
    "width of values": (
        lambda: sparse_attention(Q, Q, None, INDEX, scale=1.0, value_width=3),
        r"value_width=3 must be in 1\.\.2",
    ),
    "indices of other queries": (
        lambda: sparse_attention(Q, Q, Q, INDEX[:, 1:], scale=1.0),
        r"int32 \[1, 4, W\], got int32 \[1, 3, 3\]",
    ),
    "indices of heads": (lambda: sparse_attention(Q, Q, Q, INDEX[..., None], scale=1.0), r"got int32 \[1, 4, 3, 1\]"),
    "a mask": (lambda: sparse_attention(Q, Q, Q, INDEX > 0, scale=1.0), "got bool"),
    "no slots": (lambda: sparse_attention(Q, Q, Q, INDEX[..., :0], scale=1.0), "no slots"),
    "scale": (lambda: sparse_attention(Q, Q, Q, INDEX, scale=float("nan")), "scale=nan"),
    "implementation": (lambda: sparse_attention(Q, Q, Q, INDEX, scale=1.0, implementation="cuda"), "it has xla"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_does_not_fit(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert isinstance(caught.value, Unsupported) == (name == "implementation")
