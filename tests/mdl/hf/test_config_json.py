"""config.json as we write it: the model comes back, and the fields are those of files that the published code wrote."""

import dataclasses
import importlib
import json
import pathlib

import pytest

from mdl import hf
from mdl.attention.dsa import DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.kernels import KernelsConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.moe.transport_ring import RingConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.rope import Llama3RopeConfig, RopeConfig, YarnConfig
from mdl.transformer import TransformerConfig

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
VARIANTS = sorted(directory.parent.name for directory in GOLDEN.glob("*/config.json"))
FULL = PrecisionConfig(param="float32", compute="float32")

# ---- against files that transformers wrote


@pytest.mark.parametrize("variant", VARIANTS)
def test_fields_are_those_of_published_files(variant):
    theirs = json.loads((GOLDEN / variant / "config.json").read_text())
    config = hf.model_config(theirs)
    ours = hf.config_json(config, bos_token_id=0, eos_token_id=1)
    assert hf.model_config(ours) == config
    json.dumps(ours)

    # The two spellings of rotary settings and dtype, and a name that has changed.
    rope = {"rope_type": "default"} | (ours.pop("rope_scaling") or {}) | {"rope_theta": ours.pop("rope_theta")}
    rope.pop("type", None)
    assert rope == theirs.pop("rope_parameters")
    assert ours.pop("torch_dtype") == theirs.pop("dtype")
    if "num_experts" in ours:
        assert ours.pop("num_experts") == theirs.pop("num_local_experts")
    # What transformers computes from other fields, does not use, or adds when it saves.
    computed = {"layer_types", "mlp_layer_types", "qk_head_dim"} | ({"head_dim"} if "qk_head_dim" in theirs else set())
    unused = {"max_window_layers", "output_router_logits", "pad_token_id", "pretraining_tp", "router_aux_loss_coef"}
    added = {"quantization_config", "sliding_window", "transformers_version"}
    not_in_every_family = {"mlp_bias"} - ours.keys()
    theirs = {
        name: value for name, value in theirs.items() if name not in computed | unused | added | not_in_every_family
    }
    assert {name: ours[name] for name in theirs} == theirs


# ---- our models come back


def without_how(config: TransformerConfig) -> TransformerConfig:
    """What a config.json does not say: how to compute."""
    moe = config.moe and dataclasses.replace(config.moe, transport=RingConfig())
    return dataclasses.replace(config, moe=moe, scan_layers=True, remat="none", precision=FULL)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("tiny", "deepseek_v3"),
        ("tiny_dense", "qwen3"),
        ("moe_1b", "deepseek_v3"),
        ("deepseek_v2_lite", "deepseek_v2"),
        ("deepseek_v3", "deepseek_v3"),
    ],
)
def test_configs_of_the_repository(name, model_type):
    config = importlib.import_module(f"configs.{name}").get_config().model
    fields = hf.config_json(config)
    assert fields["model_type"] == model_type
    back = hf.model_config(fields)
    if config.moe is None:  # then it says nothing
        back = dataclasses.replace(back, first_k_dense_replace=config.first_k_dense_replace)
    assert without_how(back) == without_how(config)
    assert back.precision.param == config.precision.param


