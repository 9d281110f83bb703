"""Routed experts as grouped products: choices are sorted by expert, and each product is one call of a kernel.

So many rows at a time as are expected here and half as many again: choices of other devices' experts need none. Loads beyond
that take further rounds, each of which reads the matrices again and keeps nothing for the gradients.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.expert_mlp import xla
from kernels_pallas.grouped_gemm.layout import Carry, take_rows

SPARE = 1.5  # rows of a round over the choices expected
WHOLE = 8  # rows at a time that a kernel takes without a copy


class Rows(NamedTuple):
    """One round of the sorted choices."""

    sizes_E: jax.Array
    choice_R: jax.Array  # T·X where there is none
    row_TX: jax.Array  # R for a choice of another round, or of an absent expert

    def take(self, a_TD: jax.Array) -> jax.Array:
        return take_rows(a_TD, self.choice_R // self.row_TX.shape[1])


class Residuals(NamedTuple):
    x_TD: jax.Array
    weight_TX: jax.Array
    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    sizes_E: jax.Array
    order_M: jax.Array
    g_RF: jax.Array
    u_RF: jax.Array

    def over_other_rounds(self, body: Callable[[Carry, jax.Array], Carry], carry: Carry) -> Carry:
        """`carry = body(carry, first sorted choice)` for every round but the first; adds nothing where one takes all."""
        room, total = len(self.g_RF), jnp.sum(self.sizes_E)
        if room >= len(self.order_M):
            return carry

        def step(state: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
            first, carry = state
            return first + room, body(carry, first)

        return jax.lax.while_loop(lambda state: state[0] < total, step, (0 * total + room, carry))[1]


@dataclasses.dataclass(frozen=True)
class Grouped:
    """`forward` and `backward` as xla.py has them."""

    products: Any  # a back end of grouped_gemm

    def forward(
        self,
        expected_choices: int | None,
        x_TD: jax.Array,
        index_TX: jax.Array,
        weight_TX: jax.Array,
        gate_EDF: jax.Array,
        up_EDF: jax.Array,
        down_EFD: jax.Array,
    ) -> tuple[jax.Array, Residuals]:
        sizes_E, order_M, _ = xla.sort(index_TX, len(gate_EDF))
        room = index_TX.size if expected_choices is None else min(math.ceil(SPARE * expected_choices), index_TX.size)
        room += -room % WHOLE
        known = x_TD, weight_TX, gate_EDF, up_EDF, down_EFD, sizes_E, order_M

        def one_round(first: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
            rows = rows_from(first, room, sizes_E, order_M, weight_TX.shape)
            _, g_RF, u_RF = self._gate_and_up(rows, x_TD, gate_EDF, up_EDF)
            h_RF = xla.hidden(g_RF, u_RF, take_rows(weight_TX.reshape(-1), rows.choice_R))
            return xla.combine(self.products.forward(h_RF, down_EFD, rows.sizes_E), rows.row_TX), g_RF, u_RF

        y_TD, g_RF, u_RF = one_round(0)
        residuals = Residuals(*known, g_RF, u_RF)
        y_TD = residuals.over_other_rounds(lambda y_TD, first: y_TD + one_round(first)[0], y_TD)
        return y_TD.astype(x_TD.dtype), residuals

    def backward(self, residuals: Residuals, dy_TD: jax.Array) -> tuple[jax.Array, ...]:
        """Gradients of x_TD, weight_TX and, in the dtype of accumulation, the three matrices."""
        x_TD, weight_TX, gate_EDF, up_EDF, down_EFD, sizes_E, order_M, *kept = residuals
        weights, dtype = self.products.backward_weights, gate_EDF.dtype
        transposed = self.products.backward_rows

        def one_round(first: jax.Array | int, kept: list[jax.Array]) -> tuple[jax.Array, ...]:
            rows = rows_from(first, len(residuals.g_RF), sizes_E, order_M, weight_TX.shape)
            x_RD, g_RF, u_RF = (rows.take(x_TD), *kept) if kept else self._gate_and_up(rows, x_TD, gate_EDF, up_EDF)
            dy_RD, weight_R = rows.take(dy_TD), take_rows(weight_TX.reshape(-1), rows.choice_R)
            dh_RF = transposed(dy_RD, down_EFD, rows.sizes_E).astype(xla.accumulation(x_TD))
            h_RF, dg_RF, du_RF, dweight_R = xla.hidden_gradients(g_RF, u_RF, weight_R, dh_RF)
            dx_RD = transposed(dg_RF, gate_EDF, rows.sizes_E) + transposed(du_RF, up_EDF, rows.sizes_E)
            pairs = (x_RD, dg_RF), (x_RD, du_RF), (h_RF, dy_RD)
            matrices = (weights(*pair, rows.sizes_E, dtype).astype(dh_RF.dtype) for pair in pairs)
            return xla.combine(dx_RD, rows.row_TX), take_rows(dweight_R, rows.row_TX), *matrices

        def add_round(sums: tuple[jax.Array, ...], first: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(map(jnp.add, sums, one_round(first, [])))

        dx_TD, dweight_TX, *matrices = residuals.over_other_rounds(add_round, one_round(0, kept))
        return dx_TD.astype(x_TD.dtype), dweight_TX.astype(weight_TX.dtype), *matrices

    def _gate_and_up(
        self, rows: Rows, x_TD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x_RD = rows.take(x_TD)
        return x_RD, *(self.products.forward(x_RD, w_EDF, rows.sizes_E) for w_EDF in (gate_EDF, up_EDF))


def rows_from(
    first: jax.Array | int, room: int, sizes_E: jax.Array, order_M: jax.Array, shape_TX: tuple[int, ...]
) -> Rows:
    """The round that begins with the sorted choice `first`."""
    ends_E, num_choices = jnp.cumsum(sizes_E), len(order_M)
    at_R = first + jnp.arange(room, dtype=jnp.int32)
    choice_R = order_M.at[at_R].get(mode="fill", fill_value=num_choices)
    choice_R = jnp.where(at_R < ends_E[-1], choice_R, num_choices)
    row_TX = jnp.full_like(order_M, room).at[choice_R].set(jnp.arange(room, dtype=jnp.int32), mode="drop")
    sizes_E = jnp.diff(jnp.clip(ends_E - first, 0, room), prepend=0)
    return Rows(sizes_E, choice_R, row_TX.reshape(shape_TX))
