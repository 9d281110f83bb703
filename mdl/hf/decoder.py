"""What the families share: the fields and tensors of a pre-norm decoder with SwiGLU layers and, in some, experts."""

from typing import Any, TypedDict

from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.hf import fp8
from mdl.hf.fields import Fields, precision
from mdl.hf.rope import rope, rope_json
from mdl.hf.table import Row
from mdl.precision import PrecisionConfig
from mdl.transformer import TransformerConfig

MODEL_ROWS = (
    Row("model.embed_tokens.weight", "embedding", "VD -> VD"),
    Row("model.norm.weight", "final_norm/weight", "D -> D"),
    Row("lm_head.weight", "head", "VD -> DV"),
)
# Some files hold a tied head all the same; the published code ties it after loading, whatever the file says.
TIED_ROWS = (Row("lm_head.weight", "embedding", "VD -> VD", is_copy=True, is_written=False),)
NORM_ROWS = (
    Row("input_layernorm.weight", "attention_norm/weight", "D -> D"),
    Row("post_attention_layernorm.weight", "mlp_norm/weight", "D -> D"),
)
MLP_ROWS = (
    Row("mlp.gate_proj.weight", "mlp/gate_proj/weight", "FD -> DF"),
    Row("mlp.up_proj.weight", "mlp/up_proj/weight", "FD -> DF"),
    Row("mlp.down_proj.weight", "mlp/down_proj/weight", "DF -> FD"),
)
MOE_ROWS = (
    Row("mlp.gate.weight", "mlp/router/weight", "ED -> DE"),
    Row("mlp.experts.{expert}.gate_proj.weight", "mlp/experts/gate_EDF", "FD -> DF"),
    Row("mlp.experts.{expert}.up_proj.weight", "mlp/experts/up_EDF", "FD -> DF"),
    Row("mlp.experts.{expert}.down_proj.weight", "mlp/experts/down_EFD", "DF -> FD"),
)
GQA_ROWS = (
    Row("self_attn.q_proj.weight", "attention/q_proj/weight", "(NK)D -> DNK"),
    Row("self_attn.k_proj.weight", "attention/k_proj/weight", "(ZK)D -> DZK"),
    Row("self_attn.v_proj.weight", "attention/v_proj/weight", "(ZK)D -> DZK"),
    Row("self_attn.o_proj.weight", "attention/o_proj/weight", "D(NK) -> NKD"),
)
QK_NORM_ROWS = (
    Row("self_attn.q_norm.weight", "attention/q_norm/weight", "K -> K"),
    Row("self_attn.k_norm.weight", "attention/k_norm/weight", "K -> K"),
)


class Shared(TypedDict):
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    precision: PrecisionConfig


def shared(fields: Fields) -> Shared:
    """The fields of a TransformerConfig that every family spells alike; refuses what no family of ours has."""
    fp8.check_config(fields)
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("attention_dropout", 0.0, 0)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers"),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "initializer_range": fields.number("initializer_range", 0.02),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "precision": precision(fields),
    }


def shared_json(config: TransformerConfig, attention: GqaConfig | MlaConfig) -> dict[str, Any]:
    """What `shared` reads, the dense layers and the rotary settings."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.mlp.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": attention.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.precision.param,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **rope_json(attention.rope),
    }


def grouped_query_attention(fields: Fields, *, qk_norm: bool, head_dim: int | None = None) -> GqaConfig:
    """`head_dim` is the family's default for files without the field; None stands for hidden_size / heads."""
    heads = fields.integer("num_attention_heads")
    return GqaConfig(
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", head_dim or fields.integer("hidden_size") // heads),
        qk_norm=qk_norm,
        rope=rope(fields),
    )


def grouped_query_json(config: TransformerConfig) -> dict[str, Any]:
    """What `shared` and `grouped_query_attention` read. ValueError for a model with another attention."""
    attention = config.attention
    if type(attention) is not GqaConfig:  # a subclass has numbers of its own
        raise ValueError(f"attention is {type(attention).__name__}, GqaConfig here")
    return shared_json(config, attention) | {
        "head_dim": attention.head_dim,
        "num_key_value_heads": attention.num_key_value_heads,
    }


def only_full_attention(fields: Fields) -> None:
    """Refuses windows. `sliding_window` alone means nothing in Qwen3: `use_sliding_window` switches it on."""
    fields.only("use_sliding_window", False)
    fields.ignore("sliding_window")
    layers = fields.texts("layer_types")
    if any(kind != "full_attention" for kind in layers):
        raise fields.refusal("layer_types", "only full_attention is supported")
