"""A sample at the end of a run."""

from collections.abc import Callable

from experiments.config import ExperimentConfig
from experiments.tokenizer import Tokenizer
from mdl.pure import PureModel, Tree


def print_sample(
    config: ExperimentConfig, model: PureModel, state: Tree, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    pass
