"""`init_from`: a new run that starts with the parameters of a model that exists.

A model with dense attention can go on as one with sparse attention (DSA): its indexers are drawn then.
"""

import dataclasses
import sys

import jax
from jax.sharding import Mesh

from experiments.config import ExperimentConfig
from experiments.config_tree import diff, show
from experiments.data.pipeline import Data
from experiments.errors import UserError
from experiments.loading import ModelSource, find_model
from experiments.optim import trainable
from mdl.attention.dsa import DsaConfig
from mdl.pure import PureModel, Tree, apart

# Fields of the model that may differ from the source's. None of them changes the shape of a parameter, and for each there is a
# reason to change it when training goes on; of the frequencies it is that a context is extended that way (YaRN).
_FREE = (
    "kernels.",
    "scan_layers:",
    "remat:",
    "moe.transport:",
    "moe.transport.",
    "precision.",
    "initializer_range:",
    "max_position_embeddings:",
    "attention.rope:",
    "attention.rope.",
    "attention.dense.rope:",
    "attention.dense.rope.",
    "attention.index_topk:",
    "attention.index_hadamard:",
    "attention.index_fp8:",
    "attention.warmup:",
)


def find_source(config: ExperimentConfig) -> ModelSource | None:
    """Where the parameters come from, none if they are drawn. UserError if there is no such model, or it is another one.

    Reads JSON only. Says on stderr what differs without being refused.
    """
    if config.init_from is None:
        _say_if_untrained(config, None)
        return None
    source = find_model(config.init_from, flag="--config.init_from")
    _say_if_untrained(config, source)
    ours = config.model
    if isinstance(ours.attention, DsaConfig) and isinstance(source.config.attention, type(ours.attention.dense)):
        # The model that is to become sparse: its attention is ours to all keys.
        ours = dataclasses.replace(ours, attention=ours.attention.dense)
        source = _with_new_indexers(source, config.seed)
    differences = diff(source.config, ours)
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


def _say_if_untrained(config: ExperimentConfig, source: ModelSource | None) -> None:
    attention = config.model.attention
    needs_trained = isinstance(attention, DsaConfig) and not attention.warmup
    has_trained = source is not None and isinstance(source.config.attention, DsaConfig)
    if needs_trained and not has_trained and jax.process_index() == 0:
        print(
            f"warning: the indexers that choose keys have learnt nothing yet (init_from={show(config.init_from)}); first train "
            "them with model.attention.warmup=true, and name that run in init_from",
            file=sys.stderr,
        )


def _with_new_indexers(source: ModelSource, seed: int) -> ModelSource:
    """The parameters of a model with dense attention, beside indexers that are drawn."""

    def read_arrays(pure: PureModel, mesh: Mesh) -> Tree:
        attention = pure.config.attention
        assert isinstance(attention, DsaConfig)
        arrays = source.read_arrays(PureModel(dataclasses.replace(pure.config, attention=attention.dense)), mesh)
        if pure.config.layers_differ:
            arrays = apart(arrays)
        with jax.set_mesh(mesh):
            draw = jax.jit(lambda: trainable.split(pure.init(jax.random.key(seed))["params"], ["*/indexer/*"])[0])
            return {**arrays, "params": _beside(draw(), arrays["params"])}

    return dataclasses.replace(source, read_arrays=read_arrays)


def _beside(indexers: Tree, dense: Tree) -> Tree:
    """Parameters of sparse attention from its indexers, all else of them None, and a model with dense attention."""
    if not isinstance(indexers, dict):
        return dense
    if "dense" in indexers:
        return {**indexers, "dense": dense}
    return {name: _beside(indexers[name], dense[name]) for name in dense}


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
