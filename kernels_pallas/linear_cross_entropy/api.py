"""The public loss of a linear head."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.linear_cross_entropy import reference, xla
from kernels_pallas.select import Unsupported, select


class CrossEntropyAux(NamedTuple):
    """Per row, without gradient and without weight: rows of weight 0 have values too, to be masked by the reader."""

    nll_M: jax.Array  # negative log-likelihood of the target, nats
    lse_M: jax.Array  # logsumexp of the logits; its square is the z-loss
    correct_M: jax.Array  # bool: the target has the largest logit


def linear_cross_entropy(
    x_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_size: int = 512,
    vocab_first: bool = False,
    axis_name: str | None = None,
    implementation: Literal["reference", "xla"] | None = None,
) -> tuple[jax.Array, CrossEntropyAux]:
    """sum_m weight[m] · (nll[m] + z_loss · logsumexp(logits[m])²) of the logits x @ w, never held for all rows together.

    Float32 logits and losses. `vocab_first`: w is [V, D], an embedding table that is tied to the head; nothing is transposed.
    `axis_name`: inside shard_map, the mesh axis over which w's vocabulary is split (targets count globally); x, the loss
    and dx are the same on every shard. A row of weight 0 is left out. Differentiable
    in x and w only, through the loss only.

    Raises ValueError on shapes that do not fit, and Unsupported on an implementation that is not there.
    """
    width = w_DV.shape[1] if vocab_first else w_DV.shape[0]
    if x_MD.ndim != 2 or w_DV.ndim != 2 or x_MD.shape[1] != width:
        order = "[V, D]" if vocab_first else "[D, V]"
        raise ValueError(f"linear_cross_entropy needs x [M, D] and w {order}, got {x_MD.shape} and {w_DV.shape}")
    if target_M.shape != x_MD.shape[:1] or weight_M.shape != x_MD.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy needs targets and weights [{x_MD.shape[0]}], got {target_M.shape} and {weight_M.shape}"
        )
    if chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size = {chunk_size} must be at least 1")
    table: dict[str, Callable] = {"xla": _xla, "reference": _run_reference}
    run = select("linear_cross_entropy", implementation, table)
    options = (z_loss, chunk_size, vocab_first, axis_name)
    loss, aux = run(x_MD, w_DV, target_M.astype(jnp.int32), weight_M.astype(jnp.float32), options)
    return loss, CrossEntropyAux(*aux)


def _run_reference(x_MD, w_DV, target_M, weight_M, options):
    z_loss, _, vocab_first, axis_name = options
    if axis_name is not None:
        raise Unsupported("linear_cross_entropy: the reference does not split the vocabulary")
    return reference.linear_cross_entropy(x_MD, w_DV.T if vocab_first else w_DV, target_M, weight_M, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _xla(x_MD, w_DV, target_M, weight_M, options):
    return xla.forward(x_MD, w_DV, target_M, weight_M, **_named(options))


def _xla_fwd(x_MD, w_DV, target_M, weight_M, options):
    loss, aux, dx_MD, dw_DV = xla.forward_with_gradients(x_MD, w_DV, target_M, weight_M, **_named(options))
    return (loss, aux), (dx_MD, dw_DV.astype(w_DV.dtype))


def _xla_bwd(options, residuals, cotangents):
    dx_MD, dw_DV = residuals
    dloss = cotangents[0]
    return (dx_MD * dloss).astype(dx_MD.dtype), (dw_DV * dloss).astype(dw_DV.dtype), None, None


def _named(options):
    return dict(zip(("z_loss", "chunk_size", "vocab_first", "axis_name"), options, strict=True))


_xla.defvjp(_xla_fwd, _xla_bwd)
