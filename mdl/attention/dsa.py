"""DeepSeek sparse attention: each query attends to the few keys that a small indexer scores highest.

DeepSeek-V3.2-Exp report, section 2.1, and the released inference code. Nothing grows with the product of queries and keys: scores
stay inside of the selection, and of more than QUERIES queries, what belongs to a query is made for a part of them at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import LatentCache, Mask, fp8
from mdl.attention.cache import Cache, write
from mdl.attention.core import Context, attend
from mdl.attention.gqa import Gqa, GqaConfig
from mdl.attention.indexer import Indexer
from mdl.attention.mla import Mla, MlaConfig
from mdl.attention.selection import (
    SAVED_NAMES,
    Index,
    IndexerStats,
    Main,
    as_mask,
    attend_selected,
    decode_selected,
    kl_of_all,
    kl_of_selected,
    recall_of_selected,
    select,
    selects_by_mask,
    with_positions,
)
from mdl.linear import Init
from mdl.rope import AnyRope

QUERIES = (
    4096  # of a row, whose heads, as wide as latents once the keys' projection is folded into them, are held at a time
)


class Attended(NamedTuple):
    o_BTD: jax.Array
    cache: Cache | None
    indexer: IndexerStats | None  # None unless it is measured, and there is one
    selected_BTW: jax.Array | None  # which keys, for later layers without an indexer; None where it was all


class Dsa(nnx.Module):
    """x_BTD -> o_BTD: `dense`, restricted to the keys that `indexer` selects.

    MLA's queries, with the keys' up-projection folded into them, attend to latents as the cache holds them. It holds the entries of
    `dense` and the index key: C + R + J numbers per token. The text's loss passes no gradient to the indexer, since a choice has
    none, and the indexer's loss none to anything else: what it reads is detached.
    """

    def __init__(self, config: "DsaConfig", hidden_size: int, *, eps: float, init: Init):
        self.config = config
        self.dense: Mla | Gqa = config.dense.build(hidden_size, eps=eps, init=init)
        self.indexer = Indexer(config, hidden_size, init=init) if config.has_indexer else None

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        cache = self.dense.empty_cache(batch, length, dtype)
        if self.indexer is not None:
            cache |= self.indexer.empty_cache(batch, length, dtype)
        return cache

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None, selected_BTW: jax.Array | None = None
    ) -> Attended:
        """selected_BTW: what the last layer with an indexer selected, for one without."""
        latent_BTQ = self.dense.query_latent(x_BTD)
        entries = self.dense.entries(x_BTD, context)
        if self.indexer is not None:
            entries |= self.indexer.entries(jax.lax.stop_gradient(x_BTD), context)
        if cache is not None:
            entries = cache = write(cache, entries, context.positions_BT)
        if self.config.is_dense(_length(entries)):
            o_BTD, stats = self._attend_to_all(x_BTD, latent_BTQ, entries, context)
            return Attended(o_BTD, cache, stats, None)
        o_BTD, stats, selected_BTW = self._attend_to_selected(x_BTD, latent_BTQ, entries, context, selected_BTW)
        return Attended(o_BTD, cache, stats, selected_BTW)

    def _attend_to_all(
        self, x_BTD: jax.Array, latent_BTQ: jax.Array, entries: Cache, context: Context
    ) -> tuple[jax.Array, IndexerStats | None]:
        """The first stage of training, and sequences of no more than index_topk tokens."""
        dense, S, scale = self.dense, _length(entries), self.dense.config.softmax_scale
        q_BTNK = dense.queries(latent_BTQ, context)
        is_cached = context.segment_ids_BT is None
        if isinstance(dense, Mla) and is_cached and dense.config.absorbs(q_BTNK.shape[1], S):
            return dense.o_proj(dense.attend_absorbed(q_BTNK, entries, context)), None
        k_BSNK, v_BSNU = dense.keys_and_values(entries)
        mask = context.mask(S)
        o_BTNU, lse_BTN = attend(q_BTNK, k_BSNK, v_BSNU, scale=scale, mask=mask)
        stats = None
        if self.indexer is not None and context.measure != "nothing":
            index = self.indexer(x_BTD, latent_BTQ, entries, context)
            main = Main(q_BTNK, k_BSNK, lse_BTN)
            kl_BT, uniform_BT = kl_of_all(index, main, mask, scale=scale)
            recall_BT = None
            if context.measure == "recall":
                recall_BT = recall_of_selected(main, self._select(index, mask, context), scale=scale)
            stats = _summed(IndexerStats(kl_BT, uniform_BT, recall_BT), context)
        return dense.o_proj(o_BTNU), stats

    def _attend_to_selected(
        self,
        x_BTD: jax.Array,
        latent_BTQ: jax.Array,
        entries: Cache,
        context: Context,
        selected_BTW: jax.Array | None,
    ) -> tuple[jax.Array, IndexerStats | None, jax.Array]:
        S = _length(entries)
        mask = context.mask(S)
        k_BSZK, v_BSZU = self.dense.as_cached(entries)
        by_mask = context.segment_ids_BT is not None and selects_by_mask(S, self.config.index_topk)
        expanded = self.dense.keys_and_values(entries) if by_mask or context.measure == "recall" else None

        def of_part(
            x_BTD: jax.Array, latent_BTQ: jax.Array, context: Context, mask: Mask, selected_BTW: jax.Array | None
        ) -> tuple[jax.Array, IndexerStats | None, jax.Array]:
            dense, scale, index = self.dense, self.dense.config.softmax_scale, None
            if self.indexer is not None:
                index = self.indexer(x_BTD, latent_BTQ, entries, context)
                selected_BTW = self._select(index, mask, context)
            assert selected_BTW is not None  # of the layer before; the first has an indexer
            q_BTNK = dense.queries(latent_BTQ, context)
            wide_BTNK = dense.absorbed(q_BTNK)
            T, W = selected_BTW.shape[1:]
            is_cached = context.segment_ids_BT is None
            if isinstance(dense, Mla) and is_cached and T * W <= S:  # no more is gathered than the cache has
                latents = LatentCache(entries["latent"], entries["rotary_key"])
                o_BTNC = decode_selected(wide_BTNK, latents, selected_BTW, scale=scale)
                return dense.o_proj(dense.expanded(o_BTNC)), None, selected_BTW

            if by_mask and expanded is not None:
                chosen = dataclasses.replace(mask, selected_BTS=as_mask(selected_BTW, S))
                o_BTNU, lse_BTN = attend(q_BTNK, *expanded, scale=scale, mask=chosen)
            else:
                width = dense.config.kv_lora_rank if isinstance(dense, Mla) else None
                o_BTNC, lse_BTN = attend_selected(
                    wide_BTNK, k_BSZK, v_BSZU, selected_BTW, scale=scale, value_width=width
                )
                o_BTNU = dense.expanded(o_BTNC)
            stats = None
            if index is not None and context.measure != "nothing":
                main = Main(wide_BTNK, k_BSZK, lse_BTN)
                kl_BT, uniform_BT = kl_of_selected(index, main, selected_BTW, scale=scale)
                recall_BT = None
                if context.measure == "recall" and expanded is not None:
                    _, lse_of_all_BTN = attend(q_BTNK, *expanded, scale=scale, mask=mask)
                    main = main._replace(lse_BTN=lse_of_all_BTN)
                    recall_BT = recall_of_selected(main, selected_BTW, scale=scale)
                stats = _summed(IndexerStats(kl_BT, uniform_BT, recall_BT), context)
            return dense.o_proj(o_BTNU), stats, selected_BTW

        x_BTD = jax.lax.stop_gradient(x_BTD)  # only the indexer reads it, and a gradient of zeros takes as much memory
        if x_BTD.shape[1] <= QUERIES:
            return of_part(x_BTD, latent_BTQ, context, mask, selected_BTW)
        return _in_parts(of_part, x_BTD, latent_BTQ, context, mask, selected_BTW)

    def _select(self, index: Index, mask: Mask, context: Context) -> jax.Array:
        S = index.k_BSJ.shape[1]
        topk, latest, in_fp8 = min(self.config.index_topk, S), self.config.index_window, self.config.index_fp8
        if latest == 0 or topk == S:
            return select(index, mask, topk, fp8=in_fp8)
        mask = with_positions(mask)
        assert mask.q_positions_BT is not None
        older = dataclasses.replace(mask, q_positions_BT=mask.q_positions_BT - latest)
        back_W = jnp.arange(latest, dtype=jnp.int32)
        is_there_BTW = back_W <= context.positions_BT[..., None]
        if context.segment_ids_BT is not None:
            is_there_BTW &= context.segment_ids_BT[..., None] > 0
        latest_BTW = jnp.where(is_there_BTW, mask.q_positions_BT[..., None] - back_W, S)
        older_BTW = select(index, older, topk - latest, fp8=in_fp8)
        return jnp.sort(jnp.concatenate([older_BTW, latest_BTW], axis=-1), axis=-1)


def _length(entries: Cache) -> int:
    """Number of keys, visible or not."""
    return next(iter(entries.values())).shape[1]


def _summed(stats_BT: IndexerStats, context: Context) -> IndexerStats:
    """Over the queries that are no padding."""
    ids_BT = context.segment_ids_BT
    assert ids_BT is not None  # nothing is measured while text is generated
    return jax.tree.map(lambda values_BT: jnp.sum(jnp.where(ids_BT > 0, values_BT, 0)), stats_BT)


def _in_parts(
    run: Callable,
    x_BTD: jax.Array,
    latent_BTQ: jax.Array,
    context: Context,
    mask: Mask,
    selected_BTW: jax.Array | None,
) -> tuple[jax.Array, IndexerStats | None, jax.Array]:
    """`run` of these arguments on QUERIES queries of each row at a time, with all of the keys.

    The backward pass makes what belongs to queries again, but for their keys' indices and what the indexer's loss keeps.
    """
    B, T = x_BTD.shape[:2]
    mask = with_positions(mask)

    def one(x_BTD, latent_BTQ, context, q_positions_BT, q_segment_ids_BT, selected_BTW):
        of_part = dataclasses.replace(mask, q_positions_BT=q_positions_BT, q_segment_ids_BT=q_segment_ids_BT)
        return run(x_BTD, latent_BTQ, context, of_part, selected_BTW)

    kept = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
    one = jax.checkpoint(one, policy=kept, prevent_cse=False)
    of_queries = (x_BTD, latent_BTQ, context, mask.q_positions_BT, mask.q_segment_ids_BT, selected_BTW)
    whole = T - T % QUERIES

    def in_front(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a[:, :whole].reshape(B, -1, QUERIES, *a.shape[2:]), 1, 0)

    def behind(parts: jax.Array) -> jax.Array:
        return jnp.moveaxis(parts, 0, 1).reshape(B, whole, -1)

    _, (o, stats, selected) = jax.lax.scan(lambda _, a: (None, one(*a)), None, jax.tree.map(in_front, of_queries))
    o_BTD, stats, selected_BTW = behind(o), jax.tree.map(jnp.sum, stats), behind(selected)
    if whole < T:
        rest_BTD, more, others_BTW = one(*jax.tree.map(lambda a: a[:, whole:], of_queries))
        o_BTD, selected_BTW = (
            jnp.concatenate(pair, axis=1) for pair in ((o_BTD, rest_BTD), (selected_BTW, others_BTW))
        )
        stats = jax.tree.map(jnp.add, stats, more)
    return o_BTD, stats, selected_BTW


@dataclasses.dataclass(frozen=True, kw_only=True)
class DsaConfig:
    # the attention whose keys are selected; over GQA the indexer reads the hidden state in place of a query latent
    dense: MlaConfig | GqaConfig = dataclasses.field(default_factory=MlaConfig)
    index_n_heads: int = 8  # heads I of the indexer
    index_head_dim: int = 32  # width J of an indexer head; its first qk_rope_head_dim channels are rotary
    index_topk: int = 64  # keys that a query attends to
    index_window: int = 0  # the latest keys, which are always among them, itself included
    indexer_rope_interleave: bool = False  # the indexer's rotary pairs are (2i, 2i+1), not (i, i + R/2) as in V3.2
    # as the published inference code scores: rotated by a Hadamard matrix, which alone changes rounding only, then in FP8
    index_hadamard: bool = False
    index_fp8: bool = False
    # of each layer: an indexer of its own, or the choice of the last layer that has one (GLM-5.2); none: all full
    indexer_types: tuple[Literal["full", "shared"], ...] | None = None
    warmup: bool = False  # first stage of training: attention to all keys, which the indexer learns to foresee

    def __post_init__(self):
        for name in ("index_n_heads", "index_head_dim", "index_topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.index_window < self.index_topk:
            raise ValueError(
                f"index_window={self.index_window} must be at least 0 and below index_topk={self.index_topk}, of which it is a part"
            )
        if isinstance(self.dense, MlaConfig) and self.dense.q_lora_rank is None:
            raise ValueError("dense.q_lora_rank is none: the indexer reads the query latent; set its width")
        if self.index_head_dim < self.rotary_dim:
            name = "qk_rope_head_dim" if isinstance(self.dense, MlaConfig) else "head_dim"
            raise ValueError(
                f"index_head_dim={self.index_head_dim} is less than dense.{name}={self.rotary_dim}, the channels that are rotary; "
                "raise it"
            )
        if self.index_hadamard and self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_head_dim={self.index_head_dim} must be a power of two for index_hadamard=true")
        if self.index_fp8 and self.index_head_dim > fp8.BLOCK:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} is more than the {fp8.BLOCK} numbers that share a scale; set index_fp8=false"
            )

    @property
    def num_attention_heads(self) -> int:
        return self.dense.num_attention_heads

    @property
    def query_width(self) -> int | None:
        """Of the query latent; none where there is no such thing."""
        return self.dense.q_lora_rank if isinstance(self.dense, MlaConfig) else None

    @property
    def rope(self) -> AnyRope:
        """Of attention and indexer."""
        return self.dense.rope

    @property
    def rotary_dim(self) -> int:
        return self.dense.rotary_dim

    def cache_bytes(self, itemsize: int) -> int:
        """Per token of one layer's cache."""
        index_key = self.index_head_dim + 4 if self.index_fp8 else self.index_head_dim * itemsize
        return self.dense.cache_bytes(itemsize) + (index_key if self.has_indexer else 0)

    @property
    def has_indexer(self) -> bool:
        """Of the config of one layer."""
        return self.indexer_types is None or self.indexer_types[0] == "full"

    def of_layer(self, layer: int) -> "DsaConfig":
        if self.indexer_types is None:
            return self
        return dataclasses.replace(self, indexer_types=(self.indexer_types[layer],))

    def is_dense(self, num_keys: int) -> bool:
        """Whether queries attend to all of so many keys."""
        return self.warmup or self.index_topk >= num_keys

    def flops_per_query(self, seq_len: int) -> float:
        """Attention of an average query of a causal sequence, to the selected keys only."""
        return self.dense.flops_per_pair * self._keys_attended(seq_len)

    def index_flops_per_query(self, seq_len: int) -> float:
        """The scores of every key that an average query sees."""
        return self._flops_per_score * (seq_len + 1) / 2

    def index_gradient_flops_per_query(self, seq_len: int) -> float:
        """Of queries and keys, from the scores that the indexer's loss is of.

        Its target, made of the attention's own numbers once more, is not counted.
        """
        return 2 * self._flops_per_score * self._keys_attended(seq_len)

    @property
    def _flops_per_score(self) -> int:
        return 2 * self.index_n_heads * (self.index_head_dim + 1) if self.has_indexer else 0

    def _keys_attended(self, seq_len: int) -> float:
        k = seq_len if self.is_dense(seq_len) else self.index_topk
        return (k * (k + 1) / 2 + (seq_len - k) * k) / seq_len

    def build(self, hidden_size: int, *, eps: float, init: Init) -> Dsa:
        return Dsa(self, hidden_size, eps=eps, init=init)
