"""The train step and the evaluation step: pure functions of a state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.config import ExperimentConfig
from experiments.optim import trainable
from experiments.optim.clip import global_norm
from mdl.attention.selection import IndexerStats
from mdl.loss import LossWeights, Terms, count_targets, cross_entropy, loss_terms, targets_at_depth
from mdl.moe.router import updated_bias
from mdl.pure import PureModel, Tree
from mdl.sampling import most_likely
from mdl.transformer import Transformer, shift_left

Metrics = dict[str, jax.Array]
# Options of the compilers by platform, as `jax.default_backend()` spells it. On TPU an all-to-all is waited for where it begins,
# unless this is said: then experts and shared experts compute meanwhile.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"xla_tpu_enable_async_all_to_all": "true"}}


def init_state(config: ExperimentConfig, model: PureModel, tree: Tree | None = None) -> Tree:
    """The state of step 0, to be jitted under the mesh; with fresh parameters and buffers unless `tree` holds them."""
    tree = model.init(jax.random.key(config.seed)) if tree is None else tree
    trained, _ = trainable.split(tree["params"], config.train.trainable)
    state = {
        "step": jnp.zeros((), jnp.int32),  # optimizer steps begun, the skipped ones included
        **tree,
        "opt": config.optim.build(config.train.num_steps).init(trained),
        "skipped": jnp.zeros((), jnp.int32),  # steps skipped for a loss or gradient that was not finite
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
    }
    if config.train.ema_decay is not None:
        # In float32 whatever the parameters are: a bfloat16 average would round its small steps away.
        state["ema"] = jax.tree.map(lambda p: p.astype(jnp.float32) + 0, tree["params"])
    return state


def make_train_step(config: ExperimentConfig, model: PureModel) -> Callable[..., tuple[Tree, Metrics]]:
    """train_step(state, batch, tokens_seen) -> (state, metrics).

    batch: {tokens, segment_ids, positions} int32 [A, B, T + 1], A micro-batches; tokens_seen: float32 scalar, training tokens
    before this step, from the host's exact count. Not jitted yet: see `jit_train_step`.
    """
    optimizer = config.optim.build(config.train.num_steps)
    mtp_weight = config.loss.mtp_loss_weight and config.loss.mtp_loss_weight.build(config.train.num_steps)
    bias_speed = config.loss.bias_update_speed and config.loss.bias_update_speed.build(config.train.num_steps)
    depth = config.model.mtp.num_nextn_predict_layers if config.model.mtp else 0

    def train_step(state: Tree, batch: dict[str, jax.Array], tokens_seen: jax.Array) -> tuple[Tree, Metrics]:
        step, counts = state["step"], count_targets(batch["segment_ids"], depth)
        weights = LossWeights(
            mtp=mtp_weight(step, tokens_seen) if mtp_weight else 0.0,
            balance=config.loss.aux_loss_alpha or 0.0,
            z=config.loss.z_loss_weight or 0.0,
            indexer=config.loss.indexer_loss_weight or 0.0,
        )

        trained, frozen = trainable.split(state["params"], config.train.trainable)

        def loss(trained: Tree, micro_batch: dict[str, jax.Array]) -> tuple[jax.Array, Terms]:
            params = trainable.join(trained, frozen)
            terms = loss_terms(model.merge(params, state["buffers"]), micro_batch, weights, counts)
            return terms.loss, terms

        grads, terms = accumulate(jax.grad(loss, has_aux=True), trained, batch)
        grad_norm = global_norm(grads)
        learning_rate = optimizer.learning_rate(step, tokens_seen)
        updates, opt = optimizer.update(grads, state["opt"], trained, learning_rate=learning_rate, grad_norm=grad_norm)
        trained = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), trained, updates)
        new = {
            "params": trainable.join(trained, frozen),
            "buffers": state["buffers"],
            "opt": opt,
        }
        if bias_speed:
            new["buffers"] = move_biases(state["buffers"], terms.loads, bias_speed(step, tokens_seen))
        if config.train.ema_decay is not None:
            decay = config.train.ema_decay
            new["ema"] = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, state["ema"], new["params"])

        # A step whose loss or gradient is not finite leaves everything as it was.
        finite = jnp.isfinite(terms.loss) & jnp.isfinite(grad_norm)
        kept = {name: state[name] for name in new}
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, kept)
        new["step"] = step + 1
        new["skipped"] = state["skipped"] + ~finite
        new["skipped_in_a_row"] = jnp.where(finite, 0, state["skipped_in_a_row"] + 1)

        metrics = {
            "loss": terms.loss,
            "loss/main": terms.main,
            **{f"loss/mtp_{k + 1}": value for k, value in enumerate(terms.mtp)},
            **({"loss/balance": terms.balance} if terms.loads else {}),
            "loss/z": terms.z,
            **indexer_metrics(terms.indexer),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": new["skipped"],
            "skipped_in_a_row": new["skipped_in_a_row"],
            **load_metrics(terms.loads, terms.dropped, new["buffers"]),
        }
        return new, metrics

    return train_step


def jit_train_step(config: ExperimentConfig, model: PureModel, mesh: Mesh) -> jax.stages.Wrapped:
    """`make_train_step` as it is run on the devices of `mesh`; the state is donated."""
    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    return jax.jit(make_train_step(config, model), donate_argnums=0, compiler_options=options)


def accumulate(
    grad_fn: Callable[..., tuple[Tree, Terms]], params: Tree, batch: dict[str, jax.Array]
) -> tuple[Tree, Terms]:
    """Sums of gradients and terms over the leading micro-batch axis; the terms are already divided by the step's counts."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        return grad_fn(params, first)

    def add(total: Any, micro_batch: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, micro_batch)), None

    shapes = jax.eval_shape(grad_fn, params, first)[1]
    nothing = (
        jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, jnp.float32)), params),
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    )
    return jax.lax.scan(add, nothing, batch)[0]


