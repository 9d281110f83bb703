"""Attention against kernels of others, where these support the call: splash attention (interpreted here), cuDNN (on a GPU)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from kernels_pallas import flash_attention
from kernels_pallas.flash_attention.mask import Mask

T, N, SCALE = 256, 4, 0.11
BLOCKS = splash.BlockSizes(
    block_q=128, block_kv=128, block_kv_compute=128, block_q_dkv=128, block_kv_dkv=128, block_kv_dkv_compute=128,
    block_q_dq=128, block_kv_dq=128,
)  # fmt: skip
CASES = {
    "causal": {},
    "grouped, 192 / 128": {"kv_heads": 2, "widths": (192, 128)},
    "window": {"left": 70},
    "segments": {"segments": True},
    "softcap and sinks": {"softcap": 2.0, "sinks": True},
}


def splash_attention(q_BTNK, k_BSZK, v_BSZU, segments_BT, sinks_N, left, softcap):
    mask = splash_mask.CausalMask((T, T)) if left is None else splash_mask.LocalMask((T, T), (left, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * N), block_sizes=BLOCKS, attn_logits_soft_cap=softcap, interpret=True
    )
    rows = []
    for q, k, v, segments in zip(q_BTNK, k_BSZK, v_BSZU, segments_BT, strict=True):
        q, k, v = (a.swapaxes(0, 1) for a in (q * SCALE, k, v))
        rows.append(kernel(q, k, v, splash.SegmentIds(segments, segments), sinks_N).swapaxes(0, 1))
    return jnp.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_splash_attention(case):
    call = {
        "kv_heads": N,
        "widths": (64, 64),
        "left": None,
        "segments": False,
        "softcap": None,
        "sinks": False,
    } | CASES[case]
    rng, (width, v_width) = np.random.default_rng(0), call["widths"]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k = normal(2, T, N, width), normal(2, T, call["kv_heads"], width)
    v, dout = normal(2, T, call["kv_heads"], v_width), normal(2, T, N, v_width)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, T)))) if call["segments"] else jnp.ones((2, T), jnp.int32)
    sinks = normal(N) if call["sinks"] else None
    mask = Mask(causal=True, window=None if call["left"] is None else (call["left"], 0))
    if call["segments"]:
        mask = Mask(causal=True, q_segment_ids_BT=segments, kv_segment_ids_BS=segments)

    ours = functools.partial(flash_attention, scale=SCALE, mask=mask, softcap=call["softcap"], sinks=sinks)
    out, vjp = jax.vjp(ours, q, k, v)
    theirs, their_vjp = jax.vjp(
        lambda q, k, v: splash_attention(q, k, v, segments, sinks, call["left"], call["softcap"]), q, k, v
    )
    # float32 sums in another order, over at most 256 keys and 256 queries of a group of two heads.
    for mine, other in zip((out, *vjp(dout)), (theirs, *their_vjp(dout)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)


@pytest.mark.device
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize("left", [None, 70])
def test_values_and_gradients_are_near_those_of_cudnn(left):
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.normal(size=(2, T, N, 128)), jnp.bfloat16) for _ in range(4))
    mask = Mask(causal=True, window=None if left is None else (left, 0))
    window = None if left is None else (left, 0)
    cudnn = functools.partial(
        jax.nn.dot_product_attention, scale=SCALE, is_causal=True, local_window_size=window, implementation="cudnn"
    )
    for implementation in ("xla", "gpu"):
        ours = functools.partial(flash_attention, scale=SCALE, mask=mask, implementation=implementation)
        (out, vjp), (theirs, their_vjp) = jax.vjp(ours, q, k, v), jax.vjp(cudnn, q, k, v)
        for mine, other in zip((out, *vjp(dout)), (theirs, *their_vjp(dout)), strict=True):
            mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
            # Both round operands and results to bfloat16 (2^-9), and probabilities in between.
            assert np.linalg.norm(mine - other) <= 1e-2 * np.linalg.norm(other)
