"""config.json: every field that changes numbers is honoured or refused by name."""

import json
import pathlib

import pytest

from mdl import hf
from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.hf import deepseek_v3, fp8
from mdl.rope import Llama3RopeConfig, RopeConfig, YarnConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}


def config_of(variant: str, **changes):
    config_json = json.loads((GOLDEN / variant / "config.json").read_text()) | changes
    return hf.model_config(config_json)


# ---- published files

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_deepseek_v3_as_published():
    config = hf.model_config(DEEPSEEK_V3)
    assert config.hidden_size == 7168 and config.num_hidden_layers == 61 and config.first_k_dense_replace == 3
    assert config.attention == MlaConfig(
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=YarnConfig(mscale=1.0, mscale_all_dim=1.0),
    )
    assert config.moe is not None and config.moe.router.routed_scaling_factor == 2.5
    assert config.moe.router.n_group == 8 and config.moe.router.topk_group == 4
    assert config.mtp is not None and config.mtp.num_nextn_predict_layers == 1
    assert config.precision.param == config.precision.compute == "bfloat16"


GLM = json.loads((GOLDEN / "glm_moe_dsa" / "config.json").read_text())
OF_ITS_OWN = {name: value for name, value in GLM.items() if name != "indexer_types"}


@pytest.mark.parametrize(
    ("fields", "letters"),
    [
        (GLM, "FFSSF"),
        (OF_ITS_OWN, "FFFFF"),
        (OF_ITS_OWN | {"index_topk_pattern": "FSFSS"}, "FSFSS"),
        (OF_ITS_OWN | {"index_topk_freq": 2}, "FFSFS"),
        (OF_ITS_OWN | {"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSS"),
        (GLM | {"index_topk_freq": 4}, "FFSSF"),  # the list decides
    ],
)
def test_which_layers_share_an_indexer(fields, letters):
    attention = hf.model_config(fields).attention
    assert isinstance(attention, DsaConfig) and attention.indexer_rope_interleave
    types = tuple({"F": "full", "S": "shared"}[letter] for letter in letters)
    assert attention.indexer_types == (None if set(letters) == {"F"} else types)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("indexer_types", ["shared", "full", "full", "full", "full"]),
        ("indexer_types", ["full", "shared"]),
        ("indexer_types", ["full", "full", "none", "full", "full"]),
        ("indexer_rope_interleave", False),
    ],
)
def test_indexers_that_cannot_be(field, value):
    with pytest.raises(ValueError, match=rf"config\.json: {field}="):
        hf.model_config(GLM | {field: value})


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3"])
def test_kimi_k2_is_a_deepseek_v3(model_type):
    config_json = DEEPSEEK_V3 | {
        "model_type": model_type,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "n_group": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "quantization_config": fp8.quantization_config(),
        "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
        "vocab_size": 163840,
    }
    config = hf.model_config(config_json)
    assert config.moe is not None and config.moe.router.n_routed_experts == 384 and config.mtp is None
    assert config.attention.rope == YarnConfig(
        rope_theta=5e4, factor=32.0, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0
    )
    assert hf.family(config_json) is deepseek_v3


def test_qwen3_30b_a3b_as_published():
    config = hf.model_config(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert config.attention == GqaConfig(
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, qk_norm=True, rope=RopeConfig(rope_theta=1e6)
    )
    assert config.moe is not None and config.moe.n_shared_experts == 0 and config.num_prefix_layers == 0


def test_llama_3_2_1b_as_published():
    config = hf.model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        }
    )
    assert config.tie_word_embeddings and config.moe is None and config.rms_norm_eps == 1e-5
    assert config.attention.rope == Llama3RopeConfig(rope_theta=5e5, factor=32.0)


# ---- fields that are honoured


def test_head_dim_defaults():
    assert config_of("llama", head_dim=None).attention.head_dim == 16  # hidden_size / heads
    assert config_of("qwen3_untied", head_dim=None).attention.head_dim == 128  # the family's default


def test_yarn_fields_reach_the_model():
    rope = config_of("qwen3_untied", rope_parameters=YARN | {"attention_factor": 1.5, "beta_fast": 16}).attention.rope
    assert rope == YarnConfig(
        rope_theta=1e4, factor=4.0, original_max_position_embeddings=128, beta_fast=16.0, attention_factor=1.5
    )
    assert rope.table_factor == 1.5


def test_yarn_without_original_length_takes_the_length_of_the_model():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    rope = config_of("qwen3_untied", rope_parameters=yarn).attention.rope
    assert rope == YarnConfig(factor=4.0, original_max_position_embeddings=512)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({"mlp_only_layers": []}, 0),
        ({"mlp_only_layers": [1, 0]}, 2),
        ({"mlp_only_layers": [], "decoder_sparse_step": 3}, 2),
    ],
)
def test_dense_layers_of_qwen3_moe(changes, dense):
    assert config_of("qwen3_moe", **changes).num_prefix_layers == dense


