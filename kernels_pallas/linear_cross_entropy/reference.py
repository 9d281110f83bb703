"""Cross-entropy by its equation, in float32, with all logits at once."""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
    x_MD: jax.Array, w_DV: jax.Array, target_M: jax.Array, weight_M: jax.Array, z_loss: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    logits_MV = x_MD.astype(jnp.float32) @ w_DV.astype(jnp.float32)
    lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
    nll_M = lse_M - jnp.take_along_axis(logits_MV, target_M[:, None], axis=1)[:, 0]
    correct_M = nll_M <= lse_M - jnp.max(logits_MV, axis=-1)
    losses_M = jnp.where(weight_M == 0, 0, weight_M * (nll_M + z_loss * lse_M**2))
    return jnp.sum(losses_M), jax.lax.stop_gradient((nll_M, lse_M, correct_M))
