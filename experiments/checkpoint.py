"""Checkpoints: Orbax behind one door, asynchronous, atomic, independent of the mesh and of the layer scan.

A step directory holds `state` (arrays, see `layers_on_disk`) and `meta` (one JSON file: config, data position, what the
caller adds, and dtype, shape and checksum of every array). Reading alone, in `checkpoint_read`, needs no Checkpointer.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from concurrent import futures
from typing import Self

from experiments.checkpoint_read import (
    Restored,
    Saved,
    Wanted,
    gather,
    local_absolute,
    one_line,
    print_warning,
    quiet_orbax,
    read_config,
    read_newest,
    read_step,
    restore_params,
    saved_steps,
    step_names,
    step_path,
)
from experiments.errors import UserError

__all__ = ["CheckpointConfig", "Checkpointer", "Restored", "Saved", "read_config", "restore_params", "saved_steps"]

# JAX and Orbax are imported where they are used: the command line reads CheckpointConfig before it needs either.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    directory: str | None = None  # where they go, gs://BUCKET/PATH too; none: into the run's directory
    every: int = 500  # steps between two checkpoints
    keep_last: int = 3  # newest checkpoints that stay on disk
    keep_every: int | None = None  # checkpoints at multiples of this step stay for good

    def __post_init__(self):
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name}={value}: must be at least 1")

    def build(self, directory) -> "Checkpointer":
        """Returns a Checkpointer, to be used in `with`."""
        return Checkpointer(directory, self)


class Checkpointer:
    """Saves and restores the train state of one run in one directory. Every process of a job calls every method.

    Use it in `with`: leaving the block, for whatever reason, waits for the save in flight. A failed save (full disk) is
    reported once through `warn` and training may go on; if the last one failed, leaving the block raises UserError.
    With several processes a failed save raises at once: the others wait for this one and could not go on.
    """

    def __init__(self, directory, config: CheckpointConfig, *, warn: Callable[[str], None] = print_warning):
        quiet_orbax()
        self._config = config
        self._warn = warn
        self._directory = local_absolute(directory)
        self._manager = self._open()
        self._waiter = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint_waiter")
        self._in_flight: tuple[int, futures.Future] | None = None
        self._failure: str | None = None

    def _open(self):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        _remove_unfinished(self._directory)
        keep: list[policies.PreservationPolicy] = [policies.LatestN(self._config.keep_last)]
        if self._config.keep_every is not None:
            keep.append(policies.EveryNSteps(self._config.keep_every))
        options = ocp.CheckpointManagerOptions(
            step_name_format=step_names(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        self.check(wait=True)
        self._waiter.shutdown()
        self._manager.close()
        _remove_unfinished(self._directory)
        if self._failure is not None and exc_type is None:
            raise UserError(self._failure)

    def latest_step(self) -> int | None:
        """Returns the newest step that is saved or being saved."""
        return self._manager.latest_step()

    def save(self, step: int, state, *, data_state: dict, config_json: dict, extra: dict, force: bool = False) -> bool:
        """Starts to save `state` if `step` is due or `force`; returns whether it did.

        Returns when `state` may be donated. A step that is there already is not written again.
        data_state may differ between processes; config_json and extra are those of process 0.
        """
        if not force and step % self._config.every:
            self.check()
            return False
        self.check(wait=True)
        if step in self._manager.all_steps():
            return False
        import orbax.checkpoint as ocp

        from experiments import layers_on_disk

        data_states = gather(data_state)
        try:
            checksums = layers_on_disk.checksums(state)
            arrays = layers_on_disk.to_disk(state)
            meta = {
                "step": step,
                "config": config_json,
                "data_states": data_states,
                "extra": extra,
                "arrays": {name: [str(a.dtype), list(a.shape), checksums[name]] for name, a in arrays.items()},
            }
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        layers_on_disk.nest(arrays),
                        # A chunk for each expert: whoever reads one of them need not read all.
                        save_args=layers_on_disk.nest(
                            {
                                name: ocp.SaveArgs(shard_axes=(0,) if layers_on_disk.is_by_expert(name) else ())
                                for name in arrays
                            }
                        ),
                    ),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:  # Orbax, TensorStore and XLA, when they cannot write
            self._report(step, error)
            return False
        self._in_flight = (step, self._waiter.submit(_finish, self._manager))
        return True

    def check(self, *, wait: bool = False) -> None:
        """Reports a save that has failed in the background. Cheap unless `wait`; `save` calls it."""
        if self._in_flight is None or not (wait or self._in_flight[1].done()):
            return
        step, finished = self._in_flight
        error = finished.exception()
        self._in_flight = None
        if error is None:
            self._failure = None
        else:
            self._report(step, error)

    def restore(self, step: int, abstract_state, *, cast: bool = False) -> Restored:
        """Returns one saved step on the shardings of `abstract_state`.

        abstract_state: jax.ShapeDtypeStructs with the sharding on the target mesh, in the structure of the state.
        cast: convert dtypes that differ instead of refusing them.
        Raises UserError if the step is missing, unreadable, or of another model.
        """
        return read_step(self._directory, step, Wanted(state=abstract_state, cast=cast, whole=True))

    def restore_latest(self, abstract_state, *, cast: bool = False) -> Restored | None:
        """Like `restore`, for the newest step that can be read; None if there is none.

        A damaged step is named in a warning and renamed aside, so that it can be examined and its step saved anew.
        """
        wanted = Wanted(state=abstract_state, cast=cast, whole=True)
        restored, damaged = read_newest(self._directory, wanted, self._warn)
        if damaged:
            _rename_aside(self._directory, damaged)
            self._manager.reload()
        return restored

    def _report(self, step: int, error: BaseException) -> None:
        import jax

        # Orbax would raise what is left of this failure in later saves. Begin afresh.
        with contextlib.suppress(Exception):
            self._manager.close()
        kept = max(saved_steps(self._directory), default=None)
        self._failure = (
            f"{self._directory}: the checkpoint of step {step} could not be written ({one_line(error)}); "
            + ("no earlier one exists" if kept is None else f"the last good one is step {kept}")
        )
        if jax.process_count() > 1:
            raise UserError(self._failure) from error
        self._warn(self._failure)
        self._manager = self._open()


def _finish(manager) -> None:
    from experiments.backend import give_memory_back

    try:
        manager.wait_until_finished()
    finally:
        give_memory_back()


def _rename_aside(root, steps: list[int]) -> None:
    import jax
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        for step in steps:
            path = step_path(root, step)
            taken = sum(1 for _ in root.glob(f"damaged_{path.name}*"))
            path.rename(root / (f"damaged_{path.name}" + (f"_{taken}" if taken else "")))
    multihost_utils.sync_global_devices("renamed damaged checkpoints")


def _remove_unfinished(root) -> None:
    """Removes what a killed run or a failed save left. Writers of a failed save may live a little longer than it."""
    import jax

    if jax.process_index() != 0:
        return
    for path in root.glob("*.orbax-checkpoint-tmp*"):
        for _ in range(10):
            with contextlib.suppress(OSError):
                path.rmtree(missing_ok=True)
                break
            time.sleep(0.1)
