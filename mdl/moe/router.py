"""Which experts see which token, and the two forces that keep their loads equal.

DeepSeek-V3 report, section 2.1.2: sigmoid affinities, group-limited top-k, a bias per expert that enters the choice but not the
weight and follows the load (eq. 16), and a small sequence-wise balance loss (eqs. 17-20). DeepSeek-V2 and Qwen3 use softmax
affinities without bias.
"""

import dataclasses
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mdl import sharding
from mdl.linear import Init

NORMALIZER_EPS = 1e-20  # as the published code


class RouterBias(nnx.Variable):
    """e_score_correction_bias: moved by the train step from the load, never by a gradient."""


class Routing(NamedTuple):
    index_BTX: jax.Array  # chosen experts, int32
    weight_BTX: jax.Array  # their weights in the output, float32
    load_E: jax.Array  # tokens that chose each expert, padding left out, over all rows
    balance_loss: jax.Array  # eq. 17 without alpha, summed over rows


class Router(nnx.Module):
    """x_BTD -> Routing. Computes in float32 throughout."""

    def __init__(self, config: "RouterConfig", hidden_size: int, *, init: Init):
        self.config = config
        E = config.n_routed_experts
        self.dtype = jnp.promote_types(init.precision.compute_dtype, jnp.float32)
        self.weight = init.normal((hidden_size, E), ("embed", None))
        self.bias = RouterBias(jnp.zeros((E,), jnp.float32), axes=(None,)) if config.has_bias else None

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        w_DE = sharding.reshard(self.weight[...].astype(self.dtype), sharding.gathered(*self.weight.axes))
        return jnp.einsum("BTD,DE->BTE", x_BTD.astype(self.dtype), w_DE, precision=jax.lax.Precision.HIGHEST)

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array | None = None) -> Routing:
        c = self.config
        logits_BTE = self.logits(x_BTD)
        scores_BTE = jax.nn.sigmoid(logits_BTE) if c.scoring_func == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)

        choice_BTE = jax.lax.stop_gradient(scores_BTE)
        if self.bias is not None:
            choice_BTE = choice_BTE + self.bias[...]
        index_BTX = top_k(self.limit_groups(choice_BTE), c.num_experts_per_tok)
        if c.forced_balance:
            index_BTX = in_turn(index_BTX, c)

        weight_BTX = jnp.take_along_axis(scores_BTE, index_BTX, axis=-1)
        if c.norm_topk_prob:
            weight_BTX = weight_BTX / (jnp.sum(weight_BTX, axis=-1, keepdims=True) + NORMALIZER_EPS)
        weight_BTX = weight_BTX * c.routed_scaling_factor

        if valid_BT is None:
            valid_BT = jnp.ones_like(index_BTX[..., 0], dtype=bool)
        load_BE = count(index_BTX, valid_BT, c.n_routed_experts, self.dtype)
        return Routing(index_BTX, weight_BTX, jnp.sum(load_BE, axis=0), self.balance_loss(scores_BTE, valid_BT))

    def limit_groups(self, choice_BTE: jax.Array) -> jax.Array:
        """-inf for experts outside the best `topk_group` groups: a group is worth the sum of its two best experts (V3) or
        its best one (V2)."""
        c = self.config
        if not c.limits_groups:
            return choice_BTE
        grouped_BTGE = choice_BTE.reshape(*choice_BTE.shape[:-1], c.n_group, -1)
        if c.topk_method == "noaux_tc":
            group_BTG = jnp.sum(jax.lax.top_k(grouped_BTGE, 2)[0], axis=-1)
        else:
            group_BTG = jnp.max(grouped_BTGE, axis=-1)
        kept_BTg = top_k(group_BTG, c.topk_group)
        keep_BTG = jnp.any(kept_BTg[..., None] == jnp.arange(c.n_group), axis=-2)
        return jnp.where(keep_BTG[..., None], grouped_BTGE, -jnp.inf).reshape(choice_BTE.shape)

    def balance_loss(self, scores_BTE: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """sum over rows of sum_i f_i P_i: f_i the share of the row's tokens that have expert i among their K_r best affinities
        (bias and groups left out, eq. 18), times E / K_r; P_i its mean normalized affinity."""
        c = self.config
        tokens_B = jnp.maximum(jnp.sum(valid_BT, axis=-1, dtype=self.dtype), 1)
        best_BTX = top_k(jax.lax.stop_gradient(scores_BTE), c.num_experts_per_tok)
        f_BE = count(best_BTX, valid_BT, c.n_routed_experts, self.dtype)
        f_BE = f_BE * (c.n_routed_experts / c.num_experts_per_tok) / tokens_B[:, None]
        share_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True) * valid_BT[..., None]
        P_BE = jnp.sum(share_BTE, axis=1) / tokens_B[:, None]
        return jnp.sum(f_BE * P_BE)


