"""Attention to selected latents by the kernels of decoding: XLA gathers, and each query is a row whose cache is what it selects."""

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.mla_decode import LatentCache, mla_decode
from kernels_pallas.select import Unsupported
from kernels_pallas.sparse_attention.xla import in_one_list, over_chunks


def forward(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None,
    implementation: Literal["tpu", "gpu"],
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, U] in q's dtype and the logsumexp [B, T, N], by that implementation of mla_decode."""
    width, kv_heads = k_BSZK.shape[3], k_BSZK.shape[2]
    if value_width is None or kv_heads > 1 or value_width == width:
        raise Unsupported(
            f"sparse_attention on {implementation} needs one key head, whose first numbers, not all of them, are the values "
            f"(value_width), not {kv_heads}; 'xla' takes others"
        )
    # What names no key comes last, behind the length.
    index_MW = jnp.sort(in_one_list(index_BTW, k_BSZK.shape[1]), axis=1)
    latent_RU, rope_RX = jnp.split(k_BSZK.reshape(-1, width), [value_width], axis=1)

    def one_chunk(queries: tuple[jax.Array, jax.Array], _: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        q_mNK, index_mW = queries
        length_m = jnp.sum(index_mW < latent_RU.shape[0], axis=1, dtype=jnp.int32)
        cache = LatentCache(*(a.at[index_mW].get(mode="clip") for a in (latent_RU, rope_RX)))
        q_m1NU, q_m1NX = jnp.split(q_mNK[:, None], [value_width], axis=3)
        out_m1NU, lse_m1N = mla_decode(q_m1NU, q_m1NX, cache, length_m, scale=scale, implementation=implementation)
        return (out_m1NU[:, 0], lse_m1N[:, 0]), ()

    (out_MNU, lse_MN), _ = over_chunks(one_chunk, (q_BTNK.reshape(-1, *q_BTNK.shape[2:]), index_MW), (), width)
    return out_MNU.reshape(*q_BTNK.shape[:3], value_width), lse_MN.reshape(q_BTNK.shape[:3])
