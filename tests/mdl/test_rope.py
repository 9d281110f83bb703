"""Rotary tables and rotations against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import numpy_model
import pytest

from mdl.rope import Llama3RopeConfig, RopeConfig, YarnConfig, apply_rotary, rotary_tables

ROPES = {
    "plain": RopeConfig(),
    "plain_large_base": RopeConfig(rope_theta=1e6),
    "yarn_v3": YarnConfig(mscale=1.0, mscale_all_dim=1.0),
    "yarn_v2_lite": YarnConfig(mscale=0.707, mscale_all_dim=0.707),
    "yarn_unequal_mscale": YarnConfig(mscale=0.7, mscale_all_dim=1.2, factor=8.0),
    "yarn_no_mscale": YarnConfig(factor=8.0),
    "yarn_only_all_dim": YarnConfig(factor=8.0, mscale_all_dim=1.2),
    "yarn_attention_factor": YarnConfig(attention_factor=1.25, mscale=1.0, mscale_all_dim=0.5),
    "yarn_factor_one": YarnConfig(factor=1.0, mscale=1.0, mscale_all_dim=0.5),
    "yarn_short": YarnConfig(original_max_position_embeddings=64, factor=4.0, rope_theta=100.0),
    "yarn_kimi_k2": YarnConfig(rope_theta=5e4, factor=32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0),
    "llama3": Llama3RopeConfig(rope_theta=5e5),
    "llama3_short": Llama3RopeConfig(rope_theta=100.0, original_max_position_embeddings=64, factor=4.0),
}
every_rope = pytest.mark.parametrize("name", ROPES)


@every_rope
@pytest.mark.parametrize("dim", [8, 64])
def test_frequencies_and_tables(name, dim):
    rope = ROPES[name]
    want = np.array([numpy_model.frequency(rope, i, dim) for i in range(dim // 2)])
    np.testing.assert_allclose(rope.inverse_frequencies(dim), want, rtol=1e-12)  # float64 on both sides

    positions = np.array([[0, 1, 7, 40], [3, 0, 63, 64]], np.int32)
    cos, sin = rotary_tables(rope, dim, jnp.asarray(positions))
    turn = np.exp(1j * positions[..., None] * want) * numpy_model.table_factor(rope)
    # Angles below 64 radians in float32: half an ulp of 64 is 4e-6.
    np.testing.assert_allclose(cos, turn.real, atol=1e-5)
    np.testing.assert_allclose(sin, turn.imag, atol=1e-5)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    """The published frequencies of DeepSeek-V3: 64 channels, base 10000, 4096 to 163840 positions."""
    plain, yarn = RopeConfig().inverse_frequencies(64), ROPES["yarn_v3"].inverse_frequencies(64)
    # Pair 10 turns 36 times over 4096 positions, pair 11 27 times; pair 22 turns 1.16 times, pair 23 0.87 times.
    np.testing.assert_array_equal(yarn[:11], plain[:11])
    assert np.all((yarn < plain)[11:23] & (yarn > plain / 40)[11:23])
    np.testing.assert_allclose(yarn[23:], plain[23:] / 40)


def test_softmax_factor():
    np.testing.assert_allclose(ROPES["yarn_v3"].softmax_factor, (0.1 * np.log(40) + 1) ** 2)
    assert (
        ROPES["yarn_no_mscale"].softmax_factor == ROPES["plain"].softmax_factor == ROPES["llama3"].softmax_factor == 1
    )
    assert ROPES["yarn_factor_one"].softmax_factor == 1


@pytest.mark.parametrize("interleaved", [True, False])
def test_both_pair_layouts(interleaved):
    rope, rng = ROPES["yarn_unequal_mscale"], np.random.default_rng(0)
    x_BTNR = rng.standard_normal((2, 3, 2, 8)).astype(np.float32)
    positions = np.array([[0, 5, 2], [1, 0, 9]], np.int32)
    got = np.asarray(
        apply_rotary(jnp.asarray(x_BTNR), rotary_tables(rope, 8, jnp.asarray(positions)), interleaved=interleaved)
    )
    for b, t, n in np.ndindex(2, 3, 2):
        turned = numpy_model.turned(
            x_BTNR[b, t, n].astype(np.float64), int(positions[b, t]), rope, interleaved=interleaved
        )
        np.testing.assert_allclose(got[b, t, n], numpy_model.real(turned), atol=2e-6)


def test_rotary_products_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(t: int, s: int) -> float:
        at = [rotary_tables(RopeConfig(), 16, jnp.full((1, 1), position)) for position in (t, s)]
        return float(
            jnp.vdot(*(apply_rotary(x, tables, interleaved=True) for x, tables in zip((q, k), at, strict=True)))
        )

    np.testing.assert_allclose(product(3, 1), product(33, 31), rtol=1e-5)
    assert abs(product(3, 1) - product(4, 1)) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeConfig(rope_theta=0.0), "rope_theta is 0"),
        (lambda: YarnConfig(factor=0.0), "factor is 0"),
        (lambda: YarnConfig(beta_slow=0.0), "beta_slow is 0"),
        (lambda: Llama3RopeConfig(low_freq_factor=4.0), "low_freq_factor=4"),
        (lambda: Llama3RopeConfig(original_max_position_embeddings=0), "original_max_position_embeddings is 0"),
    ],
)
def test_configs_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
