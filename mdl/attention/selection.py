"""The ops of sparse attention on local shards: keys are selected and indexers measured by queries, attention goes by heads."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from kernels_pallas import LatentCache, Mask, mla_decode, sparse_attention
from kernels_pallas.lightning_indexer import dense_kl, recall, select_keys, selected_kl, to_fp8
from kernels_pallas.lightning_indexer.api import SAVED_NAMES as INDEXER_SAVED_NAMES
from kernels_pallas.select import platform, say
from mdl import sharding

# For remat policies: the choice of keys, and what the indexer's loss keeps. To make them again takes all keys or all heads; they
# are few numbers, W of a query.
SELECTED_NAME = "selected_keys"
SAVED_NAMES = (SELECTED_NAME, *INDEXER_SAVED_NAMES)
# Keys for each selected one, up to which a CPU attends to all of them under a mask: a block with 16 heads over 512 latents, forward
# and backward, takes a fifth less time than by gathering at 4, and a tenth less at 6.
MASKED_KEYS = 6
HEADS = "tensor"  # mesh axis over which heads are split


class IndexerStats(NamedTuple):
    """What an indexer costs and is worth, summed over queries."""

    # KL of the attention, the mean over its heads, to the indexer's softmax: the loss (report, eqs. 3 and 4)
    kl: jax.Array
    uniform: jax.Array  # that of the same to equal shares, which an indexer that has learnt anything beats
    # share of the attention to all keys that the selected ones hold; None where it is not measured
    recall: jax.Array | None


class Index(NamedTuple):
    """What scores are made of: sum over heads of w * relu(q . k)."""

    q_BTIJ: jax.Array
    w_BTI: jax.Array
    k_BSJ: jax.Array
    k_scale_BS: jax.Array | None = None  # of keys in FP8, as a cache keeps them; no loss is made of these


class Main(NamedTuple):
    """The attention that an indexer serves: logits are scale * q . k, head n reading key head n // (N / Z); their logsumexp."""

    q_BTNK: jax.Array
    k_BSZK: jax.Array
    lse_BTN: jax.Array


def select(index: Index, mask: Mask, topk: int, *, fp8: bool = False) -> jax.Array:
    """index_BTW of the best visible keys, ascending, S where a query sees fewer. fp8: by scores of queries and keys in e4m3."""

    def run(index: Index, mask: Mask) -> jax.Array:
        q_btIJ, w_btI, k_bSJ, k_scale_bS = to_fp8(*index) if fp8 else index
        return select_keys(q_btIJ, w_btI, k_bSJ, mask=mask, topk=topk, k_scale_BS=k_scale_bS)

    return checkpoint_name(_by_queries(run, index=index, mask=mask), SELECTED_NAME)


def selects_by_mask(num_keys: int, topk: int) -> bool:
    """Whether tokens attend to their selected keys as dense attention does, the others hidden, and not to gathered ones.

    The mask takes MASKED_KEYS / 4 times the memory of the indices at most, so that memory grows with the length either way. Only
    on CPU was it measured, and is it done. Logged once.
    """
    by_mask = platform() == "cpu" and num_keys <= MASKED_KEYS * topk
    say(f"attention to {topk} of {num_keys} keys", "dense, under a mask" if by_mask else "gathered keys")
    return by_mask


def as_mask(index_BTW: jax.Array, num_keys: int) -> jax.Array:
    """Bool [B, T, S]: which keys are selected."""

    def run(index_btW: jax.Array) -> jax.Array:
        rows, queries, _ = index_btW.shape
        at = jnp.arange(rows)[:, None, None], jnp.arange(queries)[:, None], index_btW
        return jnp.zeros((rows, queries, num_keys), bool).at[at].set(True, mode="drop")

    rows = sharding.spec("batch")
    return sharding.local(run, in_specs=rows, out_specs=rows, vary=sharding.ROWS)(index_BTW)


def attend_selected(
    q_BTNK: jax.Array,
    k_BSZK: jax.Array,
    v_BSZU: jax.Array | None,
    index_BTW: jax.Array,
    *,
    scale: float,
    value_width: int | None,
) -> tuple[jax.Array, jax.Array]:
    """o_BTNU and lse_BTN of attention to the selected keys. Without v_BSZU the first U numbers of a key, one for all heads, are its
    value."""

    def run(q_btnK, k_bSzK, v_bSzU, index_btW):
        return sparse_attention(
            q_btnK, k_bSzK, v_bSzU, index_btW, scale=scale, value_width=value_width, return_lse=True
        )

    heads, rows = sharding.spec("batch", None, "heads"), sharding.spec("batch")
    keys = rows if v_BSZU is None else heads
    run = sharding.local(run, in_specs=(heads, keys, keys, rows), out_specs=(heads, heads))
    return run(q_BTNK, k_BSZK, v_BSZU, index_BTW)


