"""Qwen3-MoE: Qwen3's attention; softmax over all experts, the best k, no shared expert."""

from typing import Any

from mdl.hf.decoder import (
    GQA_ROWS,
    MLP_ROWS,
    MODEL_ROWS,
    MOE_ROWS,
    NORM_ROWS,
    QK_NORM_ROWS,
    TIED_ROWS,
    grouped_query_attention,
    grouped_query_json,
    only_full_attention,
    shared,
)
from mdl.hf.fields import Fields
from mdl.hf.table import Table
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.transformer import TransformerConfig

ARCHITECTURE = "Qwen3MoeForCausalLM"
TABLE = Table(model=MODEL_ROWS, layer=NORM_ROWS + GQA_ROWS + QK_NORM_ROWS + MLP_ROWS + MOE_ROWS, tied=TIED_ROWS)


def model_config(fields: Fields) -> TransformerConfig:
    only_full_attention(fields)
    sizes = shared(fields)
    dense = dense_layers(fields, sizes["num_hidden_layers"])
    experts = MoeConfig(
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_shared_experts=0,
        router=RouterConfig(
            # Newer files call it num_local_experts.
            n_routed_experts=fields.integer("num_experts" if fields.has("num_experts") else "num_local_experts"),
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=fields.flag("norm_topk_prob", False),
            routed_scaling_factor=1.0,
        ),
    )
    return TransformerConfig(
        **sizes,
        attention=grouped_query_attention(fields, qk_norm=True),
        mlp=MlpConfig(intermediate_size=fields.integer("intermediate_size")),
        moe=experts if dense < sizes["num_hidden_layers"] else None,
        first_k_dense_replace=dense,
    )


def config_json(config: TransformerConfig) -> dict[str, Any]:
    if config.moe is None:
        raise ValueError("moe is None, MoeConfig here")
    router = config.moe.router
    return grouped_query_json(config) | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.num_prefix_layers)),
        "moe_intermediate_size": config.moe.moe_intermediate_size,
        "norm_topk_prob": router.norm_topk_prob,
        "num_experts": router.n_routed_experts,
        "num_experts_per_tok": router.num_experts_per_tok,
        "use_sliding_window": False,
    }


def dense_layers(fields: Fields, num_layers: int) -> int:
    """How many leading layers are dense; ValueError if dense layers stand anywhere else."""
    step, named = fields.integer("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
    if step < 1:
        raise fields.refusal("decoder_sparse_step", "at least 1 is expected")
    dense = [layer for layer in range(num_layers) if layer in named or (layer + 1) % step]
    if dense != list(range(len(dense))):
        field = "mlp_only_layers" if step == 1 else "decoder_sparse_step"
        raise fields.refusal(field, f"layers {dense} would be dense; only the first layers may be")
    return len(dense)
