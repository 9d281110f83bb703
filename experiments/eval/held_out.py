"""Loss and bits per byte on held-out documents."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.config import ExperimentConfig
from experiments.data.pipeline import Data
from experiments.feed import place
from experiments.step import indexer_metrics, make_eval_step
from mdl.pure import PureModel, Tree


class HeldOut:
    """Scores every held-out row; each process reads its share of each batch."""

    def __init__(self, config: ExperimentConfig, data: Data, model: PureModel, mesh: Mesh):
        self._rows, self._bytes, self._mesh = data.validation_rows(), data.validation_bytes, mesh
        self._batch_size = config.eval_batch_size
        self._eval_step = jax.jit(make_eval_step(model))

    @property
    def exists(self) -> bool:
        return len(self._rows) > 0

    def scores(self, state: Tree) -> dict[str, Any]:
        """val/loss in nats per target and val/bpb; of the averaged parameters too, as val/ema_…, where the run keeps them. What
        sparse attention's indexers are worth as val/indexer/…, each layer's own as arrays; what share of their tokens MTP modules
        foresee as val/acceptance/mtp_1, …"""
        scores = self._score(state["params"], state["buffers"], "val/")
        if "ema" in state:
            scores |= self._score(state["ema"], state["buffers"], "val/ema_")
        return scores

    def _score(self, params: Tree, buffers: Tree, prefix: str) -> dict[str, Any]:
        total = None
        for start in range(0, len(self._rows), self._batch_size):
            sums = jax.device_get(self._eval_step(params, buffers, self._batch(start)))
            sums = jax.tree.map(np.float64, sums)  # a million float32 additions would round
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        assert total is not None
        means = indexer_metrics(jax.tree.map(lambda sum_L: sum_L / total.tokens, total.indexer))
        accepted = zip(total.mtp_right, total.mtp_targets, strict=True)
        return {
            f"{prefix}loss": total.nll / total.targets,
            f"{prefix}bpb": total.nll / math.log(2) / self._bytes,
            **{f"{prefix}acceptance/mtp_{k}": right / max(of, 1) for k, (right, of) in enumerate(accepted, start=1)},
            **{f"{prefix}{name}": value for name, value in means.items() if name != "loss/indexer"},
        }

    def _batch(self, start: int) -> dict[str, jax.Array]:
        """Rows start.. of all processes; padding (segment 0) fills the last batch."""
        local = self._batch_size // jax.process_count()
        first = start + jax.process_index() * local
        rows = [self._rows[i] for i in range(first, min(first + local, len(self._rows)))]
        blank = {name: np.zeros_like(array) for name, array in self._rows[0].items()}
        rows += [blank] * (local - len(rows))
        return place({name: np.stack([row[name] for row in rows]) for name in blank}, self._mesh)