def decode_selected(q_BTNK: jax.Array, latents: LatentCache, index_BTW: jax.Array, *, scale: float) -> jax.Array:
    """o_BTNC of queries in the width of the latents, each with a cache of its own that holds the selected ones."""

    def gathered(entry_bSX: jax.Array, index_btW: jax.Array) -> jax.Array:
        entry_btWX = jnp.take_along_axis(entry_bSX[:, None], index_btW[..., None], axis=2, mode="clip")
        return entry_btWX.reshape(-1, *entry_btWX.shape[2:])

    def run(q_btnK: jax.Array, latents: LatentCache, index_btW: jax.Array) -> jax.Array:
        q_m1nK = q_btnK.reshape(-1, 1, *q_btnK.shape[2:])
        q_m1nC, q_m1nR = jnp.split(q_m1nK, [latents.latent.shape[-1]], axis=-1)
        length_m = jnp.sum(index_btW < latents.latent.shape[1], axis=-1, dtype=jnp.int32).reshape(-1)
        chosen = LatentCache(gathered(latents.latent, index_btW), gathered(latents.rope, index_btW))
        o_m1nC, _ = mla_decode(q_m1nC, q_m1nR, chosen, length_m, scale=scale)
        return o_m1nC.reshape(*q_btnK.shape[:3], -1)

    heads, rows = sharding.spec("batch", None, "heads"), sharding.spec("batch")
    return sharding.local(run, in_specs=(heads, rows, rows), out_specs=heads)(q_BTNK, latents, index_BTW)


def kl_of_all(index: Index, main: Main, mask: Mask, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """kl_BT and uniform_BT over the visible keys. Gradients reach `index` only."""

    def run(index: Index, main: Main, mask: Mask) -> tuple[jax.Array, ...]:
        return tuple(dense_kl(*index[:3], *main, scale=scale, mask=mask))

    return _by_queries(run, index=index, main=jax.lax.stop_gradient(main), mask=mask)


def kl_of_selected(index: Index, main: Main, index_BTW: jax.Array, *, scale: float) -> tuple[jax.Array, jax.Array]:
    """The same over the selected keys, which main.lse_BTN is of."""

    def run(index: Index, main: Main, index_BTW: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(selected_kl(*index[:3], *main, index_BTW, scale=scale))

    return _by_queries(run, index=index, main=jax.lax.stop_gradient(main), index_BTW=index_BTW)


def recall_of_selected(main: Main, index_BTW: jax.Array, *, scale: float) -> jax.Array:
    """The share [B, T] of the attention to all keys, which main.lse_BTN is of, that the selected ones hold."""

    def run(main: Main, index_BTW: jax.Array) -> jax.Array:
        return recall(*main, index_BTW, scale=scale)

    return _by_queries(run, main=main, index_BTW=index_BTW)


def with_positions(mask: Mask) -> Mask:
    """The same mask, which says where queries stand, so that a part of them can be taken."""
    if mask.q_positions_BT is not None:
        return mask
    assert mask.q_segment_ids_BT is not None  # of packed rows, whose queries and keys are the same tokens
    slots_BT = jnp.broadcast_to(
        jnp.arange(mask.q_segment_ids_BT.shape[1], dtype=jnp.int32),
        mask.q_segment_ids_BT.shape,
        out_sharding=sharding.optional_sharding(sharding.spec("batch", None)),
    )
    return dataclasses.replace(mask, q_positions_BT=slots_BT, kv_positions_BS=slots_BT)


def _by_queries(run: Callable, **args: Any) -> Any:
    """`run(**args)` on each device's rows, with all heads and all keys; each device that splits heads has a share of the queries.

    What has a T in its name belongs to queries. Arrays that come back are split by rows only.
    """
    devices = sharding.axis_size(HEADS)
    T = next(leaf.shape[1] for path, leaf in jax.tree_util.tree_leaves_with_path(args) if _is_of_queries(path))
    rows, shares = sharding.spec("batch"), devices > 1 and T % devices == 0
    of_queries = P(sharding.RULES["batch"], HEADS) if shares else rows
    if shares and "mask" in args:
        args["mask"] = with_positions(args["mask"])
    specs = jax.tree_util.tree_map_with_path(lambda path, _: of_queries if _is_of_queries(path) else rows, args)
    locally = sharding.local(
        lambda args: run(**args),
        in_specs=(specs,),
        out_specs=of_queries,
        vary=sharding.AXES if shares else sharding.ROWS,
    )
    found = locally(jax.tree.map(sharding.reshard, args, specs))
    return jax.tree.map(lambda a: sharding.reshard(a, rows), found)


def _is_of_queries(path: jax.tree_util.KeyPath) -> bool:
    """Whether the name of an argument, or its last part, has a T among its dims: q_BTIJ, not k_BSJ."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return "T" in name.rpartition("_")[2]
