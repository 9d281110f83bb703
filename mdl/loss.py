"""The training objective: next-token cross-entropy, MTP, balance and z-loss, as sums over the batch and global counts.

Every term is a sum over tokens (or rows) divided by a count over the whole optimizer step, so that any split into micro-batches
and devices gives the same loss and gradient.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas import linear_cross_entropy
from mdl import sharding
from mdl.attention.selection import IndexerStats
from mdl.transformer import Transformer, shift_left


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """lambda of the MTP loss (V3 report, eq. 25), alpha of the balance loss (eq. 17), weights of the z-loss and of the loss of
    indexers (V3.2-Exp report, eqs. 3 and 4), for which nothing is computed if it is 0."""

    mtp: Any = 0.0
    balance: Any = 0.0
    z: float = 0.0
    indexer: float = 0.0


class Counts(NamedTuple):
    """What the sums are divided by, over the whole optimizer step."""

    tokens: jax.Array  # all that the model reads: not padding, nor the last token of a full row
    targets: jax.Array  # valid next-token targets
    mtp_targets: tuple[jax.Array, ...]  # valid targets of each MTP depth
    rows: jax.Array  # rows with any token


class Terms(NamedTuple):
    """The loss and its parts; each a mean over the counts once summed over micro-batches. `loads` feeds the router biases,
    `dropped` has the choices among them that found no room on their way to the expert."""

    loss: jax.Array
    main: jax.Array
    mtp: tuple[jax.Array, ...]
    balance: jax.Array
    z: jax.Array
    indexer: IndexerStats | None  # of each layer, [L], those of the MTP modules last; None unless they have a weight
    loads: dict[str, jax.Array]
    dropped: dict[str, jax.Array]


def targets_at_depth(tokens: jax.Array, segment_ids: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """From [..., T + 1]: token t + 1 + depth and whether it counts, [..., T] each.

    A target counts if t to t + 1 + depth lie in one document; padding (segment 0) never does.
    """
    ahead, valid = segment_ids, segment_ids > 0
    for _ in range(1 + depth):
        tokens, ahead = shift_left(tokens), shift_left(ahead)
        valid &= ahead == segment_ids
    return tokens[..., :-1], valid[..., :-1]


def count_targets(segment_ids_ABT: jax.Array, mtp_depth: int) -> Counts:
    """Counts of a whole step from its segment ids [A, B, T + 1]; each at least 1."""

    def valid(depth: int) -> jax.Array:
        return at_least_one(targets_at_depth(segment_ids_ABT, segment_ids_ABT, depth)[1])

    def at_least_one(flags: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.sum(flags, dtype=jnp.float32), 1)

    rows = at_least_one(jnp.any(segment_ids_ABT > 0, axis=-1))
    tokens = at_least_one(segment_ids_ABT[..., :-1] > 0)
    return Counts(tokens, valid(0), tuple(valid(k + 1) for k in range(mtp_depth)), rows)


class CrossEntropy(NamedTuple):
    """Sums over valid targets; only `loss` carries gradients."""

    loss: jax.Array  # of -log p(target) + z_loss * log(Z)^2
    nll: jax.Array  # of -log p(target)
    z: jax.Array  # of log(Z)^2


def cross_entropy(
    model: Transformer, hidden_BTD: jax.Array, target_BT: jax.Array, valid_BT: jax.Array, *, z_loss: float = 0.0
) -> CrossEntropy:
    """The loss of the output head, computed in chunks: [B, T, V] logits never exist."""
    tied, weight = model.head is None, model.head_parameter

    def sums(hidden_btD, w, target_bt, valid_bt):
        weight_m = valid_bt.reshape(-1)
        loss, aux = linear_cross_entropy(
            hidden_btD.reshape(-1, hidden_btD.shape[-1]),
            sharding.gather(w, hidden_btD.dtype, *weight.axes),
            target_bt.reshape(-1),
            weight_m,
            z_loss=z_loss,
            vocab_first=tied,
            axis_name="tensor" if sharding.mesh_is_set() else None,
        )
        parts = CrossEntropy(loss, jnp.sum(aux.nll_M * weight_m), jnp.sum(jnp.square(aux.lse_M) * weight_m))
        return jax.lax.psum(parts, sharding.ROWS) if sharding.mesh_is_set() else parts

    rows = sharding.spec("batch", None)
    return sharding.local(
        sums,
        in_specs=(sharding.spec("batch", None, None), sharding.spec(*weight.axes), rows, rows),
        out_specs=P(),
        vary=sharding.ROWS,  # along `tensor` only the vocabulary is split; the op sums over it
    )(hidden_BTD, weight[...], target_BT, valid_BT.astype(jnp.float32))


def loss_terms(
    model: Transformer,
    batch: dict[str, jax.Array],
    weights: LossWeights,
    counts: Counts,
) -> Terms:
    """The loss of one micro-batch {tokens, segment_ids, positions}, each [B, T + 1], already divided by the step's counts."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    positions_BT, segment_ids_BT = batch["positions"][:, :-1], segment_ids[:, :-1]
    measure = "loss" if weights.indexer else "nothing"
    output = model(tokens[:, :-1], positions_BT, segment_ids_BT, measure=measure)

    target_BT, valid_BT = targets_at_depth(tokens, segment_ids, 0)
    main = cross_entropy(model, output.hidden_BTD, target_BT, valid_BT, z_loss=weights.z)
    loss = main.loss / counts.targets
    stats, indexers = {"stack": output.stats}, [_mean(output.stats.indexer, counts.tokens)]
    mtp = []
    ahead_segment_ids_BT = jnp.where(valid_BT, segment_ids_BT, 0)
    modules = model.predict_ahead(output.hidden_BTD, target_BT, positions_BT, ahead_segment_ids_BT, measure=measure)
    for k, (hidden_BTD, module_stats) in enumerate(modules):
        ahead = cross_entropy(model, hidden_BTD, *targets_at_depth(tokens, segment_ids, k + 1))
        mtp.append(ahead.nll / counts.mtp_targets[k])
        loss += weights.mtp / len(model.mtp) * ahead.loss / counts.mtp_targets[k]
        stats[f"mtp_{k}"] = module_stats
        tokens_of_module = (counts.targets, *counts.mtp_targets)[
            k
        ]  # it reads those that have a target one depth before its own
        indexers.append(_mean(jax.tree.map(lambda one: one[None], module_stats.indexer), tokens_of_module))
    experts = {name: block.experts for name, block in stats.items() if block.experts is not None}
    balance = sum((layers.balance_loss for layers in experts.values()), jnp.float32(0)) / counts.rows
    loss += weights.balance * balance
    indexer = jax.tree.map(lambda *layers: jnp.concatenate(layers), *indexers)
    if indexer is not None:
        loss += weights.indexer * jnp.sum(indexer.kl)

    loads = {name: layers.load_E for name, layers in experts.items()}
    dropped = {name: layers.dropped for name, layers in experts.items()}
    return Terms(
        loss,
        main.nll / counts.targets,
        tuple(mtp),
        balance,
        main.z / counts.targets,
        indexer,
        loads,
        dropped,
    )


def _mean(sums: IndexerStats | None, count: jax.Array) -> IndexerStats | None:
    return jax.tree.map(lambda total: total / count, sums)
