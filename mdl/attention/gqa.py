"""Grouped-query attention with rotary positions (arXiv 2305.13245), as in Llama and Qwen3."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mdl.attention.cache import Cache, write
from mdl.attention.core import Context, attend
from mdl.linear import Init, Linear
from mdl.norm import RmsNorm
from mdl.rope import AnyRope, RopeConfig, apply_rotary


class Gqa(nnx.Module):
    """x_BTD -> o_BTD; key-value head z serves query heads z * N/Z to (z + 1) * N/Z - 1."""

    def __init__(self, config: "GqaConfig", hidden_size: int, *, eps: float, init: Init):
        D, N, Z, K = hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config = config
        self.q_proj = Linear((D,), (N, K), ("embed", "heads", None), init=init)
        self.k_proj = Linear((D,), (Z, K), ("embed", "heads", None), init=init)
        self.v_proj = Linear((D,), (Z, K), ("embed", "heads", None), init=init)
        self.o_proj = Linear((N, K), (D,), ("heads", None, "embed"), init=init)
        self.q_norm = RmsNorm(K, eps=eps, init=init) if config.qk_norm else None
        self.k_norm = RmsNorm(K, eps=eps, init=init) if config.qk_norm else None

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        shape = (batch, length, self.config.num_key_value_heads, self.config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        q_BTNK, entries = self.queries(self.query_latent(x_BTD), context), self.entries(x_BTD, context)
        if cache is not None:
            entries = cache = write(cache, entries, context.positions_BT)
        k_BSZK, v_BSZK = self.keys_and_values(entries)
        o_BTNK, _ = attend(q_BTNK, k_BSZK, v_BSZK, scale=self.config.softmax_scale, mask=context.mask(k_BSZK.shape[1]))
        return self.o_proj(o_BTNK), cache

    # --- pieces, which DSA uses too, by the names that they have in MLA ---------------------------------------------------------

    def query_latent(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD

    def queries(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        q_BTNK = self.q_proj(x_BTD)
        if self.q_norm is not None:
            q_BTNK = self.q_norm(q_BTNK)
        return apply_rotary(q_BTNK, context.rotary, interleaved=False)

    def entries(self, x_BTD: jax.Array, context: Context) -> Cache:
        k_BTZK = self.k_proj(x_BTD)
        if self.k_norm is not None:
            k_BTZK = self.k_norm(k_BTZK)
        return {"k": apply_rotary(k_BTZK, context.rotary, interleaved=False), "v": self.v_proj(x_BTD)}

    def keys_and_values(self, entries: Cache) -> tuple[jax.Array, jax.Array]:
        return entries["k"], entries["v"]

    def as_cached(self, entries: Cache) -> tuple[jax.Array, jax.Array]:
        return self.keys_and_values(entries)

    def absorbed(self, q_BTNK: jax.Array) -> jax.Array:
        return q_BTNK

    def expanded(self, o_BTNK: jax.Array) -> jax.Array:
        return o_BTNK


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaConfig:
    num_attention_heads: int = 4  # query heads N
    num_key_value_heads: int = 2  # key-value heads Z; divides num_attention_heads
    head_dim: int = 64  # width K of a head
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotation (Qwen3)
    rope: AnyRope = dataclasses.field(default_factory=RopeConfig)  # rotary frequencies

    def __post_init__(self):
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need an even number")

    @property
    def rotary_dim(self) -> int:
        return self.head_dim

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    def cache_bytes(self, itemsize: int) -> int:
        """Per token of one layer's cache."""
        return 2 * self.num_key_value_heads * self.head_dim * itemsize

    @property
    def flops_per_pair(self) -> int:
        """Of one query and one key over all heads: 2 N K multiply-adds."""
        return 4 * self.num_attention_heads * self.head_dim

    def flops_per_query(self, seq_len: int) -> float:
        """Scores and weighted values of an average query of a causal sequence."""
        return self.flops_per_pair * (seq_len + 1) / 2

    def build(self, hidden_size: int, *, eps: float, init: Init) -> Gqa:
        return Gqa(self, hidden_size, eps=eps, init=init)
