"""DeepSeek-V2-Lite, 15.7B parameters of which 2.7B are active (arXiv 2405.04434, appendix B, and the released configuration).

Balance comes from a loss alone: V2's router has no bias. Pre-training length 4096, before YaRN. The corpus is not public: set
`data.source`.
"""

from experiments.config import ExperimentConfig, LossConfig, TrainConfig
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import StepDecayConfig
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.rope import RopeConfig
from mdl.sharding import MeshConfig
from mdl.transformer import TransformerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    del arg
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=102400,  # released config
            hidden_size=2048,
            num_hidden_layers=27,
            max_position_embeddings=4096,
            attention=MlaConfig(
                num_attention_heads=16,
                q_lora_rank=None,  # "V2-Lite does not compress the queries"
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                rope=RopeConfig(rope_theta=10000.0),  # released config
            ),
            mlp=MlpConfig(intermediate_size=10944),  # released config
            moe=MoeConfig(
                moe_intermediate_size=1408,
                n_shared_experts=2,
                router=RouterConfig(
                    n_routed_experts=64,
                    num_experts_per_tok=6,
                    scoring_func="softmax",
                    topk_method="greedy",
                    norm_topk_prob=False,  # released config
                    routed_scaling_factor=1.0,  # released config
                ),
            ),
            first_k_dense_replace=1,
            rms_norm_eps=1e-6,
            initializer_range=0.006,
            remat="full",
        ),
        loss=LossConfig(mtp_loss_weight=None, aux_loss_alpha=0.001, bias_update_speed=None),
        optim=AdamWConfig(
            learning_rate=4.2e-4,
            schedule=StepDecayConfig(warmup_steps=2000, boundaries=(0.8, 0.9), factor=0.316),
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(num_steps=301_700, batch_size=4608, seq_len=4096, grad_accum_steps=2),  # 5.7T tokens
        mesh=MeshConfig(data=None, fsdp=64),
    )
