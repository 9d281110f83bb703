"""Every corpus a config can name."""

from __future__ import annotations

import dataclasses
import math

from experiments.data.files import JsonlConfig, TextFilesConfig
from experiments.data.records import ArrayRecordConfig, ParquetConfig
from experiments.data.stdlib import StdlibConfig
from experiments.data.tfds_source import TfdsConfig
from experiments.errors import UserError

SingleSourceConfig = StdlibConfig | TextFilesConfig | JsonlConfig | ParquetConfig | ArrayRecordConfig | TfdsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Several corpora at once; every member repeats for as long as training lasts."""

    members: tuple[SingleSourceConfig, ...]  # the corpora
    weights: tuple[float, ...]  # share of rows (so of tokens) from each member; any positive scale

    def __post_init__(self):
        if not self.members or len(self.members) != len(self.weights):
            raise UserError(
                f"data.source.weights={self.weights}: give one weight for each of the {len(self.members)} members"
            )
        for weight in self.weights:
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"data.source.weights={self.weights}: weights must be positive; leave the member out")


SourceConfig = SingleSourceConfig | MixtureConfig