def top_k(x: jax.Array, k: int) -> jax.Array:
    """Indices of the k largest of the last dim, int32; choices carry no gradient."""
    return jax.lax.top_k(jax.lax.stop_gradient(x), k)[1]


def in_turn(index_BTX: jax.Array, config: "RouterConfig") -> jax.Array:
    """Equal loads for an array like index_BTX: a token has experts that lie far apart, in no more groups than allowed."""
    B, T, X = index_BTX.shape
    G, K = (config.n_group, config.topk_group) if config.limits_groups else (1, 1)
    size = config.n_routed_experts // G
    token_BT1 = jnp.arange(B * T, dtype=index_BTX.dtype).reshape(B, T, 1)
    choice_X = jnp.arange(X, dtype=index_BTX.dtype)
    group_BTX = (token_BT1 + choice_X % K) % G
    member_BTX = (token_BT1 // G + choice_X // K * (size // -(-X // K))) % size
    return jnp.zeros_like(index_BTX) + group_BTX * size + member_BTX


def count(index_BTX: jax.Array, valid_BT: jax.Array, num_experts: int, dtype: jnp.dtype) -> jax.Array:
    """How many valid tokens of each row chose each expert, [B, E]."""
    hits_BTXE = (index_BTX[..., None] == jnp.arange(num_experts)) & valid_BT[..., None, None]
    return jnp.sum(hits_BTXE, axis=(1, 2), dtype=dtype)


def updated_bias(bias_E: jax.Array, load_E: jax.Array, speed: jax.Array | float) -> jax.Array:
    """One step of the auxiliary-loss-free balance: down by `speed` if overloaded, up if underloaded (V3, section 2.1.2)."""
    return bias_E + speed * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    n_routed_experts: int = 16  # experts E
    num_experts_per_tok: int = 4  # experts X that each token visits (K_r in the report)
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"  # affinity of token and expert
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"  # V3 with bias | V2 | plain top-k
    n_group: int = 1  # expert groups G; 1 means no groups
    topk_group: int = 1  # groups that a token may use
    norm_topk_prob: bool = True  # divide the chosen affinities by their sum
    routed_scaling_factor: float = 2.5  # multiplies the weights of the routed experts
    forced_balance: bool = False  # for benchmarks only: experts in turn, whatever their affinities

    def __post_init__(self):
        E, X, G = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        if not 1 <= X <= E:
            raise ValueError(f"num_experts_per_tok={X} must be between 1 and n_routed_experts={E}")
        if G < 1 or E % G:
            raise ValueError(f"n_group={G} must divide n_routed_experts={E}")
        if not 1 <= self.topk_group <= G:
            raise ValueError(f"topk_group={self.topk_group} must be between 1 and n_group={G}")
        if self.topk_group * (E // G) < X:
            raise ValueError(
                f"topk_group={self.topk_group} groups of {E // G} hold fewer than num_experts_per_tok={X} experts"
            )
        if not self.routed_scaling_factor > 0:
            raise ValueError(f"routed_scaling_factor is {self.routed_scaling_factor}; it must be positive")
        if G > 1 and self.topk_method == "noaux_tc" and E // G < 2:
            raise ValueError(f"n_group={G} leaves {E // G} expert per group; noaux_tc adds the two best of each group")
        if self.forced_balance:
            warnings.warn(
                "forced_balance: tokens go to experts in turn, not to those they fit; for benchmarks only", stacklevel=3
            )

    @property
    def limits_groups(self) -> bool:
        """Whether a token may use experts of some groups only."""
        return self.n_group > 1 and self.topk_method != "greedy"

    @property
    def has_bias(self) -> bool:
        """noaux_tc balances by a bias; the other methods have none."""
        return self.topk_method == "noaux_tc"

    def build(self, hidden_size: int, *, init: Init) -> Router:
        return Router(self, hidden_size, init=init)
