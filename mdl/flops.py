"""Parameters, floating-point operations and cache bytes of a model, from its config alone; no array is made."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdl.attention.dsa import DsaConfig
from mdl.block import AttentionConfig
from mdl.pure import PureModel
from mdl.transformer import TransformerConfig


class ParameterCount(NamedTuple):
    """total: every parameter of the main model, embedding and head included, MTP modules and router biases not.
    active: those that one token uses: total less the routed experts that it does not visit.
    mtp: the MTP modules' own parameters (embedding and head are shared with the main model).
    """

    total: int
    active: int
    mtp: int


def _count(tree: Any) -> tuple[int, int]:
    """(all parameters, those of routed experts) of a parameter tree."""
    everything = experts = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        everything += math.prod(leaf.shape)
        experts += math.prod(leaf.shape) if jax.tree_util.DictKey("experts") in path else 0
    return everything, experts


def _idle_share(config: TransformerConfig) -> float:
    router = config.moe.router if config.moe else None
    return 1 - router.num_experts_per_tok / router.n_routed_experts if router else 0.0


def count_parameters(config: TransformerConfig) -> ParameterCount:
    params = dict(PureModel(config).abstract()["params"])
    mtp, _ = _count(params.pop("mtp", {}))
    total, experts = _count(params)
    return ParameterCount(total, total - round(experts * _idle_share(config)), mtp)


def forward_flops_per_token(config: TransformerConfig, seq_len: int, *, mtp: bool = True) -> float:
    """Operations of a forward pass per token, a multiply and an add counted as two.

    2 x (parameters in matrix products that a token uses: the head once, and once more per MTP depth; not the embedding lookup,
    norms and idle experts) + what each attention layer does with a query and its keys, of which a causal one sees (T + 1) / 2
    on average.
    """
    return sum(product.flops for product in _products(config, seq_len) if mtp or product.part != "mtp")


def train_flops_per_token(
    config: TransformerConfig, seq_len: int, trains: Callable[[str], bool] = lambda path: True
) -> float:
    """Forward and backward, where all is trained three forward passes; `trains` says of which parameter paths that is so.

    A product has a gradient for each operand, as many operations as it: for a parameter that is trained, and for activations that
    anything trained lies before; what indexers read gets none. Recomputation (remat) is not counted, so MFU shows its cost.
    """
    params = jax.tree_util.tree_leaves_with_path(PureModel(config).abstract()["params"])
    trained = {path for path in (_spell(path) for path, _ in params) if trains(path)}
    parts_of = {path: path.partition("/")[0] for path in trained}
    indexers = {part for path, part in parts_of.items() if "/indexer/" in path}
    others = {part for path, part in parts_of.items() if "/indexer/" not in path}

    def gradients(product: _Product) -> int:
        before = _PARTS[: _PARTS.index(product.part) + 1]
        return (product.parameter in trained) + product.activations * (not others.isdisjoint(before))

    scores = (
        attention.index_gradient_flops_per_query(seq_len)
        for part, attention in _attentions(config)
        if isinstance(attention, DsaConfig) and part in indexers
    )
    return sum(product.flops * (1 + gradients(product)) for product in _products(config, seq_len)) + sum(scores)


# What parameters lie in, in the order of a forward pass. Gradients come down to the first part that is trained.
_PARTS = ("embedding", "prefix", "stack", "final_norm", "mtp")


class _Product(NamedTuple):
    part: str  # that it is in, or behind
    flops: float  # of a token in a forward pass
    parameter: str | None = None  # path of the operand that is one
    activations: int = 1  # operands that gradients pass through


def _products(config: TransformerConfig, seq_len: int) -> list[_Product]:
    depth = config.mtp.num_nextn_predict_layers if config.mtp else 0
    head, found = "embedding" if config.tie_word_embeddings else "head", []
    for path, leaf in jax.tree_util.tree_leaves_with_path(PureModel(config).abstract()["params"]):
        spelled, flops = _spell(path), 2.0 * math.prod(leaf.shape)
        *modules, _ = spelled.split("/")
        if spelled == head:
            found += [_Product("final_norm", flops, head), *[_Product("mtp", flops, head)] * depth]
        elif modules and "norm" not in modules[-1]:
            flops *= 1 - _idle_share(config) if "experts" in modules else 1
            found.append(_Product(modules[0], flops, spelled, activations=int("indexer" not in modules)))
    for part, attention in _attentions(config):
        found.append(_Product(part, attention.flops_per_query(seq_len), activations=2))
        if isinstance(attention, DsaConfig):
            found.append(_Product(part, attention.index_flops_per_query(seq_len), activations=0))
    return found


def _attentions(config: TransformerConfig) -> list[tuple[str, AttentionConfig]]:
    """The part and the attention of every layer."""
    layers = range(config.num_hidden_layers)
    found = [("prefix" if i < config.num_prefix_layers else "stack", config.attention_of(i)) for i in layers]
    return found + [("mtp", config.attention_of(0))] * (config.mtp.num_nextn_predict_layers if config.mtp else 0)


def _spell(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cache_bytes_per_token(config: TransformerConfig) -> int:
    """Bytes of key-value cache per token over all layers."""
    itemsize = jnp.dtype(config.precision.compute).itemsize
    return sum(config.attention_of(layer).cache_bytes(itemsize) for layer in range(config.num_hidden_layers))
