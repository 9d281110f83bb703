"""The public routed experts."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.expert_mlp import chunks, reference, xla
from kernels_pallas.expert_mlp.grouped import Grouped
from kernels_pallas.grouped_gemm import api as grouped_gemm
from kernels_pallas.select import attempt
from kernels_pallas.vary import vary_alike

Implementation = Literal["xla", "tpu", "gpu", "reference"]
# A back end has `forward` and `backward` as xla.py has them; the first is the default: no kernel has been timed on a device yet.
BACK_ENDS: dict[str, Any] = {
    "xla": xla,
    "tpu": Grouped(grouped_gemm.BACK_ENDS["tpu"]),
    "gpu": Grouped(grouped_gemm.BACK_ENDS["gpu"]),
    "reference": reference,
}


def expert_mlp(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weight_TX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    expected_choices: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Routed SwiGLU experts: y[t] = sum_x weight[t, x] · expert[index[t, x]](x[t]); dropless, exact for any load.

    An index outside [0, E) is an expert of another device and adds nothing, so that a shard of the experts can be run by
    shifting the indices (`index - first_local_expert`). `expected_choices` says how many of the T·X lie inside when loads are equal
    (None: all), which decides how much work is done at once; any number is exact. Accumulates in float32
    (float64 in float64); y has x's dtype. Differentiable in x, weight and the three matrices.

    "tpu" and "gpu" are the kernels of `grouped_gemm`; what these give is rounded to x's dtype before choices are summed.

    Raises ValueError on shapes that do not fit, and Unsupported on an implementation that cannot do the call.
    """
    experts, width, hidden = gate_EDF.shape
    if up_EDF.shape != gate_EDF.shape or down_EFD.shape != (experts, hidden, width):
        raise ValueError(
            f"expert_mlp needs gate and up [E, D, F] and down [E, F, D], "
            f"got {gate_EDF.shape}, {up_EDF.shape} and {down_EFD.shape}"
        )
    if x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ValueError(f"expert_mlp needs x [T, {width}], got {x_TD.shape}")
    if index_TX.ndim != 2 or index_TX.shape[0] != x_TD.shape[0] or weight_TX.shape != index_TX.shape:
        raise ValueError(
            f"expert_mlp needs index and weight [{x_TD.shape[0]}, X], got {index_TX.shape} and {weight_TX.shape}"
        )
    if not jnp.issubdtype(index_TX.dtype, jnp.integer):
        raise ValueError(f"expert_mlp needs integer indices, got {index_TX.dtype}")
    arrays = vary_alike((x_TD, index_TX, weight_TX, gate_EDF, up_EDF, down_EFD))

    def run(back_end: Any) -> jax.Array:
        if back_end is reference:
            return reference.expert_mlp(*arrays).astype(x_TD.dtype)
        if not index_TX.size:
            back_end = xla  # nothing for a kernel to do
        return _run(back_end, expected_choices, *arrays)

    return attempt("expert_mlp", implementation, BACK_ENDS, run)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(back_end, expected_choices, x_TD, index_TX, weight_TX, gate_EDF, up_EDF, down_EFD):
    inputs = x_TD, index_TX, weight_TX, gate_EDF, up_EDF, down_EFD
    # Some experts stay idle, and no gradient is wanted here.
    if back_end is xla and 0 < index_TX.size < gate_EDF.shape[0]:
        return xla.forward_by_choice(*inputs)
    return _run_fwd(back_end, expected_choices, *inputs)[0]


def _run_fwd(back_end, expected_choices, *arrays):
    inputs = chunks.Inputs(*arrays)
    if chunks.count(expected_choices, inputs) == 1:
        return back_end.forward(expected_choices, *inputs)
    return chunks.forward(back_end, expected_choices, inputs), inputs


def _run_bwd(back_end, expected_choices, residuals, dy_TD):
    if isinstance(residuals, chunks.Inputs):
        dx_TD, dweight_TX, *matrices = chunks.backward(back_end, expected_choices, residuals, dy_TD)
    else:
        dx_TD, dweight_TX, *matrices = back_end.backward(residuals, dy_TD)
    return dx_TD, None, dweight_TX, *(dw.astype(residuals.gate_EDF.dtype) for dw in matrices)


_run.defvjp(_run_fwd, _run_bwd)
