"""A small Llama-like model: grouped-query attention and SwiGLU, learning Python on a laptop's CPU.

python -m experiments.run --config=configs/tiny_dense.py --workdir=runs/tiny_dense
"""

from experiments.checkpoint import CheckpointConfig
from experiments.config import EvalConfig, ExperimentConfig, LossConfig, TrainConfig
from experiments.optim.adamw import AdamWConfig
from mdl.attention.gqa import GqaConfig
from mdl.mlp import MlpConfig
from mdl.precision import PrecisionConfig
from mdl.transformer import TransformerConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    del arg
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=4096,
            hidden_size=256,
            num_hidden_layers=4,
            attention=GqaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=64, qk_norm=True),
            mlp=MlpConfig(intermediate_size=704),
            moe=None,
            initializer_range=0.02,
            precision=PrecisionConfig(compute="float32"),  # CPUs emulate bfloat16
        ),
        loss=LossConfig(mtp_loss_weight=None, aux_loss_alpha=None, bias_update_speed=None),
        optim=AdamWConfig(learning_rate=2e-3),
        train=TrainConfig(num_steps=220, batch_size=8, seq_len=256),
        eval=EvalConfig(every=110),
        checkpoint=CheckpointConfig(every=55),
    )
