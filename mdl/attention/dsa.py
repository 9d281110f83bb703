"""DeepSeek sparse attention: each query attends to the few keys that a small indexer scores highest.

DeepSeek-V3.2-Exp report, section 2.1, and the released inference code. The attention is computed densely for now, with the
selection as a mask: the index scores of a layer are whole, [B, T, S].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mdl import sharding
from mdl.attention.cache import Cache, write
from mdl.attention.core import Context, attend
from mdl.attention.mla import Mla, MlaConfig
from mdl.linear import Init, Linear
from mdl.norm import LayerNorm
from mdl.rope import AnyRope, apply_rotary

KEY_NORM_EPS = 1e-6  # the published code fixes it, whatever rms_norm_eps says
QUERIES_AT_ONCE = 256  # whose products with all keys, one a head, are held before the heads are summed


class Dsa(nnx.Module):
    """x_BTD -> o_BTD: `dense`, restricted to the keys that `indexer` selects.

    The cache holds the entries of `dense` and the index key: C + R + J numbers per token. No gradient passes through the indexer:
    its inputs are detached, and a choice has none.
    """

    def __init__(self, config: "DsaConfig", hidden_size: int, *, eps: float, init: Init):
        self.config = config
        self.dense: Mla = config.dense.build(hidden_size, eps=eps, init=init)
        self.indexer = Indexer(config, hidden_size, init=init)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        index_key_BSJ = jnp.zeros((batch, length, self.config.index_head_dim), dtype)
        return {**self.dense.empty_cache(batch, length, dtype), "index_key": index_key_BSJ}

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        latent_BTQ = self.dense.query_latent(x_BTD)
        detached_x_BTD, detached_latent_BTQ = jax.lax.stop_gradient((x_BTD, latent_BTQ))
        entries = self.dense.entries(x_BTD, context) | {"index_key": self.indexer.keys(detached_x_BTD, context)}
        if cache is not None:
            entries = cache = write(cache, entries, context.positions_BT)

        scores_BTS = self.indexer.scores(
            self.indexer.queries(detached_latent_BTQ, context),
            self.indexer.head_weights(detached_x_BTD),
            entries["index_key"],
        )
        selected_BTS = select(scores_BTS, context.visible(scores_BTS.shape[-1]), self.config.index_topk)

        k_BSNK, v_BSNU = self.dense.keys_and_values(entries)
        o_BTNU = attend(
            self.dense.queries(latent_BTQ, context),
            k_BSNK,
            v_BSNU,
            scale=self.config.dense.softmax_scale,
            context=context,
            selected_BTS=selected_BTS,
        )
        return self.dense.o_proj(o_BTNU), cache


class Indexer(nnx.Module):
    """The lightning indexer: a score for each query and key, from I narrow query heads and one key that they share (eq. 1).

    Rotary channels come first in a head, where MLA has them last, and have their own pair layout.
    """

    def __init__(self, config: "DsaConfig", hidden_size: int, *, init: Init):
        assert config.dense.q_lora_rank is not None
        D, Q, I, J = hidden_size, config.dense.q_lora_rank, config.index_n_heads, config.index_head_dim
        self.config = config
        self.wq_b = Linear((Q,), (I, J), ("latent", "heads", None), init=init)
        self.wk = Linear((D,), (J,), ("embed", None), init=init)
        self.k_norm = LayerNorm(J, eps=KEY_NORM_EPS, init=init)
        float32 = dataclasses.replace(init.precision, param="float32")
        self.weights_proj = dataclasses.replace(init, precision=float32).normal((D, I), ("embed", None))

    def queries(self, latent_BTQ: jax.Array, context: Context) -> jax.Array:
        """q_BTIJ, on every device of a row: the sum over heads must not depend on how they are split."""
        q_BTIJ = sharding.reshard(self.wq_b(latent_BTQ), sharding.spec("batch", None, None, None))
        return self._rotated(q_BTIJ, context)

    def keys(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """k_BTJ, normed and rotated, as the cache keeps them."""
        return self._rotated(self.k_norm(self.wk(x_BTD))[:, :, None], context)[:, :, 0]

    def head_weights(self, x_BTD: jax.Array) -> jax.Array:
        """w_BTI of either sign, in float32 throughout."""
        dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
        w_DI = sharding.reshard(self.weights_proj[...].astype(dtype), sharding.gathered(*self.weights_proj.axes))
        w_BTI = jnp.einsum("BTD,DI->BTI", x_BTD.astype(dtype), w_DI, precision=jax.lax.Precision.HIGHEST)
        return w_BTI * self.config.index_n_heads**-0.5

    def scores(self, q_BTIJ: jax.Array, w_BTI: jax.Array, k_BSJ: jax.Array) -> jax.Array:
        """sum over heads of w * relu(q . k / sqrt(J)), [B, T, S] float32, of all keys, visible or not."""

        def of_one_query(query: tuple[jax.Array, jax.Array]) -> jax.Array:
            q_BIJ, w_BI = query
            logits_BIS = jnp.einsum("BIJ,BSJ->BIS", q_BIJ, k_BSJ, preferred_element_type=w_BI.dtype)
            logits_BIS = jax.nn.relu(logits_BIS * self.config.index_head_dim**-0.5)
            return jnp.einsum("BI,BIS->BS", w_BI, logits_BIS, precision=jax.lax.Precision.HIGHEST)

        queries = (jnp.moveaxis(q_BTIJ, 1, 0), jnp.moveaxis(w_BTI, 1, 0))
        return jnp.moveaxis(jax.lax.map(of_one_query, queries, batch_size=QUERIES_AT_ONCE), 0, 1)

    def _rotated(self, x_BTIJ: jax.Array, context: Context) -> jax.Array:
        x_BTIR, rest = jnp.split(x_BTIJ, [self.config.rotary_dim], axis=-1)
        x_BTIR = apply_rotary(x_BTIR, context.rotary, interleaved=self.config.indexer_rope_interleave)
        return jnp.concatenate([x_BTIR, rest], axis=-1)


def select(scores_BTS: jax.Array, visible_BTS: jax.Array, k: int) -> jax.Array:
    """Bool [B, T, S]: the k visible keys of each query with the highest scores, all of them where there are fewer.

    Among equal scores the earlier keys are taken, so that it is never more than k.
    """
    if k >= scores_BTS.shape[-1]:
        return visible_BTS
    scores_BTS = jnp.where(visible_BTS, jax.lax.stop_gradient(scores_BTS), -jnp.inf)
    least_BT1 = jax.lax.top_k(scores_BTS, k)[0][..., -1:]
    above_BTS, equal_BTS = scores_BTS > least_BT1, scores_BTS == least_BT1
    left_BT1 = k - jnp.sum(above_BTS, axis=-1, keepdims=True)
    return visible_BTS & (above_BTS | (equal_BTS & (jnp.cumsum(equal_BTS, axis=-1) <= left_BT1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DsaConfig:
    dense: MlaConfig = dataclasses.field(default_factory=MlaConfig)  # the attention whose keys are selected
    index_n_heads: int = 8  # heads I of the indexer
    index_head_dim: int = 32  # width J of an indexer head; its first qk_rope_head_dim channels are rotary
    index_topk: int = 64  # keys that a query attends to
    indexer_rope_interleave: bool = False  # the indexer's rotary pairs are (2i, 2i+1), not (i, i + R/2) as in V3.2

    def __post_init__(self):
        for name in ("index_n_heads", "index_head_dim", "index_topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dense.q_lora_rank is None:
            raise ValueError("dense.q_lora_rank is none: the indexer reads the query latent; set its width")
        if self.index_head_dim < self.rotary_dim:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} is less than dense.qk_rope_head_dim={self.rotary_dim}, the channels that "
                "are rotary; raise it"
            )

    @property
    def num_attention_heads(self) -> int:
        return self.dense.num_attention_heads

    @property
    def rope(self) -> AnyRope:
        """Of attention and indexer."""
        return self.dense.rope

    @property
    def rotary_dim(self) -> int:
        return self.dense.rotary_dim

    @property
    def cache_width(self) -> int:
        """Numbers per token of one layer's cache."""
        return self.dense.cache_width + self.index_head_dim

    def flops_per_query(self, seq_len: int) -> float:
        """Of an average query of a causal sequence: the index scores of every key it sees, attention to the selected ones only."""
        k = min(self.index_topk, seq_len)
        seen, selected = (seq_len + 1) / 2, (k * (k + 1) / 2 + (seq_len - k) * k) / seq_len
        return 2 * self.index_n_heads * (self.index_head_dim + 1) * seen + self.dense.flops_per_pair * selected

    def build(self, hidden_size: int, *, eps: float, init: Init) -> Dsa:
        return Dsa(self, hidden_size, eps=eps, init=init)
