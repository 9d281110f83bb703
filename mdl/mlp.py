"""The SwiGLU feed-forward network."""

import dataclasses
import functools

import jax
from flax import nnx

from mdl.linear import Init, Linear, matmul
from mdl.precision import PrecisionConfig


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), x_BTD -> y_BTD."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, init: Init):
        D, F = hidden_size, intermediate_size
        self.precision = init.precision
        self.gate_proj = Linear((D,), (F,), ("embed", "mlp"), init=init)
        self.up_proj = Linear((D,), (F,), ("embed", "mlp"), init=init)
        self.down_proj = Linear((F,), (D,), ("mlp", "embed"), init=init)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return _down(self.gate_proj(x_BTD), self.up_proj(x_BTD), self.down_proj.gathered_weight(), self.precision)


@functools.partial(jax.checkpoint, static_argnums=3)
def _down(gate_BTF: jax.Array, up_BTF: jax.Array, w_FD: jax.Array, precision: PrecisionConfig) -> jax.Array:
    """Gradients make the hidden layer again, in one pass: with its parts it would double what this network keeps."""
    return matmul(jax.nn.silu(gate_BTF) * up_BTF, w_FD, precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    intermediate_size: int = 704  # width F of the gated feed-forward network

    def __post_init__(self):
        if self.intermediate_size < 1:
            raise ValueError(f"intermediate_size is {self.intermediate_size}; it must be at least 1")

    def build(self, hidden_size: int, *, init: Init) -> Mlp:
        return Mlp(hidden_size, self.intermediate_size, init=init)