def move_biases(buffers: Tree, loads: dict[str, jax.Array], speed: jax.Array) -> Tree:
    """Router biases after one optimizer step; `loads` are summed over micro-batches and devices, so the move is one per step."""

    def moved(path: jax.tree_util.KeyPath, bias: jax.Array) -> jax.Array:
        name, layer = _layers_of(path)
        return updated_bias(bias, loads[name] if layer is None else loads[name][layer], speed)

    return jax.tree_util.tree_map_with_path(moved, buffers)


def _layers_of(path: jax.tree_util.KeyPath) -> tuple[str, int | None]:
    """The name that `Terms.loads` has for the layers of a buffer, and which of them it is of; None for all."""
    first, second, *_ = (str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
    if first == "mtp":
        return f"mtp_{second}", None
    return first, int(second) if second.isdecimal() else None


def load_metrics(loads: dict[str, jax.Array], dropped: dict[str, jax.Array], buffers: Tree) -> Metrics:
    """Balance of the experts: max violation max/mean - 1, entropy of the load as a share of the uniform one's, share of choices
    that were dropped, norm of the router biases. Means over the mixture-of-experts layers, the worst violation, and each layer's
    own, those of the stack first and then the MTP modules'."""
    if not loads:
        return {}
    names = sorted(loads, key=lambda name: (name != "stack", name))
    E = loads["stack"].shape[-1]
    load_LE = jnp.concatenate([loads[name].reshape(-1, E) for name in names])
    total_L = jnp.maximum(jnp.sum(load_LE, axis=-1), 1)
    share_LE = load_LE / total_L[:, None]
    by_layer = {
        "max_violation": jnp.max(share_LE, axis=-1) * E - 1,
        "entropy": -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1) / jnp.log(E),
        "drop_rate": jnp.concatenate([dropped[name].reshape(-1) for name in names]) / total_L,
    }
    biases = {_layers_of(path): bias for path, bias in jax.tree_util.tree_leaves_with_path(buffers)}
    if biases:
        in_order = sorted(biases, key=lambda at: (names.index(at[0]), at[1] or 0))
        bias_LE = jnp.concatenate([biases[at].reshape(-1, E) for at in in_order])
        by_layer["bias_norm"] = jnp.linalg.norm(bias_LE, axis=-1)
    return {
        **{f"load/{name}": jnp.mean(values_L) for name, values_L in by_layer.items()},
        "load/worst_violation": jnp.max(by_layer["max_violation"]),
        **{f"load/by_layer/{name}": values_L for name, values_L in by_layer.items()},
    }


