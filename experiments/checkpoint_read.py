"""Reading checkpoints: whole states for a run to go on from, parameters for everyone else, and what the JSON says.

Nothing here writes. JAX and Orbax are imported where they are used: looking at a config needs neither.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.errors import UserError

_STEP_PREFIX = "step"
_NAMES_IN_MESSAGE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What the JSON of a checkpoint says."""

    step: int
    config_json: dict
    extra: dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored(Saved):
    state: Any
    data_state: dict


def restore_params(directory, abstract, *, step: int | None = None, ema: bool = False, cast: bool = False) -> Restored:
    """Returns parameters and buffers alone, from a run directory, its `checkpoints`, or one step directory.

    abstract: {"params": ..., "buffers": ...} of ShapeDtypeStructs with target shardings; the state comes back alike.
    ema: take the moving average in place of the parameters. Optimizer state is not read.
    Nothing is written: a damaged newest step is skipped with a warning. Raises UserError as `Checkpointer.restore`.
    """
    quiet_orbax()
    root, named_step = _locate(directory)
    step = named_step if step is None else step
    state = {**abstract, "ema": abstract["params"]} if ema else dict(abstract)
    if ema:
        del state["params"]
    wanted = Wanted(state=state, cast=cast, whole=False)
    if step is not None:
        restored = read_step(root, step, wanted)
    else:
        restored, _ = read_newest(root, wanted, print_warning)
    if restored is None:
        raise UserError(f"{directory}: no checkpoint here")
    if ema:
        restored.state["params"] = restored.state.pop("ema")
    return restored


def read_config(directory, *, step: int | None = None) -> Saved:
    """Returns what the JSON of a checkpoint says, from the same places as `restore_params`.

    Reads no array and starts no device. The newest step whose JSON can be read is taken unless `step` is given.
    """
    root, named_step = _locate(directory)
    step = named_step if step is None else step
    for candidate in reversed(saved_steps(root)) if step is None else [step]:
        try:
            meta = _read_meta(step_path(root, candidate))
        except (OSError, ValueError) as error:
            if step is not None:
                raise UserError(f"{step_path(root, step)}: not a readable checkpoint ({one_line(error)})") from error
            continue
        return Saved(step=meta["step"], config_json=meta["config"], extra=meta["extra"])
    raise UserError(f"{directory}: no checkpoint here")


def find_step(directory, step: int):
    """The directory of one step, from the same places as `restore_params`."""
    return step_path(_locate(directory)[0], step)


def read_sizes(step) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of every array in the directory of a step."""
    arrays = _read_meta(step)["arrays"]
    return {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape, _) in arrays.items()}


def saved_steps(directory) -> list[int]:
    """Returns the steps whose save was completed, oldest first."""
    return sorted(found.step for found in step_names().find_all(local_absolute(directory)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to read from a step, and how strictly."""

    state: Any  # ShapeDtypeStructs
    cast: bool
    whole: bool  # arrays at the top-level keys that `state` lacks are an error


def read_newest(root, wanted: Wanted, warn: Callable[[str], None]) -> tuple[Restored | None, list[int]]:
    """The newest step that can be read, and the damaged ones that are newer."""
    damaged: dict[int, str] = {}
    for step in reversed(saved_steps(root)):
        result = _attempt(step_path(root, step), wanted)
        if isinstance(result, Restored):
            for bad, cause in damaged.items():
                warn(f"the checkpoint of step {bad} is damaged ({cause}); falling back to step {step}")
            return result, list(damaged)
        damaged[step] = one_line(result)
    if damaged:
        # All at once looks like another trouble (memory, file system) than damage: touch nothing, go no further.
        causes = "; ".join(f"step {step}: {cause}" for step, cause in damaged.items())
        raise UserError(f"{root}: no checkpoint can be read ({causes})")
    return None, []


def read_step(root, step: int, wanted: Wanted) -> Restored:
    path = step_path(root, step)
    if not path.exists():
        saved = ", ".join(map(str, saved_steps(root))) or "none"
        raise UserError(f"{root}: no checkpoint of step {step} here (saved steps: {saved})")
    result = _attempt(path, wanted)
    if isinstance(result, Exception):
        raise UserError(f"{path}: the checkpoint cannot be read ({one_line(result)})") from result
    return result


def print_warning(line: str) -> None:
    """One line on stderr, once per job."""
    import jax

    if jax.process_index() == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _attempt(path, wanted: Wanted) -> Restored | Exception:
    """Reads one step, or returns what went wrong with the files in any process. Raises UserError for another model."""
    from experiments import layers_on_disk

    arrays = layers_on_disk.abstract_on_disk(wanted.state)  # outside: a bad request is not a damaged file
    try:
        meta = _read_meta(path)
        result: Restored | Exception = _read(path, meta, wanted, arrays)
    except UserError:
        raise
    except Exception as error:  # damage shows up as almost anything, from KeyError to XLA's errors
        meta, result = {}, error
    if not all(gather(isinstance(result, Restored))):
        return result if isinstance(result, Exception) else OSError("another process could not read it")
    # Together again: checksums are collective. The storage layer notices missing bytes, not changed ones.
    assert isinstance(result, Restored)
    changed = [
        name
        for name, checksum in layers_on_disk.checksums(result.state).items()
        if meta["arrays"][name][0] == str(arrays[name].dtype) and meta["arrays"][name][2] != checksum
    ]
    return OSError(f"changed on disk: {some(changed)}") if changed else result


