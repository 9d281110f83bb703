"""The SwiGLU feed-forward network."""

import dataclasses

import jax
from flax import nnx

from mdl.linear import Init, Linear


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), x_BTD -> y_BTD."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, init: Init):
        D, F = hidden_size, intermediate_size
        self.gate_proj = Linear((D,), (F,), ("embed", "mlp"), init=init)
        self.up_proj = Linear((D,), (F,), ("embed", "mlp"), init=init)
        self.down_proj = Linear((F,), (D,), ("mlp", "embed"), init=init)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    intermediate_size: int = 704  # width F of the gated feed-forward network

    def __post_init__(self):
        if self.intermediate_size < 1:
            raise ValueError(f"intermediate_size is {self.intermediate_size}; it must be at least 1")

    def build(self, hidden_size: int, *, init: Init) -> Mlp:
        return Mlp(hidden_size, self.intermediate_size, init=init)
