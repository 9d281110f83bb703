"""`init_from`: a new run that starts with the parameters of a model that exists."""

import sys

import jax

from experiments.config import ExperimentConfig
from experiments.config_tree import diff
from experiments.data.pipeline import Data
from experiments.errors import UserError
from experiments.loading import ModelSource, find_model

# Fields of the model that may differ from the source's. None of them changes the shape of a parameter, and for each there is a
# reason to change it when training goes on; of the frequencies it is that a context is extended that way (YaRN).
_FREE = (
    "scan_layers:",
    "remat:",
    "moe.transport:",
    "moe.transport.",
    "precision.",
    "initializer_range:",
    "max_position_embeddings:",
    "attention.rope:",
    "attention.rope.",
)


def find_source(config: ExperimentConfig) -> ModelSource | None:
    """Where the parameters come from, none if they are drawn. UserError if there is no such model, or it is another one.

    Reads JSON only. Says on stderr what differs without being refused.
    """
    if config.init_from is None:
        return None
    source = find_model(config.init_from, flag="--config.init_from")
    differences = diff(source.config, config.model)
    other = [line for line in differences if not line.startswith((*_FREE, "mtp:"))]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"init_from={config.init_from} holds another model ({'; '.join(other[:3])}{more}); set these fields of model to "
            f"its values, or begin with --config=configs/finetune.py:{config.init_from}"
        )
    _check_mtp(config, source)
    if differences and jax.process_index() == 0:
        print(f"going on with other values than {config.init_from}: {'; '.join(differences)}", file=sys.stderr)
    return source


def _check_mtp(config: ExperimentConfig, source: ModelSource) -> None:
    theirs, ours = source.config.mtp, config.model.mtp
    if ours and not theirs:
        raise UserError(
            f"init_from={config.init_from} has no multi-token-prediction module, but model.mtp is set; "
            "set model.mtp=none and loss.mtp_loss_weight=none"
        )
    if theirs and not ours:
        raise UserError(
            f"init_from={config.init_from} has {theirs.num_nextn_predict_layers} multi-token-prediction module(s), but "
            "model.mtp is none; set model.mtp=MtpConfig and loss.mtp_loss_weight=PiecewiseConfig"
        )


def check_tokenizer(config: ExperimentConfig, source: ModelSource, data: Data) -> None:
    """UserError if the parameters know other tokens than `data` is made of. BOS and EOS may be named anew."""
    theirs = source.tokenizer()
    if theirs is not None and theirs.vocabulary_sha256 != data.tokenizer.vocabulary_sha256:
        raise UserError(
            f"init_from={config.init_from} has another tokenizer than data.tokenizer gives; set "
            f"--config.data.tokenizer=HfTokenizerConfig --config.data.tokenizer.path={source.tokenizer_directory}"
        )