def indexer_metrics(means: IndexerStats | None) -> Metrics:
    """How well indexers foresee attention: its KL in nats to theirs, and to equal shares, which they must beat; what share of the
    attention to all keys the selected ones hold. The loss sums layers; the others are means, and each layer's own."""
    if means is None:
        return {}
    by_layer = {name: values_L for name, values_L in means._asdict().items() if values_L is not None}
    return {
        "loss/indexer": means.kl.sum(),
        **{f"indexer/{name}": values_L.mean() for name, values_L in by_layer.items()},
        **{f"indexer/by_layer/{name}": values_L for name, values_L in by_layer.items()},
    }


class Evaluated(NamedTuple):
    """Sums over a batch."""

    nll: jax.Array  # -log p of valid targets
    targets: jax.Array  # number of them
    tokens: jax.Array  # number that the model read
    indexer: IndexerStats | None  # of each layer [L], where the model has indexers
    mtp_right: tuple[jax.Array, ...]  # of each MTP depth: targets of which module and model expect the same token
    mtp_targets: tuple[jax.Array, ...]  # of each MTP depth: number of them


def make_eval_step(model: PureModel) -> Callable[..., Evaluated]:
    """eval_step(params, buffers, batch [B, T + 1]) -> sums."""

    def eval_step(params: Tree, buffers: Tree, batch: dict[str, jax.Array]) -> Evaluated:
        transformer = model.merge(params, buffers)
        targets, valid = targets_at_depth(batch["tokens"], batch["segment_ids"], 0)
        segment_ids = batch["segment_ids"][:, :-1]
        output = transformer(batch["tokens"][:, :-1], batch["positions"][:, :-1], segment_ids, measure="recall")
        nll = cross_entropy(transformer, output.hidden_BTD, targets, valid).nll
        num_targets, num_tokens = (jnp.sum(flags, dtype=jnp.float32) for flags in (valid, segment_ids > 0))
        right, counts = acceptance(transformer, output.hidden_BTD, batch)
        return Evaluated(nll, num_targets, num_tokens, output.stats.indexer, right, counts)

    return eval_step


def acceptance(
    model: Transformer, hidden_BTD: jax.Array, batch: dict[str, jax.Array]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """How many tokens each MTP module would have drafted right, as decoding counts it with temperature 0, and of how many.

    Module k at t and the model at t + k speak of the same token, and both have read the true ones before it.
    """
    if not model.mtp:
        return (), ()
    segment_ids = batch["segment_ids"]
    target_BT, valid_BT = targets_at_depth(batch["tokens"], segment_ids, 0)
    ahead_segment_ids_BT = jnp.where(valid_BT, segment_ids[:, :-1], 0)
    modules = model.predict_ahead(hidden_BTD, target_BT, batch["positions"][:, :-1], ahead_segment_ids_BT)
    chosen_BT = most_likely(model, hidden_BTD)
    right, counts = [], []
    for k, (ahead_BTD, _) in enumerate(modules, start=1):
        chosen_BT = shift_left(chosen_BT)
        _, counts_BT = targets_at_depth(batch["tokens"], segment_ids, k)
        is_right_BT = counts_BT & (most_likely(model, ahead_BTD) == chosen_BT)
        right.append(jnp.sum(is_right_BT, dtype=jnp.float32))
        counts.append(jnp.sum(counts_BT, dtype=jnp.float32))
    return tuple(right), tuple(counts)
