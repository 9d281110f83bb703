"""One pre-norm transformer layer."""

from typing import NamedTuple

import jax
from flax import nnx

from kernels_pallas.select import prefer_kernels
from mdl.attention.cache import Cache
from mdl.attention.core import Context
from mdl.attention.dsa import Dsa, DsaConfig
from mdl.attention.gqa import GqaConfig
from mdl.attention.mla import MlaConfig
from mdl.attention.selection import IndexerStats
from mdl.linear import Init
from mdl.mlp import Mlp, MlpConfig
from mdl.moe.moe import Moe, MoeConfig
from mdl.norm import RmsNorm

AttentionConfig = MlaConfig | GqaConfig | DsaConfig


class ExpertStats(NamedTuple):
    """What a mixture-of-experts layer reports: tokens per expert, the choices among them that were dropped for lack of
    room, and the balance loss summed over rows."""

    load_E: jax.Array
    dropped: jax.Array
    balance_loss: jax.Array


class BlockStats(NamedTuple):
    """What a layer reports, None where it has no such part, and what it selected, for later layers without an indexer."""

    experts: ExpertStats | None
    indexer: IndexerStats | None
    selected_BTW: jax.Array | None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is dense or a mixture of experts."""

    def __init__(
        self, attention: AttentionConfig, mlp: MlpConfig | MoeConfig, hidden_size: int, *, eps: float, init: Init
    ):
        self.attention_norm = RmsNorm(hidden_size, eps=eps, init=init)
        self.attention = attention.build(hidden_size, eps=eps, init=init)
        self.mlp_norm = RmsNorm(hidden_size, eps=eps, init=init)
        self.mlp: Mlp | Moe = mlp.build(hidden_size, init=init)
        self.kernels = init.kernels

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None, selected_BTW: jax.Array | None = None
    ) -> tuple[jax.Array, BlockStats, Cache | None]:
        """selected_BTW: keys that the last indexer selected, for sparse attention without one."""
        with prefer_kernels(self.kernels.preferred):
            return self._run(x_BTD, context, cache, selected_BTW)

    def _run(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None, selected_BTW: jax.Array | None
    ) -> tuple[jax.Array, BlockStats, Cache | None]:
        indexer = experts = None
        if isinstance(self.attention, Dsa):
            attended = self.attention(self.attention_norm(x_BTD), context, cache, selected_BTW)
            attended_BTD, cache, indexer, selected_BTW = attended
        else:
            attended_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        x_BTD = x_BTD + attended_BTD
        normed_BTD = self.mlp_norm(x_BTD)
        if isinstance(self.mlp, Mlp):
            y_BTD = self.mlp(normed_BTD)
        else:
            valid_BT = None if context.segment_ids_BT is None else context.segment_ids_BT > 0
            y_BTD, routing, traffic = self.mlp(normed_BTD, valid_BT)
            experts = ExpertStats(routing.load_E, traffic.dropped, routing.balance_loss)
        return x_BTD + y_BTD, BlockStats(experts, indexer, selected_BTW), cache
