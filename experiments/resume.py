"""What a run directory must agree with before a run may go on in it."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import peers
from experiments.checkpoint import Restored, read_config, saved_steps
from experiments.checkpoint_read import local_absolute, one_line
from experiments.config import ExperimentConfig
from experiments.config_tree import diff, from_json, to_json
from experiments.data.pipeline import Data
from experiments.errors import UserError
from experiments.tokenizer import load_tokenizer

CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer"
CHECKPOINTS_NAME = "checkpoints"

# Fields that define which run it is: a directory whose config differs here holds another run. All others may change on the way.
_IDENTITY = (
    "seed",
    "init_from",
    "model.",
    "data.source",
    "data.tokenizer",
    "data.bos",
    "data.eos",
    "data.streaming",
    "train.seq_len",
    "train.trainable",
    "train.ema_decay",  # with it, a state has parameters that one without has not
    "optim.moment_dtype",
)
_FREE = ("model.kernels", "model.scan_layers", "model.remat", "model.moe.transport", "model.max_position_embeddings")


def checkpoints(config: ExperimentConfig, directory: pathlib.Path):
    """Where the checkpoints of a run in `directory` are, as an epath.Path. UserError for a store that cannot be used."""
    return local_absolute(config.checkpoint.directory or directory / CHECKPOINTS_NAME)


def what_remains(config: ExperimentConfig, directory: str | os.PathLike) -> str:
    """Of a run that cannot go on, and how it does."""
    steps = saved_steps(checkpoints(config, pathlib.Path(directory)))
    last = f"the last complete checkpoint is of step {steps[-1]}" if steps else "there is no complete checkpoint yet"
    return f"{last}; start all processes again to go on from there"


def check_directory(config: ExperimentConfig, directory: pathlib.Path) -> None:
    """UserError if `directory` holds a run of another config; prints the fields that change on the way."""
    path = directory / CONFIG_NAME
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--workdir={directory}: is a file; name a directory")
    root = checkpoints(config, directory)
    saved = read_config(root) if _find_steps(root) else None
    if saved is not None and "hf_config" in saved.extra:
        raise UserError(
            f"--workdir={directory}: was made by experiments.convert and is no run; "
            f"begin one elsewhere with --config.init_from={directory}"
        )
    is_elsewhere = saved is not None and config.checkpoint.directory is not None
    if not is_elsewhere and not path.exists():
        return
    where = f"checkpoint.directory={root}" if is_elsewhere else f"--workdir={directory}"
    try:
        written = saved.config_json if saved is not None and is_elsewhere else json.loads(path.read_text())
        earlier = from_json(ExperimentConfig, written, str(path))
    except ValueError as error:
        raise UserError(f"{path}: not a readable config ({error}); choose another --workdir") from error
    changes = diff(earlier, config)
    other_run = [line for line in changes if line.startswith(_IDENTITY) and not line.startswith(_FREE)]
    if other_run:
        more = f" and {len(other_run) - 3} more" if len(other_run) > 3 else ""
        raise UserError(
            f"{where} holds a run of another config ({'; '.join(other_run[:3])}{more}); choose another directory"
        )
    if changes and jax.process_index() == 0:
        print(f"going on with other values than before: {'; '.join(changes)}", file=sys.stderr)


def check_tokenizer(config: ExperimentConfig, directory: pathlib.Path, data: Data) -> None:
    """UserError if the tokenizer has more tokens than the model, or is not that of the run or of a checkpoint in `directory`."""
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's {data.tokenizer.vocab_size}; "
            "raise it, or lower data.tokenizer.vocab_size"
        )
    saved = directory / TOKENIZER_NAME
    if saved.exists() and load_tokenizer(saved).fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"{saved}: not the tokenizer that data.tokenizer gives now (a trained one changes with its corpus); restore it, "
            f"set data.tokenizer=HfTokenizerConfig with data.tokenizer.path={saved}, or choose another --workdir"
        )
    root = checkpoints(config, directory)
    if saved_steps(root) and read_config(root).extra["tokenizer_sha256"] != data.tokenizer.fingerprint:
        raise UserError(
            f"{root}: the tokenizer that data.tokenizer gives now is not that of the checkpoints; restore its corpus "
            "or choose another --workdir"
        )


def _find_steps(root) -> list[int]:
    try:
        return saved_steps(root)
    except Exception as error:  # each library for a remote store has errors of its own
        raise UserError(f"checkpoint.directory={root}: cannot be read ({one_line(error)})") from error


def create(config: ExperimentConfig, directory: pathlib.Path, data: Data) -> None:
    """Creates the run directory, with the resolved config and the tokenizer, and that of the checkpoints.

    UserError, in every process, if one cannot be written, or if not all processes see the same directory of checkpoints.
    """
    is_main = jax.process_index() == 0
    with peers.together(), _naming(directory):
        if is_main:
            directory.mkdir(parents=True, exist_ok=True)
    _create_shared(checkpoints(config, directory))
    with peers.together(), _naming(directory):
        if is_main:
            if not (directory / TOKENIZER_NAME).exists():
                unfinished = directory / (TOKENIZER_NAME + ".tmp")
                data.tokenizer.save(unfinished, add_bos=config.data.bos)
                unfinished.rename(directory / TOKENIZER_NAME)
            unfinished = directory / (CONFIG_NAME + ".tmp")
            unfinished.write_text(json.dumps(to_json(config), indent=2) + "\n")
            os.replace(unfinished, directory / CONFIG_NAME)


@contextlib.contextmanager
def _naming(directory: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={directory}: cannot be written ({error.strerror}); choose another") from error


def _create_shared(root) -> None:
    # A name that is new to every process: network file systems remember what was not there.
    name = f"writable_{peers.of_first(os.urandom(8).hex())}"
    own = root / f"{name}_{jax.process_index()}"
    try:
        with peers.together():
            try:
                root.mkdir(parents=True, exist_ok=True)
                own.write_text("")
            except Exception as error:  # each library for a remote store has errors of its own
                cause = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
                raise UserError(f"{root}: checkpoints cannot be written ({cause}); choose another directory") from error
        with peers.together():
            if not (root / f"{name}_0").exists():
                raise UserError(
                    f"{root} is not the directory that process 0 writes to; name one that all processes share in "
                    "--workdir or checkpoint.directory"
                )
    finally:
        with contextlib.suppress(Exception):  # it was not written
            own.unlink()


def provenance(data: Data) -> dict[str, str]:
    """What a checkpoint says about where it comes from."""
    return {
        "tokenizer_sha256": data.tokenizer.fingerprint,
        "corpus_sha256": data.corpus_sha256,
        "rows_sha256": data.fingerprint,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
    }


def abstract_state(make_state: Callable[[], Any], mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the state on this mesh; scalars are replicated."""

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        partition = leaf.sharding.spec if leaf.sharding else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition))

    return jax.tree.map(with_sharding, jax.eval_shape(make_state))


def report(restored: Restored | None, data: Data, say: Callable[[str], None]) -> None:
    """Says where the run goes on, and what is not as it was."""
    if restored is None:
        return
    say(f"resumed from the checkpoint of step {restored.step}")
    now = provenance(data)
    if restored.extra["rows_sha256"] != now["rows_sha256"]:
        say(
            "warning: the corpus has changed since the checkpoint: the rows to come are not those of an uninterrupted run"
        )
    for name in ("python", "jax", "flax"):
        if restored.extra[name] != now[name]:
            say(
                f"warning: {name} is {now[name]}, the checkpoint was written with {restored.extra[name]}: expect other roundings"
            )
