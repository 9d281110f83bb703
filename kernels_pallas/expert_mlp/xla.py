"""Routed experts in plain JAX: tokens are gathered straight into the padded slots of their experts and back.

Each direction moves rows by gathers alone (a token's slots, a slot's token), never by scatters, and the three products and
their gradients work in the padded layout without leaving it. The weight of a choice multiplies the hidden layer, so that its
gradient needs no copy of the experts' output.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_gemm.layout import Layout, capacity, take_rows

UNROLL = 8  # choices
COMBINED = 8192  # tokens whose choices are summed at once
MOST_KEYS = 2**31  # numbers that an int32 has, from 0 on


class Routes(NamedTuple):
    """Which choice (t·X + x) fills which slot. `order_M` lists the choices sorted by expert."""

    sizes_E: jax.Array
    order_M: jax.Array
    slot_TX: jax.Array  # E·C for a choice in the overflow, or of an absent expert
    choice_EC: jax.Array  # T·X for an empty slot

    @property
    def layout(self) -> Layout:
        return Layout.of(self.sizes_E, self.slot_TX.size, self.choice_EC.shape[1])


class Residuals(NamedTuple):
    x_TD: jax.Array
    weight_TX: jax.Array
    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    routes: Routes
    g_ECF: jax.Array
    u_ECF: jax.Array


def sort(index_TX: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choices by expert: sizes_E, order_M (which choice, t·X + x, comes m-th) and expert_M (its expert). A number outside [0, E) is
    an expert that is not here: E, behind all others."""
    num_choices = index_TX.size
    here_TX = (index_TX >= 0) & (index_TX < num_experts)
    expert_M = jnp.where(here_TX, index_TX, num_experts).reshape(-1).astype(jnp.int32)
    choice_M = jnp.arange(num_choices, dtype=jnp.int32)
    if (num_experts + 1) * num_choices <= MOST_KEYS:  # one array to sort instead of two: five times as fast on CPU
        key_M = jnp.sort(expert_M * num_choices + choice_M)
        order_M, sorted_M = key_M % num_choices, key_M // num_choices
    else:
        order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
        sorted_M = expert_M[order_M]
    sizes_E = jnp.sum(expert_M[:, None] == jnp.arange(num_experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    return sizes_E, order_M, sorted_M


def route(index_TX: jax.Array, num_experts: int, expected_choices: int | None) -> Routes:
    """Slots are made for the choices expected."""
    num_choices = index_TX.size
    slots = capacity(num_choices if expected_choices is None else min(num_choices, expected_choices), num_experts)
    sizes_E, order_M, expert_M = sort(index_TX, num_experts)
    layout = Layout.of(sizes_E, num_choices, slots)
    slot_M = jnp.zeros_like(order_M).at[order_M].set(layout.slot_M(expert_M), unique_indices=True)
    choice_EC = order_M.at[layout.row_EC()].get(mode="fill", fill_value=num_choices)
    return Routes(sizes_E, order_M, slot_M.reshape(index_TX.shape), choice_EC)


def forward(
    expected_choices: int | None,
    x_TD: jax.Array,
    index_TX: jax.Array,
    weight_TX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> tuple[jax.Array, Residuals]:
    routes = route(index_TX, gate_EDF.shape[0], expected_choices)
    experts_per_token = index_TX.shape[1]
    weight_M = weight_TX.reshape(-1)
    x_ECD = take_rows(x_TD, routes.choice_EC // experts_per_token)
    g_ECF = _product("ECD,EDF->ECF", x_ECD, gate_EDF).astype(x_TD.dtype)
    u_ECF = _product("ECD,EDF->ECF", x_ECD, up_EDF).astype(x_TD.dtype)
    h_ECF = hidden(g_ECF, u_ECF, take_rows(weight_M, routes.choice_EC))
    y_ECD = _product("ECF,EFD->ECD", h_ECF, down_EFD)
    y_TD = combine(y_ECD, routes.slot_TX)

    def add_block(y_TD: jax.Array, expert: jax.Array, row_R: jax.Array) -> jax.Array:
        choice_R = routes.order_M.at[row_R].get(mode="fill", fill_value=index_TX.size)
        token_R = choice_R // experts_per_token
        x_RD = take_rows(x_TD, token_R)
        g_RF = _product("RD,DF->RF", x_RD, gate_EDF[expert]).astype(x_TD.dtype)
        u_RF = _product("RD,DF->RF", x_RD, up_EDF[expert]).astype(x_TD.dtype)
        h_RF = hidden(g_RF, u_RF, take_rows(weight_M, choice_R))
        return y_TD.at[token_R].add(_product("RF,FD->RD", h_RF, down_EFD[expert]), mode="drop")

    y_TD = routes.layout.over_blocks(add_block, y_TD)
    residuals = Residuals(x_TD, weight_TX, gate_EDF, up_EDF, down_EFD, routes, g_ECF, u_ECF)
    return y_TD.astype(x_TD.dtype), residuals


def forward_by_choice(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weight_TX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    """The same y_TD for a few tokens, as in decoding: each choice reads its own expert's matrices, and nothing is sorted."""
    num_tokens, experts_per_token = index_TX.shape

    def of_choice(_: tuple, choice: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        x_D, index, weight = choice
        gate_DF, up_DF, down_FD = (
            jax.lax.dynamic_index_in_dim(w, index, keepdims=False) for w in (gate_EDF, up_EDF, down_EFD)
        )
        g_F = _product("D,DF->F", x_D, gate_DF).astype(x_D.dtype)
        u_F = _product("D,DF->F", x_D, up_DF).astype(x_D.dtype)
        y_D = _product("F,FD->D", hidden(g_F, u_F, weight), down_FD)
        return (), jnp.where((index >= 0) & (index < gate_EDF.shape[0]), y_D, 0)

    choices = jnp.repeat(x_TD, experts_per_token, axis=0), index_TX.reshape(-1), weight_TX.reshape(-1)
    _, y_MD = jax.lax.scan(of_choice, (), choices, unroll=min(index_TX.size, UNROLL))
    return jnp.sum(y_MD.reshape(num_tokens, experts_per_token, -1), axis=1).astype(x_TD.dtype)


def backward(residuals: Residuals, dy_TD: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients of x_TD, weight_TX and, in the dtype of accumulation, the three matrices."""
    x_TD, weight_TX, gate_EDF, up_EDF, down_EFD, routes, g_ECF, u_ECF = residuals
    experts_per_token = weight_TX.shape[1]
    weight_M = weight_TX.reshape(-1)
    token_EC = routes.choice_EC // experts_per_token
    x_ECD, dy_ECD = take_rows(x_TD, token_EC), take_rows(dy_TD, token_EC)
    dh_ECF = _product("ECD,EFD->ECF", dy_ECD, down_EFD)
    h_ECF, dg_ECF, du_ECF, dweight_EC = hidden_gradients(g_ECF, u_ECF, take_rows(weight_M, routes.choice_EC), dh_ECF)
    dx_ECD = _product("ECF,EDF->ECD", dg_ECF, gate_EDF) + _product("ECF,EDF->ECD", du_ECF, up_EDF)
    gradients = (
        combine(dx_ECD, routes.slot_TX),
        take_rows(dweight_EC.reshape(-1), routes.slot_TX.reshape(-1)),
        _product("ECD,ECF->EDF", x_ECD, dg_ECF),
        _product("ECD,ECF->EDF", x_ECD, du_ECF),
        _product("ECF,ECD->EFD", h_ECF, dy_ECD),
    )

    def add_block(gradients, expert: jax.Array, row_R: jax.Array):
        dx_TD, dweight_M, dgate_EDF, dup_EDF, ddown_EFD = gradients
        choice_R = routes.order_M.at[row_R].get(mode="fill", fill_value=weight_TX.size)
        token_R = choice_R // experts_per_token
        x_RD, dy_RD = take_rows(x_TD, token_R), take_rows(dy_TD, token_R)
        gate_DF, up_DF = gate_EDF[expert], up_EDF[expert]
        g_RF = _product("RD,DF->RF", x_RD, gate_DF).astype(x_TD.dtype)
        u_RF = _product("RD,DF->RF", x_RD, up_DF).astype(x_TD.dtype)
        dh_RF = _product("RD,FD->RF", dy_RD, down_EFD[expert])
        h_RF, dg_RF, du_RF, dweight_R = hidden_gradients(g_RF, u_RF, take_rows(weight_M, choice_R), dh_RF)
        dx_RD = _product("RF,DF->RD", dg_RF, gate_DF) + _product("RF,DF->RD", du_RF, up_DF)
        return (
            dx_TD.at[token_R].add(dx_RD, mode="drop"),
            dweight_M.at[choice_R].set(dweight_R, mode="drop"),
            dgate_EDF.at[expert].add(_product("RD,RF->DF", x_RD, dg_RF)),
            dup_EDF.at[expert].add(_product("RD,RF->DF", x_RD, du_RF)),
            ddown_EFD.at[expert].add(_product("RF,RD->FD", h_RF, dy_RD)),
        )

    dx_TD, dweight_M, *matrices = routes.layout.over_blocks(add_block, gradients)
    return dx_TD.astype(x_TD.dtype), dweight_M.reshape(weight_TX.shape).astype(weight_TX.dtype), *matrices


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=accumulation(a))


def hidden(g: jax.Array, u: jax.Array, weight: jax.Array) -> jax.Array:
    return (jax.nn.silu(g.astype(accumulation(g))) * u * weight[..., None]).astype(g.dtype)


def hidden_gradients(
    g: jax.Array, u: jax.Array, weight: jax.Array, dh: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The weighted hidden layer again, the gradients of gate and up, and that of the weights."""
    dtype, g, u, weight = g.dtype, g.astype(accumulation(g)), u.astype(accumulation(u)), weight[..., None]
    sigmoid = jax.nn.sigmoid(g)
    silu = g * sigmoid
    dg = weight * dh * u * (sigmoid + silu * (1 - sigmoid))
    return (
        (silu * u * weight).astype(dtype),
        dg.astype(dtype),
        (weight * dh * silu).astype(dtype),
        jnp.sum(silu * u * dh, axis=-1),
    )


def accumulation(a: jax.Array) -> jnp.dtype:
    """float32, or float64 for float64."""
    return jnp.promote_types(a.dtype, jnp.float32)


def combine(y_ECD: jax.Array, slot_TX: jax.Array) -> jax.Array:
    """The sum of each token's slots; choice by choice and not too many tokens at once, or TPUs would write [T, X, D] first."""
    y_MD = y_ECD.reshape(-1, y_ECD.shape[-1])

    def total(slot_X: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, (take_rows(y_MD, slot).astype(accumulation(y_MD)) for slot in slot_X))

    if slot_TX.shape[0] <= COMBINED:
        return total(slot_TX.T)
    return jax.lax.map(total, slot_TX, batch_size=COMBINED)
