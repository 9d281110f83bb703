"""Parameters, floating-point operations and cache bytes of a model, from its config alone; no array is made."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
    params = dict(PureModel(config).abstract()["params"])
    embedding = math.prod(params.pop("embedding").shape)
    head = math.prod(params.pop("head").shape) if "head" in params else embedding
    modules = params.pop("mtp", {})
    depth = len(modules) if mtp else 0
    matrices, experts = _count(_matrices(params))
    module_matrices, module_experts = _count(_matrices(modules)) if mtp else (0, 0)
    used = matrices + module_matrices - (experts + module_experts) * _idle_share(config) + head * (1 + depth)

    layers = [*range(config.num_hidden_layers), *(0,) * depth]
    return 2 * used + sum(config.attention_of(layer).flops_per_query(seq_len) for layer in layers)


def train_flops_per_token(config: TransformerConfig, seq_len: int) -> float:
    """Forward and backward: three forward passes. Recomputation (remat) is not counted, so MFU shows its cost."""
    return 3 * forward_flops_per_token(config, seq_len)


def _matrices(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if "norm" not in str(path[-2]) else jax.ShapeDtypeStruct((0,), leaf.dtype), params
    )


def cache_bytes_per_token(config: TransformerConfig) -> int:
    """Bytes of key-value cache per token over all layers."""
    width = sum(config.attention_of(layer).cache_width for layer in range(config.num_hidden_layers))
    return width * jnp.dtype(config.precision.compute).itemsize
