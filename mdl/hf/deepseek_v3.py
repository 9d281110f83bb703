"""DeepSeek-V3, R1, V3.1, and Kimi-K2, whose files call it kimi_k2: MLA, sigmoid router with bias, shared experts, MTP.

MTP module k is stored as layer num_hidden_layers + k, with copies of embedding and head that nobody reads back.
"""

from typing import Any

from mdl.attention.mla import MlaConfig
from mdl.hf.decoder import MLP_ROWS, MODEL_ROWS, MOE_ROWS, NORM_ROWS, TIED_ROWS, shared, shared_json
from mdl.hf.fields import Fields
from mdl.hf.rope import rope
from mdl.hf.table import Row, Table
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.transformer import TransformerConfig

MLA_ROWS = (
    Row("self_attn.q_proj.weight", "attention/q_proj/weight", "(NK)D -> DNK"),
    Row("self_attn.q_a_proj.weight", "attention/q_a_proj/weight", "QD -> DQ"),
    Row("self_attn.q_a_layernorm.weight", "attention/q_a_norm/weight", "Q -> Q"),
    Row("self_attn.q_b_proj.weight", "attention/q_b_proj/weight", "(NK)Q -> QNK"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_a_proj/weight", "CD -> DC"),
    Row("self_attn.kv_a_layernorm.weight", "attention/kv_a_norm/weight", "C -> C"),
    Row("self_attn.kv_b_proj.weight", "attention/kv_b_proj/weight", "(NK)C -> CNK"),
    Row("self_attn.o_proj.weight", "attention/o_proj/weight", "D(NU) -> NUD"),
)
SHARED_EXPERT_ROWS = (
    Row("mlp.shared_experts.gate_proj.weight", "mlp/shared_experts/gate_proj/weight", "FD -> DF"),
    Row("mlp.shared_experts.up_proj.weight", "mlp/shared_experts/up_proj/weight", "FD -> DF"),
    Row("mlp.shared_experts.down_proj.weight", "mlp/shared_experts/down_proj/weight", "DF -> FD"),
)
ARCHITECTURE = "DeepseekV3ForCausalLM"
TABLE = Table(
    model=MODEL_ROWS,
    layer=(
        *NORM_ROWS,
        *MLA_ROWS,
        *MLP_ROWS,
        *MOE_ROWS,
        Row("mlp.gate.e_score_correction_bias", "mlp/router/bias", "E -> E"),
        *SHARED_EXPERT_ROWS,
    ),
    mtp=(
        Row("enorm.weight", "embedding_norm/weight", "D -> D"),
        Row("hnorm.weight", "hidden_norm/weight", "D -> D"),
        Row("eh_proj.weight", "eh_proj/weight", "MD -> DM"),
        Row("shared_head.norm.weight", "norm/weight", "D -> D"),
    ),
    mtp_copies=(
        Row("embed_tokens.weight", "embedding", "VD -> VD", is_copy=True),
        Row("shared_head.head.weight", "head", "VD -> DV", is_copy=True),
    ),
    tied=TIED_ROWS,
    tied_mtp=(Row("shared_head.head.weight", "embedding", "VD -> VD", is_copy=True),),
)


def model_config(fields: Fields, *, dense_layers: int | None = None) -> TransformerConfig:
    """dense_layers: how many come first, where another field than first_k_dense_replace decides it."""
    fields.only("topk_method", "noaux_tc")
    fields.only("scoring_func", "sigmoid")
    router = RouterConfig(
        **router_sizes(fields),
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )
    modules = fields.integer("num_nextn_predict_layers", 0)
    return transformer(
        fields,
        router,
        rope_interleave=fields.flag("rope_interleave", True),
        mtp=MtpConfig(num_nextn_predict_layers=modules) if modules else None,
        dense_layers=dense_layers,
    )


def config_json(config: TransformerConfig) -> dict[str, Any]:
    if config.mtp and config.moe is None:
        raise ValueError("moe is None, MoeConfig here for the MTP modules")
    modules = config.mtp.num_nextn_predict_layers if config.mtp else 0
    return transformer_json(config) | {"num_nextn_predict_layers": modules}


def router_sizes(fields: Fields, groups: int | None = None) -> dict[str, Any]:
    """`groups` is the number of groups, and of those that a token may use, of files that leave them out."""
    return {
        "n_routed_experts": fields.integer("n_routed_experts"),
        "num_experts_per_tok": fields.integer("num_experts_per_tok"),
        "n_group": fields.integer("n_group", groups),
        "topk_group": fields.integer("topk_group", groups),
    }


def transformer(
    fields: Fields,
    router: RouterConfig,
    *,
    rope_interleave: bool,
    mtp: MtpConfig | None,
    dense_layers: int | None = None,
) -> TransformerConfig:
    """The config of a V2 or V3 model around its router."""
    sizes = shared(fields)
    heads, rotary = fields.integer("num_attention_heads"), fields.integer("qk_rope_head_dim")
    head_dim = fields.integer("qk_nope_head_dim") + rotary
    fields.only("num_key_value_heads", heads)
    fields.only("head_dim", rotary)  # in these files the rotary width, not that of a head
    fields.only("qk_head_dim", head_dim)
    fields.only("moe_layer_freq", 1)
    stated = fields.integer("first_k_dense_replace", 0)
    dense = stated if dense_layers is None else dense_layers
    experts = MoeConfig(
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        n_shared_experts=fields.integer("n_shared_experts", 0),
        router=router,
    )
    return TransformerConfig(
        **sizes,
        attention=MlaConfig(
            num_attention_heads=heads,
            q_lora_rank=fields.optional_integer("q_lora_rank"),
            kv_lora_rank=fields.integer("kv_lora_rank"),
            qk_nope_head_dim=head_dim - rotary,
            qk_rope_head_dim=rotary,
            v_head_dim=fields.integer("v_head_dim"),
            rope_interleave=rope_interleave,
            rope=rope(fields),
        ),
        mlp=MlpConfig(intermediate_size=fields.integer("intermediate_size")),
        moe=experts if dense < sizes["num_hidden_layers"] else None,
        first_k_dense_replace=dense,
        mtp=mtp,
    )


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """What `transformer` and the readers of the router read; these refuse what their family does not have."""
    attention, moe = config.attention, config.moe or MoeConfig()  # whose fields are needed even if no layer has experts
    if type(attention) is not MlaConfig:  # a subclass has numbers of its own
        raise ValueError(f"attention is {type(attention).__name__}, MlaConfig here")
    return shared_json(config, attention) | {
        "first_k_dense_replace": config.num_prefix_layers if config.moe else config.num_hidden_layers,
        "kv_lora_rank": attention.kv_lora_rank,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": moe.router.n_group,
        "n_routed_experts": moe.router.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "norm_topk_prob": moe.router.norm_topk_prob,
        "num_experts_per_tok": moe.router.num_experts_per_tok,
        "num_key_value_heads": attention.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "rope_interleave": attention.rope_interleave,
        "routed_scaling_factor": moe.router.routed_scaling_factor,
        "scoring_func": moe.router.scoring_func,
        "topk_group": moe.router.topk_group,
        "topk_method": moe.router.topk_method,
        "v_head_dim": attention.v_head_dim,
    }
