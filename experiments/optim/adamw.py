"""AdamW with decoupled weight decay (arXiv:1711.05101), written as one elementwise pass over each parameter.

Clipping, moments, bias correction, decay and learning rate stand in one expression per leaf, so that XLA reads and
writes gradient, parameter and moments once. All of it is computed in float32, whatever is stored.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments.errors import UserError
from experiments.optim.clip import clip_scale
from experiments.optim.schedule import Schedule, ScheduleConfig, WsdConfig


class Optimizer(NamedTuple):
    """What an optimizer config builds.

    `init(params) -> state`; `update(grads, state, params, *, learning_rate, grad_norm) -> (updates, state)`. Updates
    are added by `optax.apply_updates`; `grad_norm` is the global norm of `grads`, which the step logs anyway.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    learning_rate: Schedule


class AdamState(NamedTuple):
    count: jax.Array  # int32, updates made
    mu: Any  # first moments, like params
    nu: Any  # second moments, like params


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    learning_rate: float = 1e-3  # peak learning rate
    schedule: ScheduleConfig = dataclasses.field(default_factory=WsdConfig)  # its course over the run
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, times the learning rate; norms and biases are left out
    decay_embeddings: bool = True  # whether the embedding table decays too
    clip_norm: float | None = 1.0  # largest global gradient norm; none: no clipping
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # storage of both moments (DeepSeek-V3: bfloat16)

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must lie within 0 and 1, 1 excluded")
            # Half a bfloat16 ulp is up to 2**-8 of the value: a moment that should shrink by less is rounded back up.
            if self.moment_dtype == "bfloat16" and 1 - getattr(self, name) < 2**-8:
                raise UserError(
                    f"{name}={getattr(self, name)} with moment_dtype=bfloat16 would never let a moment shrink; "
                    f"lower {name} to 0.99 or store the moments in float32"
                )
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay={self.weight_decay} must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"clip_norm={self.clip_norm} must be positive; none switches clipping off")

    def build(self, num_steps: int) -> Optimizer:
        """The optimizer of a run of `num_steps` updates. UserError if the schedule does not fit into them."""
        return Optimizer(
            init=self._init, update=self._update, learning_rate=self.schedule.build(self.learning_rate, num_steps)
        )

    def _init(self, params) -> AdamState:
        def zeros(p):
            return jnp.zeros_like(p, dtype=jnp.dtype(self.moment_dtype))

        return AdamState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), jax.tree.map(zeros, params))

    def _update(self, grads, state: AdamState, params, *, learning_rate, grad_norm) -> tuple[Any, AdamState]:
        scale = 1.0 if self.clip_norm is None else clip_scale(grad_norm, self.clip_norm)
        count = state.count + 1
        mu_correction = 1.0 - jnp.float32(self.b1) ** count
        nu_correction = 1.0 - jnp.float32(self.b2) ** count
        moment_dtype = jnp.dtype(self.moment_dtype)

        def leaf(path, g, mu, nu, p):
            g = g.astype(jnp.float32) * scale
            mu = self.b1 * mu.astype(jnp.float32) + (1.0 - self.b1) * g
            nu = self.b2 * nu.astype(jnp.float32) + (1.0 - self.b2) * jnp.square(g)
            step = (mu / mu_correction) / (jnp.sqrt(nu / nu_correction) + self.eps)
            if decays(path, embeddings=self.decay_embeddings):
                step = step + self.weight_decay * p.astype(jnp.float32)
            return _Leaf(-learning_rate * step, mu.astype(moment_dtype), nu.astype(moment_dtype))

        done = jax.tree_util.tree_map_with_path(leaf, grads, state.mu, state.nu, params)
        updates, mu, nu = (
            jax.tree.map(lambda one, i=i: one[i], done, is_leaf=lambda x: isinstance(x, _Leaf)) for i in range(3)
        )
        return updates, AdamState(count, mu, nu)


class _Leaf(NamedTuple):
    update: jax.Array
    mu: jax.Array
    nu: jax.Array


def decays(path: jax.tree_util.KeyPath, *, embeddings: bool) -> bool:
    """Whether weight decay applies to the parameter at this tree path.

    Goes by name: scanned layers carry a leading axis, so a norm's weight does not look like a vector there.
    """
    parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    is_norm_or_bias = any(part.endswith(("norm", "bias", "scale")) for part in parts)
    return not is_norm_or_bias and (embeddings or "embedding" not in parts)
