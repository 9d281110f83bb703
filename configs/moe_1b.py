"""A DeepSeek-V3 in small, 1.2B parameters of which 0.24B are active: MLA, 64 experts, MTP, for one GPU of 80 GB or more.

    python -m experiments.run --config=configs/moe_1b.py --workdir=runs/moe_1b \
        --config.data.source=TextFilesConfig --config.data.source.paths='/data/*.txt'

The default corpus, Python's standard library, is too small to do more than try it out.
"""

from experiments.checkpoint import CheckpointConfig
from experiments.config import EvalConfig, ExperimentConfig, TrainConfig
from experiments.data.pipeline import DataConfig
from experiments.optim.adamw import AdamWConfig
from experiments.tokenizer import BpeTokenizerConfig
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.transformer import TransformerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    del arg
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=32768,
            hidden_size=1024,
            num_hidden_layers=13,
            max_position_embeddings=4096,
            attention=MlaConfig(
                num_attention_heads=16,
                q_lora_rank=512,
                kv_lora_rank=256,
                qk_nope_head_dim=64,
                qk_rope_head_dim=64,
                v_head_dim=64,
            ),
            mlp=MlpConfig(intermediate_size=4096),
            moe=MoeConfig(
                moe_intermediate_size=448,
                n_shared_experts=1,
                router=RouterConfig(n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4),
            ),
            mtp=MtpConfig(),
            remat="full",
        ),
        data=DataConfig(tokenizer=BpeTokenizerConfig(vocab_size=32768)),
        optim=AdamWConfig(learning_rate=4e-4),
        train=TrainConfig(num_steps=20_000, batch_size=128, seq_len=2048, grad_accum_steps=4),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
