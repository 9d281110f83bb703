"""Many tokens, chunk by chunk: what lies between x and y exists for one chunk at a time, and is made again for the gradients."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.expert_mlp.xla import accumulation
from kernels_pallas.vary import vary_alike

ROWS = 2048  # of an average expert in a chunk; its products gain nothing from more


class Inputs(NamedTuple):
    x_TD: jax.Array
    index_TX: jax.Array
    weight_TX: jax.Array
    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array

    @property
    def matrices(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.gate_EDF, self.up_EDF, self.down_EFD


def count(expected_choices: int | None, inputs: Inputs) -> int:
    """Chunks that leave an average expert no more than ROWS."""
    choices = inputs.index_TX.size if expected_choices is None else expected_choices
    return max(1, math.ceil(choices / (len(inputs.gate_EDF) * ROWS)))


def forward(back_end: Any, expected_choices: int | None, inputs: Inputs) -> jax.Array:
    """y_TD."""
    chunks = count(expected_choices, inputs)
    expected = expected_choices and math.ceil(expected_choices / chunks)

    def one_chunk(chunk: tuple[jax.Array, ...]) -> jax.Array:
        x_tD, index_tX, weight_tX = chunk
        return back_end.forward(expected, x_tD, index_tX, weight_tX, *inputs.matrices)[0]

    return _join(jax.lax.map(one_chunk, _cut(chunks, inputs)), len(inputs.x_TD))


def backward(back_end: Any, expected_choices: int | None, inputs: Inputs, dy_TD: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients of x_TD, weight_TX and, in the dtype of accumulation, the three matrices."""
    chunks = count(expected_choices, inputs)
    expected = expected_choices and math.ceil(expected_choices / chunks)
    sums = tuple(jnp.zeros(w.shape, accumulation(w)) for w in inputs.matrices)
    sums, inputs, dy_TD = vary_alike((sums, inputs, dy_TD))

    def one_chunk(sums: tuple[jax.Array, ...], chunk: tuple[jax.Array, ...]):
        x_tD, index_tX, weight_tX, dy_tD = chunk
        _, residuals = back_end.forward(expected, x_tD, index_tX, weight_tX, *inputs.matrices)
        dx_tD, dweight_tX, *gradients = back_end.backward(residuals, dy_tD)
        return tuple(map(jnp.add, sums, gradients)), (dx_tD, dweight_tX)

    sums, (dx_ctD, dweight_ctX) = jax.lax.scan(one_chunk, sums, _cut(chunks, inputs, dy_TD))
    return _join(dx_ctD, len(dy_TD)), _join(dweight_ctX, len(dy_TD)), *sums


def _cut(chunks: int, inputs: Inputs, *more_TD: jax.Array) -> tuple[jax.Array, ...]:
    """x, index, weight and more as [chunks, t, ...], the last chunk padded with tokens that choose no expert."""
    tokens = len(inputs.x_TD)
    size = math.ceil(tokens / chunks)

    def cut(a: jax.Array, fill: int = 0) -> jax.Array:
        a = jnp.pad(a, [(0, chunks * size - tokens), (0, 0)], constant_values=fill)
        return a.reshape(chunks, size, -1)

    index_ctX = cut(inputs.index_TX, fill=len(inputs.gate_EDF))
    return cut(inputs.x_TD), index_ctX, cut(inputs.weight_TX), *map(cut, more_TD)


def _join(chunks: jax.Array, tokens: int) -> jax.Array:
    return chunks.reshape(-1, chunks.shape[-1])[:tokens]