def _read(path, meta: dict, wanted: Wanted, arrays: dict) -> Restored:
    import jax
    import orbax.checkpoint as ocp

    from experiments import layers_on_disk
    from experiments.arrays_on_disk import ArraysOnDisk
    from mdl.hf import fp8

    fp8_dims = meta["extra"].get("fp8_dims", {})  # matrices that a converted checkpoint keeps in FP8
    scales = {fp8.scale_name(name) for name in fp8_dims}
    _check_same_model(path, arrays, {n: a for n, a in meta["arrays"].items() if n not in scales}, wanted)
    data_state = _own_data_state(path, meta["data_states"]) if wanted.whole else {}
    handler = ocp.PyTreeCheckpointHandler()
    item = layers_on_disk.nest({name: leaf for name, leaf in arrays.items() if name not in fp8_dims})
    restored = handler.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(
            item=item,
            restore_args=jax.tree.map(
                lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype),
                item,
            ),
            partial_restore=True,
        ),
    )
    handler.close()
    found = layers_on_disk.flatten(restored)
    if fp8_dims:
        on_disk = ArraysOnDisk(pathlib.Path(path / "state"))
        found |= {
            name: on_disk.dequantized(name, dims, arrays[name]) for name, dims in fp8_dims.items() if name in arrays
        }
    return Restored(
        step=meta["step"],
        state=layers_on_disk.from_disk(found, wanted.state),
        data_state=data_state,
        config_json=meta["config"],
        extra=meta["extra"],
    )


def _check_same_model(path, wanted: dict, stored: dict, how: Wanted) -> None:
    """Raises one line instead of Orbax's hundreds."""
    if not how.whole:
        roots = tuple(f"{key}/" for key in how.state)
        stored = {name: value for name, value in stored.items() if name.startswith(roots)}
    problems = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "reshaped": [
            f"{name} {stored[name][1]} -> {list(leaf.shape)}"
            for name, leaf in wanted.items()
            if name in stored and stored[name][1] != list(leaf.shape)
        ],
        "of another dtype": [
            f"{name} {stored[name][0]} -> {leaf.dtype}"
            for name, leaf in wanted.items()
            if not how.cast and name in stored and stored[name][0] != str(leaf.dtype)
        ],
    }
    found = [f"{len(names)} {kind} ({some(names)})" for kind, names in problems.items() if names]
    if found:
        raise UserError(f"{path}: this checkpoint was written with another model config: arrays {', '.join(found)}")


def _own_data_state(path, data_states: list[dict]) -> dict:
    import jax

    if len(data_states) == 1:
        return data_states[0]
    if len(data_states) != jax.process_count():
        raise UserError(
            f"{path}: holds a data position for each of {len(data_states)} processes, this run has "
            f"{jax.process_count()}: resume with {len(data_states)} processes"
        )
    return data_states[jax.process_index()]


def gather(value) -> list:
    """The JSON value of every process, in order; one of them where all agree."""
    from experiments import peers

    values = peers.gather(value)
    return values[:1] if all(other == values[0] for other in values) else values


def _read_meta(path) -> dict:
    return json.loads((path / "meta" / "metadata").read_text())


def _locate(directory) -> tuple[Any, int | None]:
    """The directory of all steps, and the step if `directory` is one."""
    path = local_absolute(directory)
    prefix, _, number = path.name.rpartition("_")
    if prefix == _STEP_PREFIX and number.isdecimal():
        return path.parent, int(number)
    below = path / "checkpoints"
    return (below if below.exists() else _elsewhere(path) or path), None


def _elsewhere(path):
    """The `checkpoint.directory` of the run in `path`, if there is such a run and it has one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        directory = json.loads((path / "config.json").read_text())["checkpoint"]["directory"]
        return local_absolute(directory) if directory else None


def local_absolute(directory):
    """An epath.Path; gs:// stays as it is. UserError for stores that Orbax cannot write, and without the package for gs://."""
    from etils import epath

    text = os.fspath(directory)
    if "://" not in text:
        return epath.Path(os.path.abspath(text))
    if not text.startswith("gs://"):
        raise UserError(
            f"{text}: checkpoints lie in directories and in gs://; mount other stores and name the directory"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: needs gcsfs, which is not installed; run `pip install gcsfs`")
    return epath.Path(text)


@functools.cache
def step_names():
    import orbax.checkpoint as ocp

    return ocp.path.step.standard_name_format(step_prefix=_STEP_PREFIX)


def step_path(root, step: int):
    return root / step_names().build_name(step)


def one_line(error: BaseException) -> str:
    """An exception in one line. TensorStore says the kind first, the cause last, and then pages of specification."""
    text = re.split(r" \[\w+(?:\[\d+\])?=", " ".join(str(error).split()))[0] or type(error).__name__
    kind, *causes = text.split(": ")
    text = ": ".join([kind, *causes[-2:]])
    return text if len(text) <= 300 else f"{text[:297]}..."


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + (", ..." if len(names) > _NAMES_IN_MESSAGE else "")


class _OrbaxFilter(logging.Filter):
    """Drops what Orbax says in passing, and the tracebacks of errors that are raised and reported here anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":  # after one failed read or write, its siblings fail unheard
            where = traceback.format_exception(record.exc_info[1]) if record.exc_info else []
            return "orbax" not in "".join([record.getMessage(), *where])
        return "/orbax/" not in record.pathname or (record.levelno >= logging.ERROR and not record.exc_info)


@functools.cache
def quiet_orbax() -> None:
    from absl import logging as absl_logging

    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(_OrbaxFilter())
    # What was under way when a read or write failed complains, when it is collected, that nobody waits for it.
    warnings.filterwarnings("ignore", r"coroutine 'async_(de)?serialize.* was never awaited", RuntimeWarning)
    others = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "/orbax/" in code.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook
