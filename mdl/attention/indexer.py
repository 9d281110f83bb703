"""The lightning indexer, which foresees what attention will look at (DeepSeek-V3.2-Exp report, section 2.1)."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.lightning_indexer import hadamard, keys_to_fp8
from mdl import sharding
from mdl.attention.cache import Cache
from mdl.attention.core import Context
from mdl.attention.selection import Index
from mdl.linear import Init, Linear
from mdl.norm import LayerNorm
from mdl.rope import apply_rotary

if TYPE_CHECKING:
    from mdl.attention.dsa import DsaConfig

KEY_NORM_EPS = 1e-6  # the published code fixes it, whatever rms_norm_eps says


class Indexer(nnx.Module):
    """What the lightning indexer scores a query and a key by: I narrow query heads and one key that they share (eq. 1).

    Rotary channels come first in a head, where MLA has them last, and have their own pair layout. In FP8 are the scores that choose
    keys, and so a cache's keys; the loss is of numbers that are not rounded.
    """

    def __init__(self, config: "DsaConfig", hidden_size: int, *, init: Init):
        D, Q, I, J = hidden_size, config.query_width, config.index_n_heads, config.index_head_dim
        self.config = config
        self.wq_b = Linear((Q or D,), (I, J), ("latent" if Q else "embed", "heads", None), init=init)
        self.wk = Linear((D,), (J,), ("embed", None), init=init)
        self.k_norm = LayerNorm(J, eps=KEY_NORM_EPS, init=init)
        float32 = dataclasses.replace(init.precision, param="float32")
        self.weights_proj = dataclasses.replace(init, precision=float32).normal((D, I), ("embed", None))

    def __call__(self, x_BTD: jax.Array, latent_BTQ: jax.Array, entries: Cache, context: Context) -> Index:
        """What scores the keys of `entries` for these tokens, which get no gradient."""
        x_BTD, latent_BTQ = jax.lax.stop_gradient((x_BTD, latent_BTQ))
        keys = entries["index_key"], entries.get("index_scale")
        return Index(self.queries(latent_BTQ, context), self.head_weights(x_BTD), *keys)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        shape = batch, length, self.config.index_head_dim
        if not self.config.index_fp8:
            return {"index_key": jnp.zeros(shape, dtype)}
        return {
            "index_key": jnp.zeros(shape, jnp.float8_e4m3fn),
            "index_scale": jnp.zeros((batch, length), jnp.float32),
        }

    def entries(self, x_BTD: jax.Array, context: Context) -> Cache:
        """What the cache keeps of these tokens."""
        k_BTJ, is_cached = self.keys(x_BTD, context), context.segment_ids_BT is None
        if not (self.config.index_fp8 and is_cached):
            return {"index_key": k_BTJ}
        rows = sharding.spec("batch")
        to_fp8 = sharding.local(keys_to_fp8, in_specs=rows, out_specs=(rows, rows), vary=sharding.ROWS)
        k_BTJ, scale_BT = to_fp8(k_BTJ)
        return {"index_key": k_BTJ, "index_scale": scale_BT}

    def queries(self, latent_BTQ: jax.Array, context: Context) -> jax.Array:
        """q_BTIJ, on every device of a row: the sum over heads must not depend on how they are split."""
        q_BTIJ = sharding.reshard(self.wq_b(latent_BTQ), sharding.spec("batch", None, None, None))
        return self._rotated(q_BTIJ, context)

    def keys(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """k_BTJ, normed and rotated."""
        return self._rotated(self.k_norm(self.wk(x_BTD))[:, :, None], context)[:, :, 0]

    def head_weights(self, x_BTD: jax.Array) -> jax.Array:
        """w_BTI of either sign, in float32 throughout; the scores' factor 1 / sqrt(J) is in it."""
        dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
        w_DI = sharding.reshard(self.weights_proj[...].astype(dtype), sharding.gathered(*self.weights_proj.axes))
        w_BTI = jnp.einsum("BTD,DI->BTI", x_BTD.astype(dtype), w_DI, precision=jax.lax.Precision.HIGHEST)
        return w_BTI * (self.config.index_n_heads * self.config.index_head_dim) ** -0.5

    def _rotated(self, x_BTIJ: jax.Array, context: Context) -> jax.Array:
        x_BTIR, rest = jnp.split(x_BTIJ, [self.config.rotary_dim], axis=-1)
        x_BTIR = apply_rotary(x_BTIR, context.rotary, interleaved=self.config.indexer_rope_interleave)
        x_BTIJ = jnp.concatenate([x_BTIR, rest], axis=-1)
        return hadamard(x_BTIJ) if self.config.index_hadamard else x_BTIJ
