"""y[t] = sum over the chosen experts e of weight · W_down[e]^T (silu(W_gate[e]^T x) · (W_up[e]^T x)), in float32."""

import jax
import jax.numpy as jnp


def expert_mlp(
    x_TD: jax.Array,
    index_TX: jax.Array,
    weight_TX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> jax.Array:
    x_TD, weight_TX, gate_EDF, up_EDF, down_EFD = (
        a.astype(jnp.float32) for a in (x_TD, weight_TX, gate_EDF, up_EDF, down_EFD)
    )
    chosen_TXE = jax.nn.one_hot(index_TX, gate_EDF.shape[0], dtype=jnp.float32)
    h_TEF = jax.nn.silu(jnp.einsum("TD,EDF->TEF", x_TD, gate_EDF)) * jnp.einsum("TD,EDF->TEF", x_TD, up_EDF)
    return jnp.einsum("TX,TXE,TEF,EFD->TD", weight_TX, chosen_TXE, h_TEF, down_EFD)
