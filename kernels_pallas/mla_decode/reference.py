"""softmax(scale * (q_latent · latent + q_rope · rope)) latent over the positions that a query sees, in float32."""

import jax
import jax.numpy as jnp

from kernels_pallas.mla_decode.cache import AnyCache, capacity, read


def decode(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    cache: AnyCache,
    lengths_B: jax.Array,
    scale: float,
    splits: int | None,
) -> tuple[jax.Array, jax.Array]:
    del splits  # the same result
    T, S = q_latent_BTNC.shape[1], capacity(cache)
    latent_BSC, rope_BSR = read(cache, 0, S, jnp.dtype(jnp.float32))
    slot_S = jnp.arange(S)
    held_BS1 = (slot_S < lengths_B[:, None])[..., None]
    latent_BSC, rope_BSR = jnp.where(held_BS1, latent_BSC, 0), jnp.where(held_BS1, rope_BSR, 0)
    s_BTNS = jnp.einsum("BTNC,BSC->BTNS", q_latent_BTNC.astype(jnp.float32), latent_BSC, precision="highest")
    s_BTNS += jnp.einsum("BTNR,BSR->BTNS", q_rope_BTNR.astype(jnp.float32), rope_BSR, precision="highest")
    end_BT = lengths_B[:, None] - T + 1 + jnp.arange(T)
    s_BTNS = jnp.where((slot_S < end_BT[..., None])[:, :, None], scale * s_BTNS, -jnp.inf)
    lse_BTN = jax.nn.logsumexp(s_BTNS, axis=-1)
    p_BTNS = jnp.exp(s_BTNS - jnp.where(lse_BTN == -jnp.inf, 0, lse_BTN)[..., None])
    return jnp.einsum("BTNS,BSC->BTNC", p_BTNS, latent_BSC, precision="highest"), lse_BTN
