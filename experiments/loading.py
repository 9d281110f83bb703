"""A model to use, from wherever it lies: a Hugging Face directory, a run directory, its `checkpoints`, or one step of them."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from experiments.checkpoint import read_config, restore_params
from experiments.config import ExperimentConfig
from experiments.config_tree import from_json
from experiments.errors import UserError
from experiments.resume import TOKENIZER_NAME, abstract_state
from experiments.tokenizer import Tokenizer, load_tokenizer
from mdl import hf
from mdl.hf import load as hf_load
from mdl.precision import Float
from mdl.pure import PureModel, Tree
from mdl.sharding import MeshConfig
from mdl.transformer import Transformer, TransformerConfig

USE_MESH = MeshConfig(data=1, fsdp=None)  # parameters split over all devices, gathered where they are used


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model whose arrays lie on `mesh`. Under jit, give `arrays` as an argument and merge inside."""

    config: TransformerConfig
    mesh: Mesh
    arrays: Tree  # {"params": ..., "buffers": ...}
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
    read_arrays: Callable[[PureModel, Mesh], Tree]  # in the dtypes of the PureModel
    trained_with_bos: bool | None = None  # whether documents began with BOS; None where that is not known

    def tokenizer(self) -> Tokenizer | None:
        if (self.tokenizer_directory / "tokenizer.json").is_file():
            return load_tokenizer(self.tokenizer_directory)
        return None

    def begins_with_bos(self, tokenizer: Tokenizer) -> bool:
        """Whether text that is given to the model should begin with BOS: as in training, else as the tokenizer's files say."""
        return tokenizer.add_bos if self.trained_with_bos is None else self.trained_with_bos

    def computing_in(self, dtype: Float) -> "ModelSource":
        """The same parameters, computed with in `dtype`."""
        precision = dataclasses.replace(self.config.precision, compute=dtype)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, precision=precision))

    def load(self, mesh: Mesh | None = None) -> LoadedModel:
        """Reads the arrays onto `mesh`, by default all devices; UserError for files that do not fit the config."""
        with _as_user_error():
            mesh, pure = USE_MESH.build() if mesh is None else mesh, PureModel(self.config)
        return LoadedModel(self.config, mesh, self.load_arrays(pure, mesh), pure, self.tokenizer())

    def load_arrays(self, pure: PureModel, mesh: Mesh) -> Tree:
        """{"params": ..., "buffers": ...} on `mesh`, in the dtypes of `pure`; each process reads what its devices hold."""
        with _as_user_error():
            return self.read_arrays(pure, mesh)


def load_model(checkpoint: str | os.PathLike, mesh: Mesh | None = None) -> LoadedModel:
    """`find_model` and `load` in one."""
    return find_model(checkpoint).load(mesh)


def find_model(checkpoint: str | os.PathLike, *, ema: bool = False, flag: str = "--checkpoint") -> ModelSource:
    """Reads the JSON of a checkpoint, no array; UserError if there is none or it cannot be honoured.

    ema: take the run's moving average in place of its parameters. flag: what `checkpoint` was given as.
    """
    directory = pathlib.Path(checkpoint)
    if "://" not in os.fspath(checkpoint) and not directory.is_dir():
        raise UserError(f"{flag}={checkpoint}: no such directory")
    if is_hugging_face(directory):
        with _as_user_error(f"{directory}: "):
            config = hf.model_config(hf_load.read_config(directory))
        if ema:
            raise UserError(f"--ema: {checkpoint} is no run of ours and holds no averaged parameters")
        return ModelSource(config, directory, lambda pure, mesh: hf_load.load_params(directory, pure, mesh))
    saved = read_config(checkpoint)
    experiment = from_json(ExperimentConfig, saved.config_json, f"{checkpoint}: config")
    if ema and experiment.train.ema_decay is None:
        raise UserError(f"--ema: {checkpoint} holds no averaged parameters (runs keep them with train.ema_decay)")
    return ModelSource(
        experiment.model,
        _run_directory(directory) / TOKENIZER_NAME,
        lambda pure, mesh: _restore(checkpoint, saved.step, pure, mesh, ema=ema),
        # A converted checkpoint was trained elsewhere: its tokenizer's files know better than defaults of ours.
        trained_with_bos=None if "hf_config" in saved.extra else experiment.data.bos,
    )


def is_hugging_face(directory: pathlib.Path) -> bool:
    """Whether config.json names a model type; the config.json of a run does not."""
    if not (directory / "config.json").is_file():
        return False
    with _as_user_error():
        return "model_type" in hf_load.read_config(directory)


def _run_directory(directory: pathlib.Path) -> pathlib.Path:
    """From a run directory, its `checkpoints`, or a step in there."""
    for candidate in (directory, directory.parent, directory.parent.parent):
        if (candidate / TOKENIZER_NAME).is_dir():
            return candidate
    return directory


def _restore(checkpoint: str | os.PathLike, step: int, pure: PureModel, mesh: Mesh, *, ema: bool) -> Tree:
    with jax.set_mesh(mesh):
        abstract = abstract_state(lambda: pure.init(jax.random.key(0)), mesh)
    # Averages are float32, and a run that begins here may keep its parameters in another dtype.
    return restore_params(checkpoint, abstract, step=step, ema=ema, cast=True).state


@contextlib.contextmanager
def _as_user_error(where: str = "") -> Iterator[None]:
    """ValueErrors of `mdl` (its configs and readers) and files that cannot be opened, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{where}{error}") from error
