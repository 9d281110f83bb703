"""The mixture-of-experts feed-forward layer (DeepSeekMoE, arXiv 2401.06066; V3 report, section 2.1.2)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mdl.linear import Init
from mdl.mlp import Mlp
from mdl.moe.dispatch import TransportConfig, dispatch
from mdl.moe.experts import Experts
from mdl.moe.router import Router, RouterConfig, Routing
from mdl.moe.transport import Traffic
from mdl.moe.transport_ring import RingConfig


class Moe(nnx.Module):
    """y = sum over chosen experts of weight * expert(x), plus the shared experts, which are one wider network."""

    def __init__(self, config: "MoeConfig", hidden_size: int, *, init: Init):
        self.transport = config.transport
        self.router: Router = config.router.build(hidden_size, init=init)
        self.experts = Experts(config.router.n_routed_experts, hidden_size, config.moe_intermediate_size, init=init)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = Mlp(hidden_size, width, init=init) if width else None

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array | None = None) -> tuple[jax.Array, Routing, Traffic]:
        """valid_BT is False at padding, which counts neither in loads nor in the balance loss."""
        routing = self.router(x_BTD, valid_BT)
        index_BTX = routing.index_BTX
        if valid_BT is not None:  # padding, all of which would choose the same experts, goes to none
            index_BTX = jnp.where(valid_BT[..., None], index_BTX, self.router.config.n_routed_experts)
        y_BTD, traffic = dispatch(x_BTD, index_BTX, routing.weight_BTX, self.experts, self.transport)
        if self.shared_experts is not None:
            y_BTD = y_BTD + self.shared_experts(x_BTD)
        return y_BTD, routing, traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    moe_intermediate_size: int = 176  # width F of one expert
    n_shared_experts: int = 1  # experts that every token visits
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)  # how tokens choose experts
    transport: TransportConfig = dataclasses.field(
        default_factory=RingConfig
    )  # how tokens reach experts of other devices

    def __post_init__(self):
        if self.moe_intermediate_size < 1:
            raise ValueError(f"moe_intermediate_size is {self.moe_intermediate_size}; it must be at least 1")
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts is {self.n_shared_experts}; it must be at least 0")

    def build(self, hidden_size: int, *, init: Init) -> Moe:
        return Moe(self, hidden_size, init=init)
