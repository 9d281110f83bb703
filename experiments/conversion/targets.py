"""What a conversion makes: the files of either format, their units of work, and what is written when all are there."""

import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from experiments.config import ExperimentConfig
from experiments.config_tree import to_json
from experiments.conversion.companions import copy_companions
from experiments.conversion.copies import Copy
from experiments.conversion.hf_files import plan_files
from experiments.conversion.layouts import spell
from experiments.conversion.naming import NamedTensor
from experiments.conversion.recast import Recipe
from experiments.conversion.run_files import STEP, chunks, plan_arrays, write_metadata
from experiments.conversion.work import Sums, Unit
from experiments.resume import CHECKPOINTS_NAME, CONFIG_NAME, TOKENIZER_NAME
from mdl import hf
from mdl.hf import fp8
from mdl.hf.safetensors_write import write_index


class Target(Protocol):
    @property
    def units(self) -> Sequence[Unit]: ...

    def finish(self, sums: Iterable[Sums]) -> None:
        """Writes what makes a checkpoint of the files; sums of all units."""
        ...


class HfTarget:
    """A Hugging Face directory."""

    def __init__(
        self,
        directory: pathlib.Path,
        recipes: Iterable[Recipe],
        config_json: dict[str, Any],
        companions: pathlib.Path,
        max_shard_bytes: int,
    ):
        self._directory, self._config_json, self._companions = directory, config_json, companions
        self._shards, self.units = plan_files(directory, recipes, max_shard_bytes)

    def finish(self, sums: Iterable[Sums]) -> None:
        write_index(self._directory, self._shards)
        _write_json(self._directory / "config.json", self._config_json)
        copy_companions(self._companions, self._directory)


class RunTarget:
    """A directory that looks like a run whose step 0 has been saved, without optimizer and data."""

    def __init__(
        self,
        directory: pathlib.Path,
        recipes: Mapping[str, Recipe],
        tensors: Sequence[NamedTensor],
        copies: Sequence[Copy],
        config_json: dict[str, Any],
        companions: pathlib.Path,
    ):
        self._directory, self._companions = directory, companions
        self._step = directory / CHECKPOINTS_NAME / STEP
        self._arrays = plan_arrays(tensors, recipes)
        self.units: list[Unit] = [*chunks(self._step / "state", self._arrays), *copies]
        self._config = ExperimentConfig(model=hf.model_config(config_json))
        self._extra = {
            "hf_config": config_json,
            "hf_copies": [copy.tensor for copy in copies],
            "fp8_dims": {array.name: spell(array.layout) for array in self._arrays if array.dtype == fp8.DTYPE},
        }

    def finish(self, sums: Iterable[Sums]) -> None:
        totals = Counter()
        for one in sums:
            totals.update(one)
        in_words = {name: total % 2**32 for name, total in totals.items()}
        config_json = to_json(self._config)
        write_metadata(self._step, self._arrays, in_words, config_json, self._extra)
        _write_json(self._directory / CONFIG_NAME, config_json)
        copy_companions(self._companions, self._directory / TOKENIZER_NAME)


def _write_json(file: pathlib.Path, content: Any) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
