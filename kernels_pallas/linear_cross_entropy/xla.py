"""Cross-entropy by chunks of rows. Gradients are made in the forward pass, while a chunk's logits are at hand.

That costs three products instead of the four of a recomputing backward pass, and the backward pass only scales.
"""

import math

import jax
import jax.numpy as jnp

Aux = tuple[jax.Array, jax.Array, jax.Array]


def forward(
    x_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    *,
    z_loss: float,
    chunk_size: int,
    vocab_first: bool,
    axis_name: str | None,
) -> tuple[jax.Array, Aux]:
    """The loss and (nll_M, lse_M, correct_M)."""

    def one_chunk(chunk):
        x_mD, target_m, weight_m = chunk
        logits_mV = _logits(x_mD, w_DV, vocab_first)
        return _losses(logits_mV, target_m, weight_m, z_loss, axis_name)

    chunks = _chunks((x_MD, target_M, weight_M), chunk_size)
    losses, aux = jax.lax.map(one_chunk, chunks)
    return jnp.sum(losses), _rows(aux, x_MD.shape[0])


def forward_with_gradients(
    x_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    *,
    z_loss: float,
    chunk_size: int,
    vocab_first: bool,
    axis_name: str | None,
) -> tuple[jax.Array, Aux, jax.Array, jax.Array]:
    """Like forward, with the gradients of the loss in x and w."""

    def one_chunk(dw, chunk):
        x_mD, target_m, weight_m = chunk
        logits_mV = _logits(x_mD, w_DV, vocab_first)
        loss, (nll_m, lse_m, correct_m) = _losses(logits_mV, target_m, weight_m, z_loss, axis_name)
        p_mV = jnp.exp(logits_mV - lse_m[:, None]) * (weight_m * (1 + 2 * z_loss * lse_m))[:, None]
        column_1V = _first_column(logits_mV, axis_name) + jnp.arange(logits_mV.shape[1], dtype=jnp.int32)[None]
        dlogits_mV = jnp.where(column_1V == target_m[:, None], p_mV - weight_m[:, None], p_mV)
        dlogits_mV = jnp.where(weight_m[:, None] == 0, 0, dlogits_mV).astype(w_DV.dtype)
        dx_mD = jnp.einsum("MV,VD->MD" if vocab_first else "MV,DV->MD", dlogits_mV, w_DV, **_ACCUMULATE)
        if axis_name is not None:
            dx_mD = jax.lax.psum(dx_mD, axis_name)
        dw += jnp.einsum("MV,MD->VD" if vocab_first else "MV,MD->DV", dlogits_mV, x_mD, **_ACCUMULATE)
        return dw, (loss, (nll_m, lse_m, correct_m), dx_mD.astype(x_mD.dtype))

    chunks = _chunks((x_MD, target_M, weight_M), chunk_size)
    # Zeros made from the arguments: inside shard_map the sum must vary over the axes that they vary over.
    zero = x_MD[0, 0].astype(jnp.float32) * 0 + w_DV[0, 0].astype(jnp.float32) * 0 + weight_M[0] * 0 + target_M[0] * 0
    dw, (losses, aux, dx) = jax.lax.scan(one_chunk, jnp.broadcast_to(zero, w_DV.shape), chunks)
    num_rows = x_MD.shape[0]
    return jnp.sum(losses), _rows(aux, num_rows), _rows(dx, num_rows), dw


_ACCUMULATE = {"preferred_element_type": jnp.float32}


def _logits(x_mD: jax.Array, w_DV: jax.Array, vocab_first: bool) -> jax.Array:
    return jnp.einsum("MD,VD->MV" if vocab_first else "MD,DV->MV", x_mD, w_DV, **_ACCUMULATE)


def _losses(
    logits_mV: jax.Array, target_m: jax.Array, weight_m: jax.Array, z_loss: float, axis_name: str | None
) -> tuple[jax.Array, Aux]:
    max_m = jnp.max(logits_mV, axis=-1)
    if axis_name is not None:
        max_m = jax.lax.pmax(max_m, axis_name)
    sum_m = jnp.sum(jnp.exp(logits_mV - max_m[:, None]), axis=-1)
    column_m = target_m - _first_column(logits_mV, axis_name)
    here_m = (column_m >= 0) & (column_m < logits_mV.shape[1])
    label_m = jnp.take_along_axis(logits_mV, column_m[:, None], axis=1, mode="clip")[:, 0]
    label_m = jnp.where(here_m, label_m, 0)
    if axis_name is not None:
        sum_m, label_m = jax.lax.psum((sum_m, label_m), axis_name)
    lse_m = max_m + jnp.log(sum_m)
    nll_m = lse_m - label_m
    loss_m = jnp.where(weight_m == 0, 0, weight_m * (nll_m + z_loss * lse_m**2))
    return jnp.sum(loss_m), (nll_m, lse_m, label_m >= max_m)


def _first_column(logits_mV: jax.Array, axis_name: str | None) -> jax.Array | int:
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * logits_mV.shape[1]


def _chunks(rows, chunk_size: int):
    """[M, …] → [chunks, m, …], the last padded with zeros (weight 0)."""
    num_rows = rows[0].shape[0]
    num_chunks = math.ceil(num_rows / chunk_size)
    size = math.ceil(num_rows / num_chunks)

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, num_chunks * size - num_rows)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(num_chunks, size, *a.shape[1:])

    return jax.tree.map(cut, rows)


def _rows(chunks, num_rows: int):
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:num_rows], chunks)
