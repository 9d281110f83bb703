"""Multi-token prediction (DeepSeek-V3 report, section 2.2): module k predicts token t + 1 + k, keeping the causal chain."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mdl.attention.cache import Cache
from mdl.attention.core import Context
from mdl.block import Block, BlockStats
from mdl.linear import Init, Linear
from mdl.norm import RmsNorm


class MtpModule(nnx.Module):
    """h'_k = block(project([norm(embedding of token t + k); norm(h_(k-1))])), eqs. 21-22; embedding first, as in published weights.

    Embedding and output head are the main model's; `norm` is the module's own norm before the head. h_0 is the main model's hidden
    state after its final norm, as the published inference code has it.
    """

    def __init__(self, block: Block, hidden_size: int, *, eps: float, init: Init):
        self.embedding_norm = RmsNorm(hidden_size, eps=eps, init=init)
        self.hidden_norm = RmsNorm(hidden_size, eps=eps, init=init)
        self.eh_proj = Linear((2 * hidden_size,), (hidden_size,), ("embed", None), init=init)
        self.block = block
        self.norm = RmsNorm(hidden_size, eps=eps, init=init)

    def __call__(
        self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, BlockStats, Cache | None]:
        """hidden_BTD at t and the embedding of token t + k; returns the hidden state, normed, and what the block has to say."""
        joined = jnp.concatenate([self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x_BTD, stats, cache = self.block(self.eh_proj(joined), context, cache)
        return self.norm(x_BTD), stats, cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtpConfig:
    num_nextn_predict_layers: int = 1  # depth: how many tokens beyond the next are predicted, one module each

    def __post_init__(self):
        if self.num_nextn_predict_layers < 1:
            raise ValueError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; it must be at least 1 (mtp=none for no modules)"
            )
