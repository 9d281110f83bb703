"""The grouped products in plain JAX: one batched product over padded groups, a loop over blocks for the overflow."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_gemm.layout import Layout, take_rows


def forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_MF = x_MD @ w[group], in x's dtype; zeros beyond the last group."""
    return _rows_times_matrices(x_MD, w_EDF, sizes_E, transpose=False)


def backward_rows(dy_MF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """dx_MD = dy_MF @ w[group]^T, in dy's dtype; zeros beyond the last group."""
    return _rows_times_matrices(dy_MF, w_EDF, sizes_E, transpose=True)


def backward_weights(x_MD: jax.Array, dy_MF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """dw_EDF[e] = x_e^T dy_e over the rows of group e; zeros for an empty group."""
    layout = Layout.of(sizes_E, x_MD.shape[0])
    row_EC = layout.row_EC()
    product = functools.partial(jnp.einsum, preferred_element_type=_sums(x_MD))
    dw_EDF = product("ECD,ECF->EDF", take_rows(x_MD, row_EC), take_rows(dy_MF, row_EC))

    def add_block(dw_EDF: jax.Array, group: jax.Array, row_R: jax.Array) -> jax.Array:
        return dw_EDF.at[group].add(product("RD,RF->DF", take_rows(x_MD, row_R), take_rows(dy_MF, row_R)))

    return layout.over_blocks(add_block, dw_EDF).astype(dtype)


def _rows_times_matrices(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose: bool) -> jax.Array:
    layout = Layout.of(sizes_E, x_MD.shape[0])
    num_groups, inner = w_EDF.shape[0], 2 if transpose else 1
    dims = (((2,), (inner,)), ((0,), (0,)))
    y_ECF = jax.lax.dot_general(
        take_rows(x_MD, layout.row_EC()), w_EDF, dims, preferred_element_type=_sums(x_MD)
    ).astype(x_MD.dtype)
    width = y_ECF.shape[-1]
    y_MF = take_rows(y_ECF.reshape(num_groups * layout.capacity, width), layout.slot_M(layout.group_M()))

    def add_block(y_MF: jax.Array, group: jax.Array, row_R: jax.Array) -> jax.Array:
        w_DF = w_EDF[group].T if transpose else w_EDF[group]
        y_RF = jnp.matmul(take_rows(x_MD, row_R), w_DF, preferred_element_type=_sums(x_MD))
        return y_MF.at[row_R].set(y_RF.astype(y_MF.dtype), mode="drop")

    return layout.over_blocks(add_block, y_MF)


def _sums(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
