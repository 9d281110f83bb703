"""Batches on the mesh, and how many tokens the run has seen."""

from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.config import ExperimentConfig, TrainConfig
from experiments.data.pipeline import Data
from mdl import sharding


def place(rows: Mapping[str, np.ndarray], mesh: Mesh, micro_batches: int | None = None) -> dict[str, jax.Array]:
    """This process's rows [n, L] as global arrays [B, L], or [A, B, L] of A micro-batches."""

    def one(array: np.ndarray) -> jax.Array:
        if micro_batches is None:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, P(sharding.ROWS, None)), array)
        stacked = array.reshape(micro_batches, -1, array.shape[-1])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, sharding.ROWS, None)), stacked)

    return {name: one(array) for name, array in rows.items()}


def abstract_batch(train: TrainConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the batch of a step at its full size, as `place` makes it."""
    rows = NamedSharding(mesh, P(None, sharding.ROWS, None))
    shape = (train.grad_accum_steps, train.micro_batch_size, train.seq_len + 1)
    names = ("tokens", "segment_ids", "positions")
    return {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=rows) for name in names}


class Feed:
    """Serves the batch of each step; its `state` goes into the checkpoint. A context manager."""

    def __init__(self, config: ExperimentConfig, data: Data, mesh: Mesh, state: int | Mapping[str, Any]):
        self._train, self._mesh = config.train, mesh
        self._stream = data.train_stream(state)

    @property
    def state(self) -> dict[str, Any]:
        return self._stream.state

    def next_batch(self) -> tuple[np.float32, dict[str, jax.Array]]:
        """(training tokens before this batch, {tokens, segment_ids, positions} [A, B, T + 1])."""
        rows_seen = self._stream.index
        micro_batches = self._train.micro_batches_at(rows_seen)
        rows = self._stream.next_rows(micro_batches * self._train.micro_batch_size)
        return np.float32(rows_seen * self._train.seq_len), place(rows, self._mesh, micro_batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