YARN = YarnConfig(rope_theta=5e5, factor=7.5, original_max_position_embeddings=99, beta_fast=31, beta_slow=2)
V2_ROUTER = RouterConfig(
    scoring_func="softmax", topk_method="group_limited_greedy", n_group=4, topk_group=2, norm_topk_prob=False
)
QWEN_ROUTER = RouterConfig(
    scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0
)
QWEN = {"attention": GqaConfig(qk_norm=True, rope=RopeConfig(rope_theta=1e6)), "precision": FULL}
MODELS = {
    "defaults": ("deepseek_v3", {}),
    "kernels": ("deepseek_v3", {"kernels": KernelsConfig(flash_attention="pallas")}),
    "direct queries": ("deepseek_v3", {"attention": MlaConfig(q_lora_rank=None, rope_interleave=False)}),
    "yarn": ("deepseek_v3", {"attention": MlaConfig(rope=YARN)}),
    "yarn with mscale": (
        "deepseek_v3",
        {"attention": MlaConfig(rope=dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=0.9))},
    ),
    "yarn with its factor": (
        "deepseek_v3",
        {"attention": MlaConfig(rope=dataclasses.replace(YARN, attention_factor=1.25))},
    ),
    "no shared expert": ("deepseek_v3", {"moe": MoeConfig(n_shared_experts=0)}),
    "affinities as they are": ("deepseek_v3", {"moe": MoeConfig(router=RouterConfig(norm_topk_prob=False))}),
    "two MTP modules": ("deepseek_v3", {"mtp": MtpConfig(num_nextn_predict_layers=2), "tie_word_embeddings": True}),
    "dense latent attention": ("deepseek_v3", {"moe": None, "first_k_dense_replace": 0, "rms_norm_eps": 1e-5}),
    "groups by their best": ("deepseek_v2", {"moe": MoeConfig(router=V2_ROUTER)}),
    "sparse attention": ("deepseek_v32", {"attention": DsaConfig(index_topk=7), "mtp": MtpConfig()}),
    "shared indexers": (
        "glm_moe_dsa",
        {
            "attention": DsaConfig(indexer_rope_interleave=True, indexer_types=("full", "shared", "full", "shared")),
            "mtp": MtpConfig(),
        },
    ),
    "indexers of their own": ("glm_moe_dsa", {"attention": DsaConfig(indexer_rope_interleave=True)}),
    "dense": ("llama", {"attention": GqaConfig(head_dim=10), "moe": None, "first_k_dense_replace": 0}),
    "llama3": (
        "llama",
        {
            "attention": GqaConfig(rope=Llama3RopeConfig(factor=32.0, low_freq_factor=2.0)),
            "moe": None,
            "first_k_dense_replace": 0,
            "tie_word_embeddings": True,
        },
    ),
    "query and key norms": ("qwen3", QWEN | {"moe": None, "first_k_dense_replace": 0}),
    "softmax experts": ("qwen3_moe", QWEN | {"moe": MoeConfig(n_shared_experts=0, router=QWEN_ROUTER)}),
    "two dense layers": (
        "qwen3_moe",
        QWEN | {"moe": MoeConfig(n_shared_experts=0, router=QWEN_ROUTER), "first_k_dense_replace": 2},
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_comes_back(case):
    model_type, fields = MODELS[case]
    config = TransformerConfig(**{"precision": FULL, "initializer_range": 0.01, "vocab_size": 1000} | fields)
    written = json.loads(json.dumps(hf.config_json(config)))
    assert written["model_type"] == model_type
    back = hf.model_config(written)
    if config.moe is None:
        back = dataclasses.replace(back, first_k_dense_replace=0)
    assert back == dataclasses.replace(config, kernels=KernelsConfig())  # which are not the model's


def test_how_indexers_score_is_not_said():
    """The published inference code scores in FP8 whatever the file says, and other code never does."""
    plain = TransformerConfig(attention=DsaConfig())
    published = dataclasses.replace(plain, attention=DsaConfig(index_hadamard=True, index_fp8=True))
    assert hf.config_json(published) == hf.config_json(plain)


def test_token_ids_and_dtype():
    config = TransformerConfig(precision=PrecisionConfig(param="bfloat16"))
    fields = hf.config_json(config, bos_token_id=3, eos_token_id=[4, 5])
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["torch_dtype"]) == (3, [4, 5], "bfloat16")
    assert hf.config_json(config)["bos_token_id"] is None


# ---- models that no family has

NONE_OF_OURS = {
    "MLA with softmax and normed weights": (
        {"moe": MoeConfig(router=RouterConfig(scoring_func="softmax", topk_method="greedy"))},
        [
            r'deepseek_v3: config\.json: topk_method="greedy": only "noaux_tc" is supported',
            r"deepseek_v2: config\.json: norm_topk_prob=true",
            "llama: attention is MlaConfig, GqaConfig here",
        ],
    ),
    "experts without a family": (
        QWEN | {"moe": MoeConfig(router=QWEN_ROUTER)},
        [
            "deepseek_v3: attention is GqaConfig, MlaConfig here",
            "deepseek_v32: attention is GqaConfig, DsaConfig here",
            "qwen3: moe is MoeConfig, None here",
            "qwen3_moe: moe.n_shared_experts is 1, 0 here",
        ],
    ),
    "MTP without experts": (
        {"moe": None, "mtp": MtpConfig()},
        ["deepseek_v3: moe is None, MoeConfig here for the MTP modules"],
    ),
}


@pytest.mark.parametrize("case", NONE_OF_OURS)
def test_every_family_says_why_not(case):
    fields, reasons = NONE_OF_OURS[case]
    with pytest.raises(ValueError, match="no family can hold this model") as error:
        hf.config_json(TransformerConfig(**fields))
    for reason in reasons:
        assert error.match(reason)
    assert all(f"{model_type}: " in str(error.value) for model_type in hf.FAMILIES)
    assert "\n" not in str(error.value)
