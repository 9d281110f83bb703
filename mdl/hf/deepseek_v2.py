"""DeepSeek-V2 and V2-Lite: V3's attention and experts; a softmax router without bias, whose groups count by their best expert."""

from typing import Any

from mdl.hf import deepseek_v3
from mdl.hf.fields import Fields
from mdl.moe.router import RouterConfig
from mdl.transformer import TransformerConfig

ARCHITECTURE = "DeepseekV2ForCausalLM"
TABLE = deepseek_v3.TABLE


def model_config(fields: Fields) -> TransformerConfig:
    fields.only("rope_interleave", True)
    fields.only("scoring_func", "softmax")
    method = fields.text("topk_method") if fields.has("topk_method") else "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.refusal("topk_method", "only greedy or group_limited_greedy is supported")
    if fields.flag("norm_topk_prob", False):
        # The original code then divides and does not scale, transformers scales and does not divide.
        raise fields.refusal("norm_topk_prob", "the public implementations disagree on it; only false is supported")
    router = RouterConfig(
        **deepseek_v3.router_sizes(fields, groups=1),
        scoring_func="softmax",
        topk_method=method,
        norm_topk_prob=False,
        routed_scaling_factor=fields.number("routed_scaling_factor", 1.0),
    )
    return deepseek_v3.transformer(fields, router, rope_interleave=True, mtp=None)


def config_json(config: TransformerConfig) -> dict[str, Any]:
    return deepseek_v3.transformer_json(config)
