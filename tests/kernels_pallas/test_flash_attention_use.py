"""Flash attention inside of transforms and meshes, what it reads and holds, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import Mask, Unsupported, flash_attention
from kernels_pallas.flash_attention import xla
from kernels_pallas.flash_attention.api import SAVED_NAMES

CAUSAL = Mask(causal=True)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "CHUNKS", (8, 8))
    monkeypatch.setattr(xla, "WHOLE", 0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_large_logits_do_not_overflow():
    q = jnp.full((1, 4, 1, 2), 200.0)
    out = flash_attention(q, q, jnp.ones((1, 4, 1, 3)), scale=1.0, mask=CAUSAL)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_a_window_counts_as_jax_counts():
    """Both ends included, on either side."""
    q = draw(1, 12, 2, 4)
    out = flash_attention(q, q, q, scale=1.0, mask=Mask(window=(3, 2)))
    np.testing.assert_allclose(
        out, jax.nn.dot_product_attention(q, q, q, scale=1.0, local_window_size=(3, 2)), atol=1e-6
    )


def test_parts_of_the_keys_join_by_their_lse():
    """Values and gradients over two parts of the keys are those of the whole; some queries see nothing of the second."""
    q, kv = draw(2, 9, 4, 6), draw(2, 20, 2, 6, seed=1)

    def whole(q, kv):
        return flash_attention(q, kv, kv, scale=0.5, mask=Mask(causal=True, q_offset=11))

    def joined(q, kv):
        parts = [
            flash_attention(q, part, part, scale=0.5, mask=Mask(causal=True, q_offset=11 - start), return_lse=True)
            for start, part in ((0, kv[:, :13]), (13, kv[:, 13:]))
        ]
        lse_BTN = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(out * jnp.exp(lse - lse_BTN)[..., None] for out, lse in parts)

    def with_gradients(f):
        return jax.jit(lambda q, kv: (f(q, kv), jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1))(q, kv)))(q, kv)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), with_gradients(joined), with_gradients(whole)
    )


# ---- what is read, and what is held


@pytest.mark.parametrize("name", ["window", "window by positions", "packed documents"])
def test_keys_out_of_range_are_not_read(name, small_tiles):
    """A NaN that was read, masked or not, would reach the output: 0 times NaN."""
    index = jnp.arange(64, dtype=jnp.int32)[None]
    mask = {
        "window": Mask(causal=True, window=(7, None)),
        "window by positions": Mask(causal=True, window=(7, None), q_positions_BT=index, kv_positions_BS=index),
        "packed documents": Mask(causal=True, q_segment_ids_BT=index // 32 + 1, kv_segment_ids_BS=index // 32 + 1),
    }[name]
    q = draw(1, 64, 2, 4)
    v = q.at[:, :32].set(jnp.nan)
    first = 40 if "window" in name else 32  # of the queries that see no NaN
    out, vjp = jax.vjp(lambda q, k: flash_attention(q, k, v, scale=1.0, mask=mask), q, q)
    assert np.isfinite(out[:, first:]).all() and np.isnan(out[:, :32]).all()
    dq, _ = vjp(jnp.ones_like(out).at[:, :first].set(0))
    assert np.isfinite(dq[:, first:]).all()


@pytest.mark.parametrize("mask", [CAUSAL, Mask()], ids=["causal", "all"])
def test_memory_grows_with_the_length_not_its_square(mask):
    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        step = jax.jit(jax.grad(lambda q: flash_attention(q, q, q, scale=1.0, mask=mask).sum()))
        return step.lower(q).compile().memory_analysis().temp_size_in_bytes

    # The growth is that of the arguments' copies, a few times 2 x 16 floats a token; the tiles, 2 x 256 x 1024 floats, stay.
    assert temporary(32768) - temporary(16384) < 16 * (2 * 16 * 4) * 16384
    assert temporary(16384) < 64e6  # one head's scores would take 1e9


def test_no_long_row_of_scores_is_traced():
    q = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)
    program = jax.jit(jax.grad(lambda q: flash_attention(q, q, q, scale=1.0, mask=CAUSAL).sum())).lower(q).as_text()
    assert "1024x1024" not in program


# ---- transforms and meshes


def test_inside_shard_map(small_tiles):
    """Rows over one axis and heads over the other; sinks vary over heads only, the mask over rows only."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    q, k, sinks = draw(2, 41, 4, 4), draw(2, 41, 2, 4, seed=1), draw(4)
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 41))), jnp.int32)

    def loss(q, k, sinks, ids):
        mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
        return jnp.sum(flash_attention(q, k, k, scale=1.0, mask=mask, sinks=sinks) ** 2)

    def sharded_loss(*args):
        run = jax.shard_map(
            lambda *args: jax.lax.psum(loss(*args), ("data", "tensor")),
            in_specs=(P("data", None, "tensor"), P("data", None, "tensor"), P("tensor"), P("data")),
            out_specs=P(),
        )
        return run(*args)

    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in (
                (q, P("data", None, "tensor")),
                (k, P("data", None, "tensor")),
                (sinks, P("tensor")),
                (ids, P("data")),
            )
        ]
        got = jax.jit(jax.grad(sharded_loss, argnums=(0, 1, 2)))(*placed)
    want = jax.grad(loss, argnums=(0, 1, 2))(q, k, sinks, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_vmap(small_tiles):
    q, ids = draw(3, 2, 20, 2, 4), jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (3, 2, 20))), jnp.int32)

    def gradient(q, ids):
        mask = Mask(causal=True, q_segment_ids_BT=ids, kv_segment_ids_BS=ids)
        return jax.grad(lambda q: jnp.sum(flash_attention(q, q, q, scale=1.0, mask=mask) ** 2))(q)

    want = jnp.stack([jax.jit(gradient)(*each) for each in zip(q, ids, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(q, ids), want, atol=1e-5)


def count(primitive, jaxpr):
    """Uses of a primitive in a program and those inside of it."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == primitive
        found += sum(count(primitive, inner) for inner in jaxprs_in_params(equation.params))
    return found


@pytest.mark.parametrize("keep", [True, False])
def test_a_remat_policy_can_keep_the_results(keep):
    """Products in the traced gradient: two forward, five backward, and the two forward again if nothing was kept."""
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if keep else None

    def layer(x, _):
        q = jnp.sin(x)
        return flash_attention(q, q, q, scale=1.0, mask=CAUSAL), None

    def loss(x, layer):
        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0])

    def gradient(x):
        return jax.grad(loss)(x, jax.checkpoint(layer, policy=policy))

    x = draw(1, 16, 2, 4)
    assert count("dot_general", jax.make_jaxpr(gradient)(x).jaxpr) == (7 if keep else 9)
    np.testing.assert_allclose(jax.jit(gradient)(x), jax.jit(jax.grad(lambda x: loss(x, layer)))(x), atol=1e-6)


# ---- what does not fit

Q, K = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 4, 2, 2))
IDS = jnp.ones((1, 4), jnp.int32)
REFUSED = {
    "ranks": (lambda: flash_attention(Q[0], Q, Q, scale=1.0, mask=CAUSAL), "wrong ranks"),
    "widths": (lambda: flash_attention(Q, Q[..., :1], Q, scale=1.0, mask=CAUSAL), "do not fit"),
    "no keys": (lambda: flash_attention(Q, Q[:, :0], Q[:, :0], scale=1.0, mask=Mask()), "empty dim"),
    "head counts": (lambda: flash_attention(Q, K, K, scale=1.0, mask=CAUSAL), "3 query heads are not a multiple of 2"),
    "dtypes": (lambda: flash_attention(Q, Q.astype(jnp.bfloat16), Q, scale=1.0, mask=CAUSAL), "one floating dtype"),
    "scale": (lambda: flash_attention(Q, Q, Q, scale=float("nan"), mask=CAUSAL), "scale=nan"),
    "softcap of zero": (lambda: flash_attention(Q, Q, Q, scale=1.0, mask=CAUSAL, softcap=0.0), "softcap=0.0"),
    "sinks": (
        lambda: flash_attention(Q, Q, Q, scale=1.0, mask=CAUSAL, sinks=jnp.ones(2)),
        r"sinks must be floats \[3\]",
    ),
    "implementation": (lambda: flash_attention(Q, Q, Q, scale=1.0, mask=CAUSAL, implementation="cuda"), "it has xla"),
    "no offset": (lambda: CAUSAL.check(1, 2, 4), r"give q_offset \(2 if both end together\)"),
    "a window without an offset": (lambda: Mask(window=(1, 1)).check(1, 2, 4), "give q_offset"),
    "half of the segments": (lambda: Mask(q_segment_ids_BT=IDS).check(1, 4, 4), "segment ids of both"),
    "half of the positions": (lambda: Mask(causal=True, kv_positions_BS=IDS).check(1, 4, 4), "positions of both"),
    "lengths of segments": (
        lambda: Mask(q_segment_ids_BT=IDS, kv_segment_ids_BS=IDS).check(1, 4, 5),
        r"segment ids of keys must be signed integers \[1, 5\], got int32 \[1, 4\]",
    ),
    "rows of segments": (
        lambda: Mask(q_segment_ids_BT=IDS[0], kv_segment_ids_BS=IDS).check(1, 4, 4),
        r"got int32 \[4\]",
    ),
    "float segments": (lambda: Mask(q_segment_ids_BT=IDS * 1.0, kv_segment_ids_BS=IDS).check(1, 4, 4), "got float32"),
    "offset and positions": (
        lambda: Mask(causal=True, q_offset=0, q_positions_BT=IDS, kv_positions_BS=IDS).check(1, 4, 4),
        "not both",
    ),
    "a traced offset": (lambda: Mask(causal=True, q_offset=jnp.int32(3)), "q_offset must be an int"),  # pyright: ignore
    "shape of the selection": (lambda: Mask(selected_BTS=jnp.ones((1, 4, 3), bool)).check(1, 4, 4), "must be bool"),
    "selection of integers": (lambda: Mask(selected_BTS=jnp.ones((1, 4, 4), int)).check(1, 4, 4), "must be bool"),
    "window of a number": (lambda: Mask(window=4), r"must be \(left, right\)"),  # pyright: ignore
    "window of zero": (lambda: Mask(window=(0, 0)), "only itself"),
    "causal window of zero": (lambda: Mask(causal=True, window=(0, None)), "only itself"),
    "negative window": (lambda: Mask(window=(-1, 4)), "not negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_does_not_fit(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert isinstance(caught.value, Unsupported) == (name == "implementation")
