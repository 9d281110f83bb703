"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3 report, section 2.1.1)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import LatentCache, mla_decode
from kernels_pallas.select import platform
from mdl import sharding
from mdl.attention.cache import Cache, write
from mdl.attention.core import Context, attend
from mdl.linear import Init, Linear
from mdl.norm import RmsNorm
from mdl.rope import AnyRope, RopeConfig, apply_rotary

LATENT_NORM_EPS = 1e-6  # the published code fixes it, whatever rms_norm_eps says
# Up to so many, a CPU takes products with heads one by one: all together it copies the weights into another order for them. One
# query then takes a quarter of the time, 64 take half.
FEW_QUERIES = 64


class Mla(nnx.Module):
    """x_BTD -> o_BTD through a latent of C numbers per token and one rotary key of R numbers shared by all heads.

    The cache holds the normed latent and the rotated shared key: C + R numbers per token. Few queries attend to it as it is, with
    `kv_b_proj` folded into query and output; many (a prompt) to the keys and values expanded from it.
    """

    def __init__(self, config: "MlaConfig", hidden_size: int, *, init: Init):
        D, N, Q, C = hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
        H, R, U = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.config = config
        if Q is None:
            self.q_proj = Linear((D,), (N, H + R), ("embed", "heads", None), init=init)
        else:
            self.q_a_proj = Linear((D,), (Q,), ("embed", None), init=init)
            self.q_a_norm = RmsNorm(Q, eps=LATENT_NORM_EPS, init=init)
            self.q_b_proj = Linear((Q,), (N, H + R), ("latent", "heads", None), init=init)
        self.kv_a_proj = Linear((D,), (C + R,), ("embed", None), init=init)
        self.kv_a_norm = RmsNorm(C, eps=LATENT_NORM_EPS, init=init)
        self.kv_b_proj = Linear((C,), (N, H + U), ("latent", "heads", None), init=init)
        self.o_proj = Linear((N, U), (D,), ("heads", None, "embed"), init=init)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        C, R = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        return {"latent": jnp.zeros((batch, length, C), dtype), "rotary_key": jnp.zeros((batch, length, R), dtype)}

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        q_BTNK, entries = self.queries(self.query_latent(x_BTD), context), self.entries(x_BTD, context)
        if cache is not None:
            entries = cache = write(cache, entries, context.positions_BT)
            if self.config.absorbs(x_BTD.shape[1], cache["latent"].shape[1]):
                return self.o_proj(self.attend_absorbed(q_BTNK, cache, context)), cache
        return self.o_proj(self.attend_expanded(q_BTNK, entries, context)), cache

    def attend_expanded(self, q_BTNK: jax.Array, entries: Cache, context: Context) -> jax.Array:
        """o_BTNU with the keys and values of every head."""
        k_BSNK, v_BSNU = self.keys_and_values(entries)
        mask = context.mask(k_BSNK.shape[1])
        return attend(q_BTNK, k_BSNK, v_BSNU, scale=self.config.softmax_scale, mask=mask)[0]

    def attend_absorbed(self, q_BTNK: jax.Array, cache: Cache, context: Context) -> jax.Array:
        """The same o_BTNU on the latents. Queries stand at consecutive positions, the last ones that a cache holds of a row."""
        latents = LatentCache(cache["latent"], cache["rotary_key"])
        return self.expanded(self.decode(self.absorbed(q_BTNK), latents, context.positions_BT[:, -1] + 1))

    # --- pieces, which DSA uses too ------------------------------------------------------------------------------------------

    def decode(self, q_BTNK: jax.Array, latents: LatentCache, lengths_B: jax.Array) -> jax.Array:
        """o_BTNC of absorbed queries, the last ones of their rows, over the first lengths_B latents."""

        def decode_locally(q_btnK, latents: LatentCache, lengths_b):
            q_btnC, q_btnR = jnp.split(q_btnK, [self.config.kv_lora_rank], axis=-1)
            return mla_decode(q_btnC, q_btnR, latents, lengths_b, scale=self.config.softmax_scale)[0]

        heads, rows = sharding.spec("batch", None, "heads", None), sharding.spec("batch")
        return sharding.local(decode_locally, in_specs=(heads, rows, rows), out_specs=heads)(q_BTNK, latents, lengths_B)

    def as_cached(self, entries: Cache) -> tuple[jax.Array, None]:
        """k_BSZK with one head for all absorbed queries: the latents, which are the values too, and the rotary keys."""
        return jnp.concatenate([entries["latent"], entries["rotary_key"]], axis=-1)[:, :, None], None

    def absorbed(self, q_BTNK: jax.Array) -> jax.Array:
        """Queries, now of K = C + R, whose keys are latents and rotary keys: q · (k_up c) = (q k_up) · c (V2 report, 2.1.2)."""
        H = self.config.qk_nope_head_dim
        q_BTNH, q_BTNR = jnp.split(q_BTNK, [H], axis=-1)
        return jnp.concatenate([self._per_head("BTNH,CNH->BTNC", q_BTNH, slice(None, H)), q_BTNR], axis=-1)

    def expanded(self, o_BTNC: jax.Array) -> jax.Array:
        """o_BTNU of what absorbed queries gathered: the sum of p (v_up c) is v_up of the sum of p c."""
        return self._per_head("BTNC,CNU->BTNU", o_BTNC, slice(self.config.qk_nope_head_dim, None))

    def _per_head(self, dims: str, x: jax.Array, columns: slice) -> jax.Array:
        """Product with these columns of each head's up-projection, those of keys or of values."""
        accumulation = self.kv_b_proj.precision.accumulation_dtype

        def product(dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.einsum(dims, x, w, preferred_element_type=accumulation).astype(x.dtype)

        w_CNX = self.kv_b_proj.gathered_weight()
        if platform() != "cpu" or x.shape[0] * x.shape[1] > FEW_QUERIES:
            return product(dims, x, w_CNX[..., columns])

        def head_by_head(x_btnX: jax.Array, w_CnX: jax.Array) -> jax.Array:
            one = dims.replace("N", "")
            heads = jnp.arange(x_btnX.shape[2])
            y_nbtX = jax.lax.map(lambda n: product(one, x_btnX[:, :, n], w_CnX[:, n, columns]), heads)
            return jnp.moveaxis(y_nbtX, 0, 2)

        x_heads, w_heads = sharding.spec("batch", None, "heads", None), sharding.spec(None, "heads", None)
        return sharding.local(head_by_head, in_specs=(x_heads, w_heads), out_specs=x_heads)(x, w_CNX)

    def query_latent(self, x_BTD: jax.Array) -> jax.Array:
        """What queries are projected from: the normed latent, x itself without one."""
        return x_BTD if self.config.q_lora_rank is None else self.q_a_norm(self.q_a_proj(x_BTD))

    def queries(self, latent_BTQ: jax.Array, context: Context) -> jax.Array:
        q_BTNK = self.q_proj(latent_BTQ) if self.config.q_lora_rank is None else self.q_b_proj(latent_BTQ)
        q_BTNH, q_BTNR = jnp.split(q_BTNK, [self.config.qk_nope_head_dim], axis=-1)
        q_BTNR = apply_rotary(q_BTNR, context.rotary, interleaved=self.config.rope_interleave)
        return jnp.concatenate([q_BTNH, q_BTNR], axis=-1)

    def entries(self, x_BTD: jax.Array, context: Context) -> Cache:
        """What the cache keeps of these tokens."""
        latent_BTC, k_BTR = jnp.split(self.kv_a_proj(x_BTD), [self.config.kv_lora_rank], axis=-1)
        k_BTR = apply_rotary(k_BTR[:, :, None], context.rotary, interleaved=self.config.rope_interleave)[:, :, 0]
        return {"latent": self.kv_a_norm(latent_BTC), "rotary_key": k_BTR}

    def keys_and_values(self, entries: Cache) -> tuple[jax.Array, jax.Array]:
        """k_BSNK and v_BSNU of every head."""
        k_BSNH, v_BSNU = jnp.split(self.kv_b_proj(entries["latent"]), [self.config.qk_nope_head_dim], axis=-1)
        k_BSNR = jnp.broadcast_to(
            entries["rotary_key"][:, :, None],
            (*k_BSNH.shape[:3], self.config.qk_rope_head_dim),
            out_sharding=sharding.optional_sharding(sharding.spec("batch", None, "heads", None)),
        )
        return jnp.concatenate([k_BSNH, k_BSNR], axis=-1), v_BSNU


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    num_attention_heads: int = 4  # heads N
    q_lora_rank: int | None = 96  # width Q of the query latent; none projects queries directly (V2-Lite)
    kv_lora_rank: int = 64  # width C of the key-value latent, which is what the cache holds
    qk_nope_head_dim: int = 32  # query-key width H without rotation, per head
    qk_rope_head_dim: int = 16  # rotary query-key width R; the key part is shared by all heads
    v_head_dim: int = 32  # value width U per head
    rope_interleave: bool = True  # rotary pairs are (2i, 2i+1) as in published weights, not (i, i + R/2)
    rope: AnyRope = dataclasses.field(default_factory=RopeConfig)  # rotary frequencies

    def __post_init__(self):
        for name in (
            "num_attention_heads",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even number")

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(H + R), times YaRN's mscale squared."""
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * self.rope.softmax_factor

    def cache_bytes(self, itemsize: int) -> int:
        """Per token of one layer's cache."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * itemsize

    def absorbs(self, num_queries: int, num_slots: int) -> bool:
        """Whether queries attend to the latents of a cache as they are, because that takes fewer multiply-adds than expanding.

        Per head, absorbed: 2 C + R a pair, and C (H + U) a query to fold in the projections. Expanded: K + U a pair, and
        C (H + U) a slot. Few queries (about 170 with V3's widths and a long cache) absorb; a prompt that fills its cache expands.
        """
        C, pairs = self.kv_lora_rank, num_queries * num_slots
        H, R, U = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        absorbed = pairs * (2 * C + R) + num_queries * C * (H + U)
        return absorbed < pairs * (H + R + U) + num_slots * C * (H + U)

    @property
    def flops_per_pair(self) -> int:
        """Of one query and one key over all heads: N (K + U) multiply-adds at the expanded widths, as in training."""
        return 2 * self.num_attention_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)

    def flops_per_query(self, seq_len: int) -> float:
        """Scores and weighted values of an average query of a causal sequence."""
        return self.flops_per_pair * (seq_len + 1) / 2

    def build(self, hidden_size: int, *, eps: float, init: Init) -> Mla:
        del eps  # MLA's own norms have a fixed epsilon
        return Mla(self, hidden_size, init=init)
