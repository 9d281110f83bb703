"""A DeepSeek-shaped model that compiles in seconds: MLA, one dense and one mixture-of-experts layer, MTP, bytes.

`small.py:CORPUS` trains on the text files that the glob CORPUS names.
"""

from experiments.checkpoint import CheckpointConfig
from experiments.config import EvalConfig, ExperimentConfig, TrainConfig
from experiments.data.files import TextFilesConfig
from experiments.data.pipeline import DataConfig
from experiments.metrics import LogConfig
from experiments.optim.adamw import AdamWConfig
from experiments.tokenizer import ByteTokenizerConfig
from mdl.attention.mla import MlaConfig
from mdl.mlp import MlpConfig
from mdl.moe.moe import MoeConfig
from mdl.moe.router import RouterConfig
from mdl.mtp import MtpConfig
from mdl.precision import PrecisionConfig
from mdl.transformer import TransformerConfig


def get_config(arg: str = "corpus/*.txt") -> ExperimentConfig:
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=320,
            hidden_size=16,
            num_hidden_layers=2,
            max_position_embeddings=64,
            attention=MlaConfig(
                num_attention_heads=2,
                q_lora_rank=8,
                kv_lora_rank=8,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
            ),
            mlp=MlpConfig(intermediate_size=32),
            moe=MoeConfig(
                moe_intermediate_size=16,
                router=RouterConfig(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1),
            ),
            mtp=MtpConfig(),
            initializer_range=0.02,
            precision=PrecisionConfig(compute="float32"),
        ),
        data=DataConfig(
            source=TextFilesConfig(paths=(arg,), validation_fraction=0.2),
            tokenizer=ByteTokenizerConfig(),
        ),
        optim=AdamWConfig(learning_rate=1e-2),
        train=TrainConfig(num_steps=40, batch_size=8, seq_len=16),
        eval=EvalConfig(every=20, sample_prompt=None),
        checkpoint=CheckpointConfig(every=10),
        log=LogConfig(every=1, tensorboard=False),
    )
