"""DeepSeek-V3, 671B parameters of which 37B are active (arXiv 2412.19437).

Architecture and optimization as published: sections 2 and 4.2 of the report, and the released configuration file. The corpus is
not public: set `data.source`. A run is meant for thousands of accelerators; on a laptop this config counts parameters, and

    python -m experiments.compile --config=configs/deepseek_v3.py --topology=v5p:8x8x8

compiles the train step for 512 of them.
"""

from experiments.config import BatchRampConfig, ExperimentConfig, LossConfig, TrainConfig
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import DeepSeekV3ScheduleConfig, PiecewiseConfig
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.moe.transport_all_to_all import AllToAllConfig
from mdl.mtp import MtpConfig
from mdl.rope import RopeConfig
from mdl.sharding import MeshConfig
from mdl.transformer import TransformerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    del arg
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=129280,  # released config
            hidden_size=7168,  # 4.2 "hidden dimension"
            num_hidden_layers=61,
            max_position_embeddings=4096,  # pre-training length; YaRN extends it afterwards (4.3)
            attention=MlaConfig(
                num_attention_heads=128,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                rope=RopeConfig(rope_theta=10000.0),  # released config
            ),
            mlp=MlpConfig(intermediate_size=18432),  # released config
            moe=MoeConfig(
                # A token's 8 experts lie on 6.5 of 32 devices on average, which is 0.81 of the mean that this counts in.
                transport=AllToAllConfig(capacity_factor=1.25),
                moe_intermediate_size=2048,
                n_shared_experts=1,
                router=RouterConfig(
                    n_routed_experts=256,
                    num_experts_per_tok=8,
                    scoring_func="sigmoid",
                    topk_method="noaux_tc",
                    n_group=8,  # released config: one group per node
                    topk_group=4,  # 4.2 "each token is sent to at most 4 nodes"
                    norm_topk_prob=True,
                    routed_scaling_factor=2.5,  # released config
                ),
            ),
            first_k_dense_replace=3,
            mtp=MtpConfig(num_nextn_predict_layers=1),
            rms_norm_eps=1e-6,
            initializer_range=0.006,
            remat="full",
        ),
        loss=LossConfig(
            mtp_loss_weight=PiecewiseConfig(values=(0.3, 0.1), boundaries=(10e12,), unit="tokens"),
            aux_loss_alpha=1e-4,
            bias_update_speed=PiecewiseConfig(values=(1e-3, 0.0), boundaries=(14.3e12,), unit="tokens"),
        ),
        optim=AdamWConfig(
            learning_rate=2.2e-4,
            schedule=DeepSeekV3ScheduleConfig(
                warmup_steps=2000,
                constant_tokens=10e12,
                decay_tokens=4.3e12,
                decayed_rate=2.2e-5,
                hold_tokens=333e9,
                final_rate=7.3e-6,
            ),
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            moment_dtype="bfloat16",  # 3.3.3 "low-precision optimizer states"
        ),
        train=TrainConfig(
            num_steps=247_200,  # 14.8T tokens: 469B in 19,414 steps while the batch ramps, then 62.9M a step
            batch_size=15360,
            seq_len=4096,
            grad_accum_steps=15,  # micro-batches of 1,024 rows: one each on 1,024 devices, two each on 512
            batch_ramp=BatchRampConfig(start_batch_size=3072, tokens=469e9),
        ),
        # For any multiple of 512 devices. fsdp splits parameters in place of the report's 16 pipeline stages (3.2).
        mesh=MeshConfig(data=1, fsdp=None, expert=32),
    )
