"""Goes on training a model that exists, on your text: a Hugging Face directory, a run, or one step of a run.

python -m experiments.run --config=configs/finetune.py:DIR --workdir=runs/mine \
    --config.data.source=JsonlConfig --config.data.source.paths='data/*.jsonl'

Architecture, tokenizer and parameters are those of DIR, which must stay where it is while the run may be resumed. The weights of
the loss terms are those with which DeepSeek-V3's pre-training ended (report, section 4.2): the routers' biases rest.
"""

import dataclasses

from experiments.config import ExperimentConfig, LossConfig, TrainConfig
from experiments.data.pipeline import DataConfig
from experiments.errors import UserError
from experiments.loading import find_model
from experiments.optim.adamw import AdamWConfig
from experiments.optim.schedule import CosineConfig, PiecewiseConfig
from experiments.tokenizer import HfTokenizerConfig
from mdl.attention.dsa import DsaConfig
from mdl.sharding import MeshConfig


def get_config(arg: str | None = None) -> ExperimentConfig:
    if arg is None:
        raise UserError("name the model to begin with: --config=configs/finetune.py:DIR")
    source = find_model(arg, flag="DIR")
    model, tokenizer = source.config, source.tokenizer()
    return ExperimentConfig(
        init_from=arg,
        # Parameters in float32 whatever the file holds: a step of 1e-5 is below half an ulp of most bfloat16 weights.
        model=dataclasses.replace(model, remat="full", precision=dataclasses.replace(model.precision, param="float32")),
        data=DataConfig(
            tokenizer=HfTokenizerConfig(path=str(source.tokenizer_directory)),
            bos=tokenizer is not None and source.begins_with_bos(tokenizer),
        ),
        loss=LossConfig(
            mtp_loss_weight=PiecewiseConfig(values=(0.1,)) if model.mtp else None,
            aux_loss_alpha=1e-4 if model.moe else None,
            bias_update_speed=None,
            indexer_loss_weight=1.0 if isinstance(model.attention, DsaConfig) else None,
        ),
        optim=AdamWConfig(learning_rate=1e-5, schedule=CosineConfig(warmup_fraction=0.03), weight_decay=0.0),
        train=TrainConfig(num_steps=1000, batch_size=32, seq_len=min(4096, model.max_position_embeddings)),
        mesh=MeshConfig(data=1, fsdp=None),
    )
