"""Logits and log-probabilities of whole rows of tokens."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.loading import LoadedModel
from mdl import sharding
from mdl.pure import PureModel, Tree


class Scores(NamedTuple):
    logits_BTV: np.ndarray
    logprobs_BT: np.ndarray  # [B, T - 1]: of token t + 1 given those up to t
    loss: float  # minus the mean of logprobs


def score(model: LoadedModel, input_ids_BT: np.ndarray, batch_size: int) -> Scores:
    """Scores rows without padding, in float32.

    Rows are computed `batch_size` at a time (more where devices would stay empty), in batches of one shape: one compilation.
    """
    B, T = input_ids_BT.shape
    rows_at_once = int(np.prod([model.mesh.shape[axis] for axis in sharding.ROWS]))
    batch_size = -(-min(batch_size, B) // rows_at_once) * rows_at_once
    logits_BTV = np.empty((B, T, model.config.vocab_size), np.float32)
    logprobs_BT = np.empty((B, T - 1), np.float32)
    forward = jax.jit(functools.partial(_forward, model.pure))
    with jax.set_mesh(model.mesh), exact_float32(model):
        rows = NamedSharding(model.mesh, sharding.spec("batch", None))
        for first in range(0, B, batch_size):
            part = slice(first, min(first + batch_size, B))
            size = part.stop - part.start
            padded = np.zeros((batch_size, T), np.int32)
            padded[:size] = input_ids_BT[part]
            logits, logprobs = forward(model.arrays, jax.device_put(padded, rows))
            logits_BTV[part], logprobs_BT[part] = np.asarray(logits)[:size], np.asarray(logprobs)[:size]
    return Scores(logits_BTV, logprobs_BT, -float(np.mean(logprobs_BT, dtype=np.float64)))


def exact_float32(model: LoadedModel) -> contextlib.AbstractContextManager:
    """Accelerators round the operands of float32 products unless told otherwise; a float32 model is scored in float32."""
    if model.config.precision.compute_dtype == jnp.float32:
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()


def _forward(pure: PureModel, arrays: Tree, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    model = pure.merge(arrays["params"], arrays["buffers"])
    positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32),
        tokens_BT.shape,
        out_sharding=sharding.optional_sharding(sharding.spec("batch", None)),
    )
    output = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    logits_BTV = model.logits(output.hidden_BTD).astype(jnp.float32)
    logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    hits_BTV = tokens_BT[:, 1:, None] == jnp.arange(logits_BTV.shape[-1])  # a sum, as the vocabulary may be split
    return logits_BTV, jnp.sum(jnp.where(hits_BTV, logprobs_BTV, 0), axis=-1)
