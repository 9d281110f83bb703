"""A model to use, from wherever it lies: a Hugging Face directory, a run directory, its `checkpoints`, or one step of them."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from experiments.checkpoint import read_config, restore_params
from experiments.config import ExperimentConfig
from experiments.config_tree import from_json
from experiments.errors import UserError
from experiments.resume import TOKENIZER_NAME
from experiments.tokenizer import Tokenizer, load_tokenizer
from mdl import hf
from mdl.hf import load as hf_load
from mdl.pure import PureModel
from mdl.sharding import MeshConfig
from mdl.transformer import Transformer, TransformerConfig

USE_MESH = MeshConfig(data=1, fsdp=None)  # parameters split over all devices, gathered where they are used


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model whose arrays lie on `mesh`. Under jit, give `arrays` as an argument and merge inside."""

    config: TransformerConfig
    mesh: Mesh
    arrays: dict[str, Any]  # {"params": ..., "buffers": ...}
    pure: PureModel
    tokenizer: Tokenizer | None

    def module(self) -> Transformer:
        """The Transformer with its arrays, for use outside of jit."""
        return self.pure.merge(self.arrays["params"], self.arrays["buffers"])


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """What can be said about a model before its arrays are read."""

    config: TransformerConfig
    tokenizer_directory: pathlib.Path
    read_arrays: Callable[[TransformerConfig, Mesh], dict[str, Any]]

    def tokenizer(self) -> Tokenizer | None:
        if (self.tokenizer_directory / "tokenizer.json").is_file():
            return load_tokenizer(self.tokenizer_directory)
        return None

    def load(self, mesh: Mesh | None = None) -> LoadedModel:
        """Reads the arrays onto `mesh`, by default all devices; UserError for files that do not fit the config."""
        with _as_user_error():
            mesh = USE_MESH.build() if mesh is None else mesh
            arrays = self.read_arrays(self.config, mesh)
        return LoadedModel(self.config, mesh, arrays, PureModel(self.config), self.tokenizer())


def load_model(checkpoint: str | os.PathLike, mesh: Mesh | None = None) -> LoadedModel:
    """`find_model` and `load` in one."""
    return find_model(checkpoint).load(mesh)


def find_model(checkpoint: str | os.PathLike) -> ModelSource:
    """Reads the JSON of a checkpoint, no array; UserError if there is none or it cannot be honoured."""
    directory = pathlib.Path(checkpoint)
    if "://" not in os.fspath(checkpoint) and not directory.is_dir():
        raise UserError(f"--checkpoint={checkpoint}: no such directory")
    if is_hugging_face(directory):
        with _as_user_error(str(directory)):
            config = hf.model_config(hf_load.read_config(directory))
        return ModelSource(config, directory, lambda config, mesh: hf_load.load_params(directory, config, mesh))
    saved = read_config(checkpoint)
    experiment = from_json(ExperimentConfig, saved.config_json, f"{checkpoint}: config")
    return ModelSource(
        experiment.model,
        _run_directory(directory) / TOKENIZER_NAME,
        lambda config, mesh: _restore(checkpoint, saved.step, config, mesh),
    )


def is_hugging_face(directory: pathlib.Path) -> bool:
    """Whether config.json names a model type; the config.json of a run does not."""
    try:
        return "model_type" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _run_directory(directory: pathlib.Path) -> pathlib.Path:
    """From a run directory, its `checkpoints`, or a step in there."""
    for candidate in (directory, directory.parent, directory.parent.parent):
        if (candidate / TOKENIZER_NAME).is_dir():
            return candidate
    return directory


def _restore(checkpoint: str | os.PathLike, step: int, config: TransformerConfig, mesh: Mesh) -> dict[str, Any]:
    with jax.set_mesh(mesh):
        abstract = PureModel(config).abstract()

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, leaf.sharding.spec)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return restore_params(checkpoint, jax.tree.map(on_mesh, abstract), step=step).state


@contextlib.contextmanager
def _as_user_error(where: str = "") -> Iterator[None]:
    """ValueErrors of `mdl` (its configs and readers) and files that cannot be opened, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}{': ' if where else ''}{error}") from error
