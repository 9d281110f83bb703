"""A small DeepSeek: MLA, mixture of experts and multi-token prediction, learning Python on a laptop's CPU.

python -m experiments.run --config=configs/tiny.py --workdir=runs/tiny
"""

from experiments.checkpoint import CheckpointConfig
from experiments.config import EvalConfig, ExperimentConfig, TrainConfig
from experiments.optim.adamw import AdamWConfig
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.transformer import TransformerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    del arg
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=4,
            attention=MlaConfig(
                num_attention_heads=4,
                q_lora_rank=96,
                kv_lora_rank=64,
                qk_nope_head_dim=32,
                qk_rope_head_dim=16,
                v_head_dim=32,
            ),
            mlp=MlpConfig(intermediate_size=704),
            moe=MoeConfig(
                moe_intermediate_size=176,
                router=RouterConfig(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
            ),
            mtp=MtpConfig(),
            initializer_range=0.02,
            precision=PrecisionConfig(compute="float32"),  # CPUs emulate bfloat16
        ),
        optim=AdamWConfig(learning_rate=2e-3),
        train=TrainConfig(num_steps=220, batch_size=8, seq_len=256),
        eval=EvalConfig(every=110),
        checkpoint=CheckpointConfig(every=55),
    )
