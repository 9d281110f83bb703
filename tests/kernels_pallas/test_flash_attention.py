import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import flash_attention
from kernels_pallas.flash_attention import xla

IMPLEMENTATIONS = ["reference", "xla"]
# name: (B, T, S, N, Z, K, U, causal, segments, positions); a name that ends in "mask" has one
CASES = {
    "plain": (2, 16, 16, 4, 4, 6, 5, True, None, None),
    "not causal": (2, 16, 9, 2, 2, 4, 4, False, None, None),
    "grouped heads, odd lengths": (2, 13, 13, 6, 2, 4, 3, True, None, None),
    "one kv head": (1, 7, 7, 5, 1, 4, 8, True, None, None),
    "packed documents and padding": (2, 24, 24, 2, 2, 4, 3, True, "packed", None),
    "a row of padding alone": (2, 8, 8, 2, 1, 4, 3, True, "one row empty", None),
    "length one": (2, 1, 1, 2, 2, 4, 3, True, None, None),
    "decode from a cache": (3, 1, 20, 4, 2, 4, 3, True, "cache", "cache"),
    "prefill after a cache": (2, 5, 12, 2, 2, 4, 3, True, None, "tail"),
    "blocks": (1, 83, 83, 2, 1, 4, 3, True, "packed", None),
    "more blocks than segments": (1, 163, 163, 2, 2, 4, 3, True, "packed", None),
    "blocks, not causal": (2, 41, 30, 2, 1, 4, 3, False, None, None),
    "packed documents and a mask": (2, 24, 24, 4, 2, 4, 3, True, "packed", None),
    "decode with a mask": (3, 1, 20, 4, 2, 4, 3, True, None, "cache"),
    "blocks and a mask": (1, 83, 83, 2, 1, 4, 3, True, "packed", None),
    "blocks, not causal, with a mask": (2, 41, 30, 2, 1, 4, 3, False, None, None),
    "blocks with positions": (2, 41, 60, 2, 1, 4, 3, True, "packed", "tail"),
}


def inputs(name):
    b, t, s, n, z, k, u, causal, segments, positions = CASES[name]
    rng = np.random.default_rng(2)
    q, key, v = (rng.standard_normal(shape) for shape in ((b, t, n, k), (b, s, z, k), (b, s, z, u)))
    q_seg = kv_seg = np.ones((b, 1), int)
    q_pos, kv_pos = np.arange(t)[None], np.arange(s)[None]
    if segments == "packed":
        q_seg = np.sort(rng.integers(1, 4, (b, t)), axis=1)
        q_seg[:, -3:] = 0
        kv_seg = q_seg if s == t else np.sort(rng.integers(1, 4, (b, s)), axis=1)
    if segments == "one row empty":
        q_seg = kv_seg = np.array([[1] * t, [0] * t])
    if segments == "cache":
        kv_seg = (np.arange(s)[None] < np.array([[20], [3], [1]])).astype(int)
    if positions == "cache":
        q_pos = np.array([[19], [2], [0]])
    if positions == "tail":
        q_pos = np.arange(t)[None] + s - t
    masks = {"causal": causal}
    wide = lambda ids, n: np.broadcast_to(ids, (b, n))  # noqa: E731
    full = (wide(q_seg, t), wide(kv_seg, s), wide(q_pos, t), wide(kv_pos, s))
    if segments:
        masks |= {"q_segment_ids_BT": jnp.asarray(full[0]), "kv_segment_ids_BS": jnp.asarray(full[1])}
    if positions:
        masks |= {"q_positions_BT": jnp.asarray(full[2]), "kv_positions_BS": jnp.asarray(full[3])}
    mask = np.ones((b, t, s), bool)
    if name.endswith("mask"):
        mask = rng.random((b, t, s)) < 0.3
        masks |= {"mask_BTS": jnp.asarray(mask)}
    return q, key, v, rng.standard_normal((b, t, n, u)), masks, (causal, *full, mask)


def expected(q, k, v, dout, causal, q_seg, kv_seg, q_pos, kv_pos, mask, scale):
    """One query head at a time, by the equation and its chain rule; a query that sees nothing is skipped."""
    out, dq, dk, dv = np.zeros(dout.shape), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        z = n // group
        sees = (kv_seg[b] == q_seg[b, t]) & (q_seg[b, t] != 0) & mask[b, t]
        if causal:
            sees &= kv_pos[b] <= q_pos[b, t]
        if not sees.any():
            continue
        logits = k[b, sees, z] @ q[b, t, n] * scale
        p = np.exp(logits - logits.max())
        p /= p.sum()
        out[b, t, n] = p @ v[b, sees, z]
        dp = v[b, sees, z] @ dout[b, t, n]
        ds = p * (dp - p @ dp) * scale
        dq[b, t, n] = ds @ k[b, sees, z]
        dk[b, sees, z] += np.outer(ds, q[b, t, n])
        dv[b, sees, z] += np.outer(p, dout[b, t, n])
    return out, dq, dk, dv


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation, monkeypatch):
    if "blocks" in name:
        monkeypatch.setattr(xla, "BLOCK", 8)
    q, k, v, dout, masks, truth = inputs(name)

    def run(q, k, v, dout):
        op = lambda q, k, v: flash_attention(q, k, v, scale=0.4, implementation=implementation, **masks)  # noqa: E731
        out, vjp = jax.vjp(op, q, k, v)
        return out, *vjp(dout)

    got = jax.jit(run)(*(jnp.asarray(a, jnp.float32) for a in (q, k, v, dout)))
    for actual, wanted in zip(got, expected(q, k, v, dout, *truth, scale=0.4), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    q = jnp.full((1, 4, 1, 2), 200.0)
    out = flash_attention(q, q, jnp.ones((1, 4, 1, 3)), scale=1.0)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_a_long_sequence_never_holds_its_score_matrix():
    length = 2048
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    program = jax.jit(jax.grad(lambda q: flash_attention(q, q, q, scale=1.0).sum())).lower(q).as_text()
    assert f"{length}x{length}" not in program


def test_inside_shard_map_by_rows(monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "SEGMENTS", 2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    q = jax.random.normal(jax.random.key(0), (2, 41, 2, 4))

    def loss(q):
        return jnp.sum(flash_attention(q, q, q, scale=1.0) ** 2)

    def sharded_loss(q):
        return jax.shard_map(lambda q: jax.lax.psum(loss(q), "data"), in_specs=P("data"), out_specs=P())(q)

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(sharded_loss))(jax.device_put(q, jax.NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(got, jax.grad(loss)(q), rtol=1e-5, atol=1e-5)


def test_refuses_what_does_not_fit():
    q, k = jnp.ones((1, 4, 3, 2)), jnp.ones((1, 4, 2, 2))
    with pytest.raises(ValueError, match="not a multiple"):
        flash_attention(q, k, k, scale=1.0)
    with pytest.raises(ValueError, match="needs q_positions"):
        flash_attention(q[:, :2], q, q, scale=1.0)
    with pytest.raises(ValueError, match="segment ids of both"):
        flash_attention(q, q, q, scale=1.0, q_segment_ids_BT=jnp.ones((1, 4), int))
    with pytest.raises(ValueError, match="q_positions must be"):
        flash_attention(q, q, q, scale=1.0, q_positions_BT=jnp.ones(4, int), kv_positions_BS=jnp.ones((1, 4), int))
    for mask in (jnp.ones((1, 4, 3), bool), jnp.ones((1, 4, 4), int)):
        with pytest.raises(ValueError, match="mask must be bool"):
            flash_attention(q, q, q, scale=1.0, mask_BTS=mask)