def test_all_layers_dense():
    assert config_of("qwen3_moe", mlp_only_layers=[0, 1, 2]).moe is None
    assert config_of("deepseek_v3", first_k_dense_replace=3).moe is None


@pytest.mark.parametrize(("dtype", "used"), [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")])
def test_dtype(dtype, used):
    assert config_of("llama", dtype=dtype).precision.compute == used
    assert config_of("llama", dtype=None, torch_dtype=dtype).precision.compute == used


# ---- fields in which published files differ, in every family

MLA = ["deepseek_v3", "deepseek_v2_lite", "deepseek_v32"]
EVERY = [*MLA, "llama", "qwen3_untied", "qwen3_moe"]


def attention(config):
    return getattr(config.attention, "dense", config.attention)  # V3.2 wraps it


def router(config):
    return config.moe.router


# field, value, the variants that honour it, where their model says so; the others refuse it, unless it is off
HONOURED = [
    ("attention_bias", True, [], None),
    ("tie_word_embeddings", True, EVERY, lambda config: config.tie_word_embeddings),
    ("rope_interleave", True, MLA, lambda config: attention(config).rope_interleave),
    ("rope_interleave", False, ["deepseek_v3"], lambda config: attention(config).rope_interleave),
    ("norm_topk_prob", True, ["deepseek_v3", "deepseek_v32", "qwen3_moe"], lambda c: router(c).norm_topk_prob),
    ("norm_topk_prob", False, [*MLA, "qwen3_moe"], lambda config: router(config).norm_topk_prob),
    ("topk_method", "noaux_tc", ["deepseek_v3", "deepseek_v32"], lambda config: router(config).topk_method),
    ("topk_method", "greedy", ["deepseek_v2_lite"], lambda config: router(config).topk_method),
    ("topk_method", "group_limited_greedy", ["deepseek_v2_lite"], lambda config: router(config).topk_method),
]


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize(("field", "value", "honoured", "place"), HONOURED)
def test_honoured_or_refused_in_every_family(variant, field, value, honoured, place):
    if variant in honoured:
        assert place(config_of(variant, **{field: value})) == value
    elif value is False and variant not in MLA:
        assert config_of(variant, **{field: value}) == config_of(variant)  # they have no such thing
    else:
        with pytest.raises(ValueError, match=rf"config\.json: {field}="):
            config_of(variant, **{field: value})


@pytest.mark.parametrize("variant", EVERY)
def test_attention_factor_in_every_family(variant):
    config = config_of(variant, rope_parameters=YARN | {"attention_factor": 1.5})
    assert attention(config).rope.table_factor == 1.5


def test_groups_may_be_absent_where_they_mean_nothing():
    assert config_of("deepseek_v2_lite", n_group=None, topk_group=None) == config_of("deepseek_v2_lite")


# ---- fields that are refused

REFUSED = [
    ("llama", "mlp_bias", True),
    ("llama", "hidden_act", "gelu"),
    ("llama", "attention_dropout", 0.1),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llama", "sliding_window", 4096),
    ("llama", "logit_scale", 0.0625),
    ("llama", "vocab_size", "256"),
    ("llama", "vocab_size", True),
    ("llama", "vocab_size", None),
    ("llama", "rms_norm_eps", "1e-5"),
    ("llama", "tie_word_embeddings", 1),
    ("llama", "dtype", "int8"),
    ("llama", "model_type", "mamba"),
    ("llama", "quantization_config", "fp8"),
    ("qwen3_untied", "use_sliding_window", True),
    ("qwen3_untied", "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    ("qwen3_moe", "mlp_only_layers", [1]),
    ("qwen3_moe", "decoder_sparse_step", 2),
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("deepseek_v3", "scoring_func", "softmax"),
    ("deepseek_v3", "num_key_value_heads", 2),
    ("deepseek_v3", "head_dim", 40),
    ("deepseek_v3", "moe_layer_freq", 2),
    ("deepseek_v2_lite", "scoring_func", "sigmoid"),
]


@pytest.mark.parametrize(("variant", "field", "value"), REFUSED)
def test_refused(variant, field, value):
    with pytest.raises(ValueError, match=rf"config\.json: {field}=") as error:
        config_of(variant, **{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_type", "longrope"),
        ("type", "dynamic"),
        ("truncate", False),
        ("factor", None),
        ("short_factor", [1.0]),
        ("beta_fast", "32"),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_refused_rotary_settings(field, value):
    with pytest.raises(ValueError, match=rf"rope_parameters: (rope_)?{field}="):
        config_of("qwen3_untied", rope_parameters=YARN | {field: value})


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="topk_group=5"):
        config_of("deepseek_v3", topk_group=5)


def test_harmless_and_switched_off_fields_pass():
    assert config_of("llama", use_cache=False, bos_token_id=[1, 2], some_new_switch=False, another=None)
